"""Images to codes and back, some at a time, on this process's devices.

How many images a device takes at a time follows from their size alone. So the compiled program,
and with it the codes, do not depend on batch sizes, devices or processes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Int32, Shaped, UInt8

from llvq.data import Dataset, IndexBatch
from llvq.models import VQVAE
from llvq.runtime import sharding
from llvq.training import train_state

_PIXELS_PER_DEVICE = 2**15


def num_codes(model: VQVAE, height: int, width: int) -> tuple[int, int]:
    """(height, width) in codes of an image of so many pixels; it is padded if need be."""
    factor = 2 ** len(model.encoder.downsample)
    return -(-height // factor), -(-width // factor)


class _Steps(NamedTuple):
    """Attributes:
    encode: (graphdef, state, images) to codes.
    decode: (graphdef, state, codes) to images.
    """

    encode: Callable[[Any, Any, Array], Array]
    decode: Callable[[Any, Any, Array], Array]


@functools.cache
def _steps(mesh: Mesh) -> _Steps:
    compiled = functools.partial(
        jax.jit,
        static_argnums=0,
        out_shardings=sharding.images_sharded(mesh),
        compiler_options=sharding.compiler_options(mesh),
    )

    @compiled
    def encode(graphdef: Any, state: Any, images: Array) -> Array:
        model = nnx.merge(graphdef, state)
        return model.unpack_codes(model.encode(model.pack(images)))

    @compiled
    def decode(graphdef: Any, state: Any, codes: Array) -> Array:
        return nnx.merge(graphdef, state).decode_uint8(codes)

    return _Steps(encode, decode)


class Passes:
    """Encodes and decodes with a model."""

    def __init__(self, model: VQVAE, devices: Sequence[jax.Device] | None = None) -> None:
        """Args:
        model: stays as it is.
        devices: to use; by default all of this process.
        """
        self._mesh = sharding.make_mesh(devices or jax.local_devices())
        self._factor = 2 ** len(model.encoder.downsample)
        self._model = nnx.clone(model)
        self._model.code_model = None
        graphdef, state = nnx.split(self._model)
        self._graphdef = graphdef
        self._state = sharding.replicate(state, self._mesh)

    def _share(self, height: int, width: int) -> int:
        """How many images of so many pixels all devices take at a time."""
        return max(1, _PIXELS_PER_DEVICE // (height * width)) * self._mesh.size

    def _encode(
        self,
        batches: Iterable[UInt8[np.ndarray, "share height width channels"]],
        height: int,
        width: int,
    ) -> Iterator[Int32[np.ndarray, "share h w ..."]]:
        """The codes of batches of `_share` images of so many pixels."""
        latents = height // self._factor, width // self._factor
        train_state.fit_to_mesh(self._model, self._mesh, latents)
        encode = functools.partial(
            _steps(self._mesh).encode, nnx.graphdef(self._model), self._state
        )
        for images in batches:
            yield np.asarray(encode(sharding.to_devices(images, self._mesh)))

    def codes(
        self, images: UInt8[np.ndarray, "n height width channels"]
    ) -> Int32[np.ndarray, "n h w ..."]:
        """The codes of images, whose height and width are multiples of what the model halves."""
        size = images.shape[1:3]
        batches = _padded(images, self._share(*size))
        return _joined(self._encode(batches, *size), len(images))

    def images(
        self, codes: Int[np.ndarray, "n h w ..."]
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """The images of codes."""
        share = self._share(codes.shape[1] * self._factor, codes.shape[2] * self._factor)
        decode = functools.partial(_steps(self._mesh).decode, self._graphdef, self._state)
        batches = (sharding.to_devices(batch, self._mesh) for batch in _padded(codes, share))
        return _joined((np.asarray(decode(batch)) for batch in batches), len(codes))

    def of_split(
        self, data: Dataset, split: str, ranges: Sequence[range]
    ) -> Iterator[Int32[np.ndarray, "n h w ..."]]:
        """The codes of some ranges of a split's images, one by one."""
        if not ranges:
            return
        size = data.image_shape[:2]
        share = self._share(*size)
        positions = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
        waiting: list[np.ndarray] = []
        remaining = iter(ranges)
        wanted = next(remaining)
        images = (images for _, images in data.batches(split, _batches(positions, share)))
        for batch in self._encode(images, *size):
            waiting.append(batch)
            while sum(map(len, waiting)) >= len(wanted):
                joined = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
                yield joined[: len(wanted)]
                waiting = [joined[len(wanted) :]]
                following = next(remaining, None)
                if following is None:
                    return
                wanted = following


def _batches(positions: Int[np.ndarray, "n"], share: int) -> Iterator[IndexBatch]:
    """Batches of `share` positions; the first image fills up the last one."""
    for start in range(0, len(positions), share):
        index = positions[start : start + share]
        mask = np.arange(share) < len(index)
        yield IndexBatch(np.pad(index, (0, share - len(index))), np.zeros(share, bool), mask)


def _padded(
    arrays: Shaped[np.ndarray, "n ..."], share: int
) -> Iterator[Shaped[np.ndarray, "share ..."]]:
    """Batches of `share` arrays; zeros fill up the last one."""
    for start in range(0, len(arrays), share):
        batch = arrays[start : start + share]
        yield np.pad(batch, [(0, share - len(batch)), *[(0, 0)] * (arrays.ndim - 1)])


def _joined(
    batches: Iterable[Shaped[np.ndarray, "share ..."]], length: int
) -> Shaped[np.ndarray, "n ..."]:
    return np.concatenate(list(batches))[:length]
