"""Images and codes as streams of bytes, and back."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jaxtyping import Int, UInt8

from llvq.codec import container
from llvq.codec.code_model import CodeModel, parameters_digest
from llvq.codec.coder import Coder, DamageError
from llvq.codec.estimate import estimate
from llvq.codec.passes import Passes, num_codes
from llvq.codec.vocabulary import Vocabulary
from llvq.errors import UserError
from llvq.models import VQVAE


def fit(model: VQVAE, images: Iterable[UInt8[np.ndarray, "n height width channels"]]) -> None:
    """Gives a model a code model, in place of the one that it has, if any.

    Args:
      model: gets it as its attribute `code_model`.
      images: arrays of images of any size; the more, the better the code model.

    Raises:
      ValueError: if there are none.
    """
    blocks = itertools.chain.from_iterable(_blocks(_codes(model, some)) for some in images)
    width = model.quantizer.code_width
    estimated = estimate(blocks, width, parameters_digest(model))
    model.code_model = dataclasses.replace(estimated, source="images chosen to fit it to")


def encode(
    model: VQVAE,
    images: UInt8[np.ndarray, "n height width channels"],
    *,
    with_contexts: bool = False,
) -> bytes:
    """Images as a stream.

    Args:
      model: from `llvq.load_pretrained`, of a checkpoint that has a code model.
      images: of any size; edges are repeated up to a size that the model can halve.
      with_contexts: whether a code's neighbours predict it: smaller and slower.

    Returns:
      The stream; see `container` for its format.

    Raises:
      UserError: if the model has no code model, or there are more images than a stream holds.
      ValueError: if the images are no such array.
    """
    code_model_of(model)  # before the network runs
    codes = _codes(model, images)
    return _encode(model, codes, images.shape[1:3], with_contexts)


def decode(model: VQVAE, stream: bytes) -> UInt8[np.ndarray, "n height width channels"]:
    """The images of a stream, as the model reconstructs them.

    Args:
      model: with the parameters and the code model of the one that encoded them.
      stream: as `encode` returns it.

    Raises:
      UserError: if the stream is not of this model, is damaged, or holds codes.
    """
    header, codes = _decode(model, stream)
    if not header.holds_images:
        raise UserError("the stream holds codes and no images: use decode_codes")
    images = Passes(model, jax.local_devices()[:1]).images(codes)
    return images[:, : header.height, : header.width]


def encode_codes(
    model: VQVAE, codes: Int[np.ndarray, "n h w ..."], *, with_contexts: bool = False
) -> bytes:
    """Codes, as `model.encode` returns them, as a stream; see `encode`."""
    codes = np.asarray(codes)
    of_place = model.quantizer.code_shape
    if codes.ndim != 3 + len(of_place) or codes.shape[3:] != of_place:
        raise ValueError(f"codes must be [n, h, w, *{of_place}], not {list(codes.shape)}")
    converted = codes.astype(np.int32)
    if not np.array_equal(codes, converted):
        raise ValueError(f"codes must be integers of 32 bits, not these {codes.dtype}")
    return _encode(model, converted, None, with_contexts)


def decode_codes(model: VQVAE, stream: bytes) -> Int[np.ndarray, "n h w ..."]:
    """The codes of a stream, of images or of codes alone; see `decode` for the errors."""
    return _decode(model, stream)[1]


def code_model_of(model: VQVAE) -> CodeModel:
    """The code model of a model.

    Raises:
      UserError: if it has none, or its parameters have changed since.
    """
    _check_value_range(model)
    code_model = model.code_model
    if not isinstance(code_model, CodeModel):
        raise UserError(
            "the model has no code model: evaluate its run (main.py --mode=evaluate) or fit one "
            "to images (python -m llvq.codec fit)"
        )
    if code_model.parameters != parameters_digest(model):
        raise UserError("the model's parameters have changed since its code model was estimated")
    return code_model


def _check_value_range(model: VQVAE) -> None:
    if model.value_range is None:
        raise UserError(
            "the model does not know what pixel values its images were mapped to: import it with "
            "--value_range, or set model.value_range"
        )


def _codes(
    model: VQVAE, images: UInt8[np.ndarray, "n height width channels"]
) -> Int[np.ndarray, "n h w ..."]:
    _check_value_range(model)
    channels = model.image_channels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"images must be uint8 [n, height, width, {channels}], "
            f"not {images.dtype} {list(images.shape)}"
        )
    if not images.size:
        raise ValueError(f"there is no pixel in images of the shape {list(images.shape)}")
    factor = 2 ** len(model.encoder.downsample)
    bottom, right = (-size % factor for size in images.shape[1:3])
    padded = np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), "edge")
    return Passes(model, jax.local_devices()[:1]).codes(padded)


def _encode(
    model: VQVAE,
    codes: Int[np.ndarray, "n h w ..."],
    image_size: tuple[int, ...] | None,
    with_contexts: bool,
) -> bytes:
    code_model = code_model_of(model)
    header = container.Header(
        image_size is not None, with_contexts, len(codes), *(image_size or codes.shape[1:3])
    )
    container.check_size(header)
    vocabulary, coder = Vocabulary(code_model, model.quantizer), Coder(code_model)
    blocks = [
        coder.encode(vocabulary.block(block), with_contexts=with_contexts)
        for block in _blocks(codes)
    ]
    return container.pack(header, code_model, codes, blocks)


def _blocks(codes: Int[np.ndarray, "n h w ..."]) -> Iterator[Int[np.ndarray, "n h w ..."]]:
    for images in container.blocks(range(len(codes)), *codes.shape[1:3]):
        yield codes[images.start : images.stop]


def _decode(model: VQVAE, stream: bytes) -> tuple[container.Header, Int[np.ndarray, "n h w ..."]]:
    code_model = code_model_of(model)
    header = container.read_header(stream, code_model)
    height, width = header.height, header.width
    if header.holds_images:
        height, width = num_codes(model, height, width)
    vocabulary, coder = Vocabulary(code_model, model.quantizer), Coder(code_model)
    blocks = container.blocks(range(header.num_images), height, width)
    try:
        decoded = []
        for images, data in zip(blocks, container.unpack(stream, len(blocks)), strict=True):
            shape = len(images), height, width
            container.check_length(data, code_model, math.prod(shape), header.has_contexts)
            block = coder.decode(data, shape, with_contexts=header.has_contexts)
            decoded.append(vocabulary.codes_of(block))
        codes = np.concatenate(decoded)
        container.check(stream, header, code_model, codes)
    except DamageError as error:
        raise UserError(f"the stream is truncated or damaged ({error})") from error
    return header, codes
