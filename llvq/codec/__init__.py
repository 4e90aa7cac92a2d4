"""Codes as files: what they cost, streams of them, and what a data set's codes are.

model = llvq.load_pretrained("fashion_mnist/vq")
stream = codec.encode(model, images)  # bytes
images = codec.decode(model, stream)
"""

from llvq.codec.code_model import CodeModel, parameters_digest
from llvq.codec.density import with_density
from llvq.codec.stream import (
    code_model_of,
    decode,
    decode_codes,
    encode,
    encode_codes,
    fit,
)

__all__ = [
    "CodeModel",
    "code_model_of",
    "decode",
    "decode_codes",
    "encode",
    "encode_codes",
    "fit",
    "parameters_digest",
    "with_density",
]
