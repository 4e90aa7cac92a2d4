"""Entropy coding of codes: streams of images and codes, and estimates of what codes cost.

codec = llvq.Codec.load("fashion_mnist/vq")
stream = codec.compress(images)  # bytes
images = codec.decompress(stream)
"""

from llvq.codec.code_model import CodeModel, parameters_digest
from llvq.codec.codec import Codec
from llvq.codec.density import with_density

__all__ = ["CodeModel", "Codec", "parameters_digest", "with_density"]
