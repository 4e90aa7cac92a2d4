r"""The quantizers alone, forward and backward, next to vector-quantize-pytorch, in turns.

    python benchmarks/quantizer.py [--quantizers vq sparse_lattice] \
        [--codebook-sizes 64 1024 65536] [--vectors 2097152] [--repeats=7] \
        [--output=results/benchmarks.json]

Needs PyTorch and the package: pip install "torch>=2.6" vector-quantize-pytorch. A step takes random
vectors, as 64 images would have them, and the gradient of a loss with respect to the quantized
vectors. It returns quantized vectors, codes, losses, the gradients of vectors and parameters, and
the updated statistics. All of it is in float32; PyTorch runs eagerly, llvq compiled.

Each quantizer is compared with its counterpart in the package, set to the straight-through
estimator (its default, the rotation trick, costs more) and the same EMA decay. The paper's
quantizers are also compared with this project's PyTorch versions (benchmarks/torch_model.py). K is
the number of codes, or for residual_vq that of each of its four stages. Vectors have 64 numbers, or
as many as the quantizer's codes. For a lattice, --codebook-sizes only sets the initial basis.
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

from benchmarks import comparison, measure
from benchmarks.measure import Case, Contender
from llvq import quantizers
from llvq.errors import UserError, one_line_exit
from llvq.quantizers import QUANTIZERS
from llvq.quantizers.registry import complete, resolve_latent_dim
from llvq.runtime import host_memory

LATENT_DIM = 64
PACKAGE = "vector-quantize-pytorch"
_LEARNED = {"commitment_weight": 0.25, "rotation_trick": False, "decay": 0.99}
_BY_GRADIENT = {"ema_update": False, "learnable_codebook": True}

# Each quantizer's counterpart in the package, from the package and the quantizer's options.
_COUNTERPARTS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "vq": lambda package, options: package.VectorQuantize(
        LATENT_DIM, options["codebook_size"], **_LEARNED, **_BY_GRADIENT
    ),
    "vq_ema": lambda package, options: package.VectorQuantize(
        LATENT_DIM, options["codebook_size"], **_LEARNED
    ),
    "fsq": lambda package, options: package.FSQ(options["levels"]),
    "lfq": lambda package, options: package.LFQ(
        codebook_size=options["codebook_size"], commitment_loss_weight=0.25
    ),
    "bsq": lambda package, options: package.LFQ(
        codebook_size=2 ** options["num_bits"], spherical=True
    ),
    "simvq": lambda package, options: package.SimVQ(
        LATENT_DIM, options["codebook_size"], rotation_trick=False
    ),
    "residual_vq": lambda package, options: package.ResidualVQ(
        dim=LATENT_DIM,
        num_quantizers=options["depth"],
        codebook_size=options["codebook_size"],
        **_LEARNED,
    ),
}
_MOST_IMAGES = 64  # XLA's sums over the vectors of a single image are slow on a CPU


def fsq_levels(codebook_size: int) -> list[int]:
    """At most 8 levels per entry of a code: powers of two whose product is codebook_size."""
    bits = round(math.log2(codebook_size))
    smaller, num_larger = divmod(bits, math.ceil(bits / 3))
    num_smaller = math.ceil(bits / 3) - num_larger
    return [2 ** (smaller + 1)] * num_larger + [2**smaller] * num_smaller


def _options(quantizer: str, codebook_size: int) -> dict[str, Any]:
    """Returns the options of a quantizer with this number of codes."""
    options = complete(quantizer, {})
    wanted = {
        "codebook_size": codebook_size,
        "levels": fsq_levels(codebook_size),
        "num_bits": round(math.log2(codebook_size)),
        "dropout": False,
        "initialization": "random",
        "restart_threshold": 0.0,
    }
    return options | {name: value for name, value in wanted.items() if name in options}


def _random(num_vectors: int, latent_dim: int) -> np.ndarray:
    """Vectors, and the gradient of their quantized vectors: [2, images, per image, latent_dim]."""
    num_images = math.gcd(num_vectors, _MOST_IMAGES)
    shape = 2, num_images, num_vectors // num_images, latent_dim
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def prepare_llvq(quantizer: str, codebook_size: int, num_vectors: int) -> Contender:
    """Prepares a quantizer of this project."""
    model = quantizers.create(quantizer, 0, rngs=nnx.Rngs(0), **_options(quantizer, codebook_size))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, statistics = map(nnx.to_pure_dict, states)
    vectors, gradient = map(jnp.asarray, _random(num_vectors, model.latent_dim))

    @jax.jit
    def step(
        params: Any, statistics: Any, vectors: jax.Array, gradient: jax.Array, key: jax.Array
    ) -> Any:
        def objective(params: Any, vectors: jax.Array) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, statistics)
            output = model(vectors, train=True, key=key)
            after = nnx.state(model, nnx.Not(nnx.Param))
            total = output.loss + jnp.vdot(output.quantized, gradient)
            return total, (output, nnx.to_pure_dict(after))

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, vectors)

    arguments = (params, statistics, vectors, gradient, jax.random.key(0))
    compiled = step.lower(*arguments).compile()
    run = measure.calls(functools.partial(compiled, *arguments))
    run(1)
    return Contender(run, measure.compiled_memory(compiled))


def prepare_torch(kind: str, quantizer: str, codebook_size: int, num_vectors: int) -> Contender:
    """Prepares a quantizer of the package, or the same quantizer in this project's PyTorch."""
    import torch

    from benchmarks import torch_model

    device = measure.torch_device()
    torch.manual_seed(0)
    options = _options(quantizer, codebook_size)
    if kind == PACKAGE:
        import vector_quantize_pytorch

        model = _COUNTERPARTS[quantizer](vector_quantize_pytorch, options)
        # Otherwise it takes an array of four axes for an image with channels first.
        model.channel_first = False
    else:
        model = torch_model.create_quantizer(quantizer, LATENT_DIM, options)
    model = model.to(device).train()
    latent_dim = resolve_latent_dim(quantizer, options, 0)
    vectors, gradient = (torch.from_numpy(x).to(device) for x in _random(num_vectors, latent_dim))
    vectors.requires_grad_()

    def take_step() -> None:
        quantized, _, *losses = model(vectors)
        losses = [loss.sum() for loss in losses if loss.requires_grad]
        torch.autograd.backward([quantized, *losses], [gradient, *[None] * len(losses)])
        model.zero_grad()
        vectors.grad = None

    run = measure.torch_calls(take_step)
    run(1)
    tensors = (vectors, gradient, *model.parameters(), *model.buffers())
    return Contender(run, measure.torch_memory(run, tensors))


