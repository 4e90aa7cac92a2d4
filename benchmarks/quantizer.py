r"""The quantizers alone, forward and backward, next to vector-quantize-pytorch, in turns.

    python benchmarks/quantizer.py [--quantizers vq sparse_lattice] \
        [--codebook-sizes 64 1024 65536] [--vectors 2097152] [--repeats=7] \
        [--output=results/benchmarks.json]

Needs PyTorch and the package: pip install "torch>=2.6" vector-quantize-pytorch. A step takes random
vectors of 64 numbers, as 64 images would have them, and the gradient of a loss with respect to the
quantized vectors. It returns quantized vectors, codes, losses, the gradients of vectors and
parameters, and the updated statistics of an EMA. All of it is in float32; PyTorch runs eagerly,
llvq compiled.

Each quantizer is compared with the same in PyTorch (benchmarks/torch_model.py) and with the
package's: VQ and VQ-EMA with its VectorQuantize, told to pass gradients straight through (its
default, the rotation trick, costs more); the lattice with FSQ and LFQ, which need no codebook
either, with as many codes. FSQ and LFQ project the vectors to as many numbers as their codes have,
and back; only LFQ's entropy loss visits all codes. For a lattice, --codebook-sizes only sets the
initial basis.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from benchmarks import figures, measure
from benchmarks.measure import Case, Contender
from llvq import quantizers
from llvq.errors import UserError, one_line_exit
from llvq.quantizers import QUANTIZERS
from llvq.runtime import host_memory

LATENT_DIM = 64
_MOST_IMAGES = 64  # XLA's sums over the vectors of a single image are slow on a CPU

# The classes of the package that a quantizer is compared with.
_PACKAGE = {
    "vq": ("VectorQuantize",),
    "vq_ema": ("VectorQuantize",),
    "sparse_lattice": ("FSQ", "LFQ"),
}


def _options(quantizer: str, codebook_size: int) -> dict[str, Any]:
    options = quantizers.default_options(quantizer)
    return options | {"codebook_size": codebook_size} if "codebook_size" in options else options


def _random(num_vectors: int) -> np.ndarray:
    """Vectors, and the gradient of their quantized vectors: [2, images, per image, LATENT_DIM]."""
    num_images = math.gcd(num_vectors, _MOST_IMAGES)
    shape = 2, num_images, num_vectors // num_images, LATENT_DIM
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def prepare_llvq(quantizer: str, codebook_size: int, num_vectors: int) -> Contender:
    """A quantizer of this project."""
    model = quantizers.create(
        quantizer, LATENT_DIM, rngs=nnx.Rngs(0), **_options(quantizer, codebook_size)
    )
    graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = map(nnx.to_pure_dict, states)
    vectors, gradient = map(jnp.asarray, _random(num_vectors))

    @jax.jit
    def step(params: Any, statistics: Any, vectors: jax.Array, gradient: jax.Array) -> Any:
        def objective(params: Any, vectors: jax.Array) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, statistics)
            quantized, codes, losses = model(vectors, train=True)
            total = losses["quantizer_loss"] + jnp.vdot(quantized, gradient)
            return total, (
                quantized,
                codes,
                losses,
                nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
            )

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, vectors)

    arguments = (params, statistics, vectors, gradient)
    compiled = step.lower(*arguments).compile()
    run = measure.calls(functools.partial(compiled, *arguments))
    run(1)
    return Contender(run, measure.compiled_memory(compiled))


def fsq_levels(codebook_size: int) -> list[int]:
    """At most 8 levels per entry of a code: powers of two whose product is codebook_size."""
    bits = round(math.log2(codebook_size))
    smaller, num_larger = divmod(bits, math.ceil(bits / 3))
    num_smaller = math.ceil(bits / 3) - num_larger
    return [2 ** (smaller + 1)] * num_larger + [2**smaller] * num_smaller


def _create_torch(kind: str, quantizer: str, codebook_size: int) -> Any:
    import vector_quantize_pytorch as package

    from benchmarks import torch_model

    options = _options(quantizer, codebook_size)
    if kind == "VectorQuantize":
        is_ema = quantizer == "vq_ema"
        return package.VectorQuantize(
            LATENT_DIM,
            codebook_size,
            commitment_weight=options["commitment_cost"],
            rotation_trick=False,
            ema_update=is_ema,
            learnable_codebook=not is_ema,
            **({"decay": options["decay"], "eps": options["epsilon"]} if is_ema else {}),
        )
    if kind == "FSQ":
        return package.FSQ(fsq_levels(codebook_size), dim=LATENT_DIM)
    if kind == "LFQ":
        return package.LFQ(dim=LATENT_DIM, codebook_size=codebook_size)
    return torch_model.create_quantizer(quantizer, LATENT_DIM, options)


def prepare_torch(kind: str, quantizer: str, codebook_size: int, num_vectors: int) -> Contender:
    """A quantizer of the package, by the name of its class, or the same quantizer in PyTorch."""
    import torch

    device = measure.torch_device()
    torch.manual_seed(0)
    model = _create_torch(kind, quantizer, codebook_size).to(device).train()
    vectors, gradient = (torch.from_numpy(x).to(device) for x in _random(num_vectors))
    vectors.requires_grad_()

    def take_step() -> None:
        quantized, _, *losses = model(vectors)
        losses = [loss for loss in losses if loss.requires_grad]
        torch.autograd.backward([quantized, *losses], [gradient, *[None] * len(losses)])
        model.zero_grad()
        vectors.grad = None

    run = measure.torch_calls(take_step)
    run(1)
    tensors = (vectors, gradient, *model.parameters(), *model.buffers())
    return Contender(run, measure.torch_memory(run, tensors))


def _case(quantizer: str, codebook_size: int, num_vectors: int) -> Case:
    from benchmarks import torch_model

    contenders: dict[str, Callable[[], Contender]] = {
        "llvq": functools.partial(prepare_llvq, quantizer, codebook_size, num_vectors)
    }
    same = ("PyTorch",) if quantizer in torch_model.QUANTIZERS else ()
    for kind in (*same, *_PACKAGE.get(quantizer, ())):
        contenders[kind] = functools.partial(
            prepare_torch, kind, quantizer, codebook_size, num_vectors
        )
    setting = {"quantizer": quantizer, "K": codebook_size, "vectors": num_vectors}
    return Case(setting, num_vectors, contenders)


def _empty_cache() -> None:
    import torch

    torch.cuda.empty_cache()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    is_cpu = jax.default_backend() == "cpu"
    title, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="quantizer.py", description=title)
    parser.add_argument("--quantizers", nargs="+", choices=list(QUANTIZERS), default=list(_PACKAGE))
    parser.add_argument(
        "--codebook-sizes", type=int, nargs="+", default=[64, 1024, 8192, 65536], help="powers of 2"
    )
    parser.add_argument(
        "--vectors", type=int, nargs="+", default=[2048] if is_cpu else [2**17, 2**21]
    )
    figures.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    with one_line_exit("quantizer.py"):
        figures.require_torch()
        if importlib.util.find_spec("vector_quantize_pytorch") is None:
            raise UserError(
                "vector-quantize-pytorch is not installed: pip install vector-quantize-pytorch"
            )
        figures.check_options(options, "vectors")
        for size in options.codebook_sizes:
            if not 4 <= size <= 2**24 or size.bit_count() != 1:
                raise UserError(
                    f"--codebook-sizes: {size} must be a power of 2 from 4 to {2**24}, for LFQ"
                )
        cases = [
            _case(quantizer, codebook_size, num_vectors)
            for quantizer, codebook_size, num_vectors in itertools.product(
                options.quantizers, options.codebook_sizes, options.vectors
            )
        ]
        packages = ("jax", "torch", "vector-quantize-pytorch")
        figures.record("quantizer.py", packages, cases, "vectors", options, _empty_cache)


if __name__ == "__main__":
    main()
