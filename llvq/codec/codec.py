"""Compresses images and codes to streams of bytes, and decompresses them."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Self

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Int, UInt8

from llvq import checkpointing
from llvq.codec import code_model as code_models
from llvq.codec import container
from llvq.codec.code_model import CodeModel, parameters_digest
from llvq.codec.coder import Coder
from llvq.codec.estimate import estimate
from llvq.codec.passes import Passes, num_codes
from llvq.codec.vocabulary import Vocabulary
from llvq.errors import DamageError, UserError
from llvq.models import VQVAE
from llvq.pretrained import find_pretrained

Codes = Int[np.ndarray, "n h w ..."]
Images = UInt8[np.ndarray, "n height width channels"]

_HOW_TO_GET_A_CODE_MODEL = (
    "evaluate its run (main.py --mode=evaluate) or fit one to images (python -m llvq.codec fit)"
)


class Codec:
    """Compresses and decompresses with one model.

        codec = Codec.load("fashion_mnist/vq")
        stream = codec.compress(images)
        images = codec.decompress(stream)

    Images are uint8 [n, height, width, channels], of any size. Codes are those of `VQVAE.encode`.
    Several threads may use a codec at the same time.

    Attributes:
      model: a copy of the model, with parameters of its own.
      code_model: the cost of each code.
    """

    def __init__(self, model: VQVAE, code_model: CodeModel) -> None:
        """Copies the model and prepares the tables, once for all streams.

        Args:
          model: a model.
          code_model: a code model that was estimated with the model's parameters.

        Raises:
          UserError: if the code model was estimated with other parameters.
        """
        if not code_model.belongs_to(model):
            raise UserError(
                "the model's parameters have changed since its code model was estimated: "
                f"{_HOW_TO_GET_A_CODE_MODEL}"
            )
        self.model = nnx.clone(model, arrays=True)
        self.code_model = code_model
        self._passes = _passes(self.model)
        self._vocabulary = Vocabulary(code_model, self.model.quantizer)
        self._coder = Coder(code_model)

    @classmethod
    def load(cls, name_or_path: epath.PathLike) -> Self:
        """Loads a trained model and its code model.

        Args:
          name_or_path: a name in `llvq.pretrained_index()`, or the path of a checkpoint or workdir.

        Raises:
          UserError: if `llvq.load_pretrained` raises it, or the checkpoint has no code model.
        """
        checkpoint = checkpointing.load(find_pretrained(name_or_path))
        model = checkpointing.model_of(checkpoint)
        code_model = code_models.load(checkpoint.path)
        if code_model is None:
            raise UserError(f"the model has no code model: {_HOW_TO_GET_A_CODE_MODEL}")
        return cls(model, code_model)

    @classmethod
    def fit(cls, model: VQVAE, images: Images | Iterable[Images]) -> Self:
        """Estimates a code model from images.

        Args:
          model: a model.
          images: an array, or several arrays of any sizes. The more images there are, the better
            the code model predicts others.

        Raises:
          ValueError: if there are no images, or an array is not one of images.
        """
        passes = _passes(model)
        is_array = isinstance(images, np.ndarray | jax.Array)
        arrays: Iterable[Images] = [np.asarray(images)] if is_array else images
        codes = (_codes(passes, model.image_channels, array) for array in arrays)
        estimated = estimate(
            itertools.chain.from_iterable(map(_blocks, codes)),
            model.quantizer.code_width,
            parameters_digest(model),
        )
        return cls(model, dataclasses.replace(estimated, source="images chosen to fit it to"))

    def save(self, path: epath.PathLike) -> None:
        """Writes the code model beside the model's checkpoint, where `load` finds it.

        Args:
          path: the checkpoint or its workdir.

        Raises:
          UserError: if there is no checkpoint, or the file cannot be written.
        """
        self.code_model.save(checkpointing.find(path, "save the model first"))

    def compress(self, images: Images, contexts: bool = False) -> bytes:
        """Encodes images and packs their codes into a stream.

        Args:
          images: images of one size. Edges are repeated up to a size that the network can halve.
          contexts: whether neighbouring codes predict a code, which makes the stream smaller and
            takes longer.

        Returns:
          The stream; `container` describes its format.

        Raises:
          UserError: if a stream cannot hold that many images.
          ValueError: if the array is not one of images.
        """
        codes = _codes(self._passes, self.model.image_channels, images)
        return self._pack(codes, images.shape[1:3], contexts)

    def decompress(self, stream: bytes) -> Images:
        """Reconstructs the images of a stream.

        Raises:
          UserError: if the stream belongs to another model, is damaged, or holds codes only.
        """
        header, codes = self._unpack(stream)
        if not header.holds_images:
            raise UserError("the stream holds codes and no images: use decompress_codes")
        return self._passes.images(codes)[:, : header.height, : header.width]

    def compress_codes(self, codes: Codes, contexts: bool = False) -> bytes:
        """Packs codes into a stream; see `compress`.

        Raises:
          UserError: if a stream cannot hold that many codes.
          ValueError: if the array is not one of this model's codes.
        """
        codes = np.asarray(codes)
        code_shape = self.model.quantizer.code_shape
        if codes.ndim != 3 + len(code_shape) or codes.shape[3:] != code_shape:
            raise ValueError(f"codes must be [n, h, w, *{code_shape}], not {list(codes.shape)}")
        converted = codes.astype(np.int32)
        if not np.array_equal(codes, converted):
            raise ValueError(f"codes must be integers of 32 bits, not these {codes.dtype}")
        return self._pack(converted, None, contexts)

    def decompress_codes(self, stream: bytes) -> Codes:
        """Unpacks the codes of a stream, with or without images; see `decompress`."""
        return self._unpack(stream)[1]

    def _pack(self, codes: Codes, image_size: tuple[int, ...] | None, contexts: bool) -> bytes:
        height, width = image_size or codes.shape[1:3]
        header = container.Header(image_size is not None, contexts, len(codes), height, width)
        container.check_size(header)
        blocks = [
            self._coder.encode(self._vocabulary.block(block), with_contexts=contexts)
            for block in _blocks(codes)
        ]
        return container.pack(header, self.code_model, codes, blocks)

    def _unpack(self, stream: bytes) -> tuple[container.Header, Codes]:
        header = container.read_header(stream, self.code_model)
        height, width = header.height, header.width
        if header.holds_images:
            height, width = num_codes(self.model, height, width)
        ranges = container.blocks(range(header.num_images), height, width)
        decoded = []
        try:
            for images, data in zip(ranges, container.unpack(stream, len(ranges)), strict=True):
                shape = len(images), height, width
                container.check_length(data, self.code_model, math.prod(shape), header.has_contexts)
                block = self._coder.decode(data, shape, with_contexts=header.has_contexts)
                decoded.append(self._vocabulary.codes_of(block))
            codes = np.concatenate(decoded)
            container.check(stream, header, self.code_model, codes)
        except DamageError as error:
            raise UserError(f"the stream is truncated or damaged ({error})") from error
        return header, codes


def _passes(model: VQVAE) -> Passes:
    return Passes(model, jax.local_devices()[:1])


def _codes(passes: Passes, channels: int | None, images: Images) -> Codes:
    """Encodes images of any size."""
    is_array = images.dtype == np.uint8 and images.ndim == 4
    if not is_array or channels not in (None, images.shape[-1]):
        raise ValueError(
            f"images must be uint8 [n, height, width, {channels or 'channels'}], "
            f"not {images.dtype} {list(images.shape)}"
        )
    if not images.size:
        raise ValueError(f"there is no pixel in images of the shape {list(images.shape)}")
    bottom, right = (-size % passes.downsampling for size in images.shape[1:3])
    return passes.codes(np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), "edge"))


def _blocks(codes: Codes) -> Iterator[Codes]:
    for images in container.blocks(range(len(codes)), *codes.shape[1:3]):
        yield codes[images.start : images.stop]