def _case(quantizer: str, codebook_size: int, num_vectors: int, package: Sequence[str]) -> Case:
    from benchmarks import torch_model

    contenders: dict[str, Callable[[], Contender]] = {
        "llvq": functools.partial(prepare_llvq, quantizer, codebook_size, num_vectors)
    }
    known = {"PyTorch": torch_model.QUANTIZERS, PACKAGE: _COUNTERPARTS}
    for kind in ("PyTorch", *package):
        if quantizer in known[kind]:
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
    parser = comparison.make_parser("quantizer.py", __doc__)
    parser.add_argument(
        "--quantizers", nargs="+", choices=list(QUANTIZERS), default=list(QUANTIZERS)
    )
    parser.add_argument(
        "--codebook-sizes", type=int, nargs="+", default=[64, 1024, 8192, 65536], help="powers of 2"
    )
    parser.add_argument(
        "--vectors", type=int, nargs="+", default=[2048] if is_cpu else [2**17, 2**21]
    )
    parser.add_argument("--without-package", action="store_true", help=f"leave out {PACKAGE}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    with one_line_exit("quantizer.py"):
        comparison.require_torch()
        package = () if options.without_package else (PACKAGE,)
        if package and importlib.util.find_spec("vector_quantize_pytorch") is None:
            raise UserError(
                f"{PACKAGE} is not installed: pip install {PACKAGE}, or leave it out with "
                "--without-package"
            )
        comparison.check_options(options, "vectors")
        for size in options.codebook_sizes:
            if not 4 <= size <= 2**24 or size.bit_count() != 1:
                raise UserError(
                    f"--codebook-sizes: {size} must be a power of 2 from 4 to {2**24}, for LFQ"
                )
        cases = [
            _case(quantizer, codebook_size, num_vectors, package)
            for quantizer, codebook_size, num_vectors in itertools.product(
                options.quantizers, options.codebook_sizes, options.vectors
            )
        ]
        comparison.record(
            "quantizer.py", ("jax", "torch", *package), cases, "vectors", options, _empty_cache
        )


if __name__ == "__main__":
    main()
