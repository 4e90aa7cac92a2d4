r"""The whole steps of training and evaluation, here and in PyTorch, in turns.

    python benchmarks/train_step.py [--datasets celeba] [--quantizers vq sparse_lattice] \
        [--steps train] [--batch-size 8] [--image-size 148] [--repeats=7] \
        [--output=results/benchmarks.json]

Needs PyTorch: pip install "torch>=2.6". Both sides get the same random images, uint8 and on the
device already. A training step scales them, runs network and quantizer forward and backward, and
takes a step of Adam; llvq also returns the losses' parts and the gradient's norm. On a GPU it is
timed besides with as many steps a call as the config says, of one batch that the GPU holds. An
evaluation step is the forward pass, the mean squared error and the quantizer's loss: metrics that
PyTorch has no counterpart of (PSNR, SSIM, counting codes) are left out. PyTorch's model is in
benchmarks/torch_model.py: channels-last, Adam fused, cuDNN told to search the fastest algorithm.
"network alone" is llvq's step (float32) with nothing in the quantizer's place: what quantizing
costs. All of them run with freed memory kept, as main.py does (llvq/host_memory.py).

On a CPU PyTorch runs eagerly, and the default sizes are what one can do: FashionMNIST's batch of
64, CelebA's images by 8, and FFHQ's network on 256×256 by 8. On a GPU they are the configs', and
PyTorch is also compiled (torch.compile), in bfloat16 (AMP), and both; llvq also in bfloat16.
Float32 convolutions may use TF32 there, on both sides, as is the default of both.

Memory is what a step takes with parameters, optimizer and images: of llvq XLA's plan, of PyTorch
the most that its allocator held.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

# PyTorch lives on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from benchmarks import measure
from benchmarks.measure import Case, Contender
from llvq import config as configuration
from llvq.errors import UserError
from llvq.models.vqvae import VQVAE
from llvq.quantizers import QUANTIZERS
from llvq.runtime import host_memory, sharding
from llvq.training import train_state
from llvq.training.train_state import TrainState
from llvq.training.train_step import make_train_step, scale_images

# (images a step, their height and width) on a CPU.
ON_CPU = {"fashion_mnist": (64, 28), "celeba": (8, 148), "ffhq1024": (8, 256)}
DATASETS = tuple(ON_CPU)
STEPS = ("train", "evaluate")

# Arguments of `prepare_torch`, by the contender's name.
_EAGER = {"PyTorch": {"amp": False, "compiled": False}}
_ON_GPU = {
    "PyTorch compiled": {"amp": False, "compiled": True},
    "PyTorch bfloat16": {"amp": True, "compiled": False},
    "PyTorch bfloat16 compiled": {"amp": True, "compiled": True},
}


def get_config(dataset: str, quantizer: str) -> Any:
    """The paper's recipe."""
    return importlib.import_module(f"configs.{dataset}").get_config(quantizer)


def random_images(config: Any) -> np.ndarray:
    """A batch as the config says."""
    shape = (config.batch_size, *config.model.image_shape)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_evaluate_step(
    graphdef: nnx.GraphDef[VQVAE],
    value_range: tuple[float, float],
    param_dtype: DTypeLike,
    mesh: Mesh,
) -> Callable[..., Any]:
    """The jitted reconstruction and quantizer loss of a state on images, uint8."""

    @functools.partial(jax.jit, compiler_options=sharding.compiler_options(mesh))
    def evaluate_step(state: TrainState, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state.params, state.statistics)
        targets = scale_images(images, value_range, param_dtype)
        outputs, _, losses = model(targets)
        return jnp.mean((outputs.astype(param_dtype) - targets) ** 2), losses["quantizer_loss"]

    return evaluate_step


class _Nothing(nnx.Module):
    """In a quantizer's place: latents pass as they are."""

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim

    def __call__(
        self, latents: jax.Array, **_: Any
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        codes = jnp.zeros(latents.shape[:-1], jnp.int32)
        return latents, codes, {"quantizer_loss": jnp.zeros((), latents.dtype)}


def prepare_llvq(
    config: Any, step: str, *, quantizes: bool = True, steps_per_call: int = 1
) -> Contender:
    """The step of a config on the first device, or that of the network alone.

    Only of training can a call take several steps.
    """
    _, param_dtype = train_state.DTYPES[config.compute_dtype]
    value_range = config.model.value_range
    mesh = sharding.make_mesh(jax.devices()[:1])
    optimizer = optax.adam(config.learning_rate)
    model = train_state.create_model(
        config.model, config.quantizer, config.compute_dtype, config.seed
    )
    if not quantizes:
        nothing: Any = _Nothing(config.model.latent_dim)
        model.quantizer = nothing
    graphdef, state = train_state.create_train_state(model, optimizer)
    state = sharding.replicate(state, mesh)
    images = sharding.to_devices(random_images(config), mesh)
    inputs: tuple[jax.Array, ...] = (images,)
    is_training, several = step == "train", steps_per_call > 1
    take_step: Any
    if is_training:
        take_step, _ = make_train_step(
            graphdef, optimizer, value_range, param_dtype, mesh, several=several
        )
        if several:
            index = np.tile(np.arange(len(images), dtype=np.int32), (steps_per_call, 1))
            inputs += (jax.device_put(index, sharding.steps_sharded(mesh)),)
    else:
        take_step = make_evaluate_step(graphdef, value_range, param_dtype, mesh)
    compiled = take_step.lower(state, *inputs).compile()
    is_cpu = jax.default_backend() == "cpu"

    def run(num_calls: int) -> None:
        nonlocal state
        for _ in range(num_calls):
            results = compiled(state, *inputs)
            if is_training:
                state, results = results
            if is_cpu:  # it might take several steps at once
                jax.block_until_ready(results)
        jax.block_until_ready((state, results))

    run(1)
    return Contender(run, measure.compiled_memory(compiled), steps_per_call)


def prepare_torch(config: Any, step: str, *, amp: bool, compiled: bool) -> Contender:
    """The same in PyTorch, on the same kind of device."""
    import torch

    from benchmarks import torch_model

    torch.backends.cudnn.benchmark = True
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.manual_seed(config.seed)
    model = torch_model.create(config.model, config.quantizer)
    model.to(device, memory_format=torch.channels_last).train(step == "train")
    images = torch.from_numpy(random_images(config)).to(device)
    losses = torch_model.make_losses(model, config.model.value_range, amp=amp)
    if compiled:
        losses = torch.compile(losses)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    if step == "train":
        take_step = torch_model.make_train_step(losses, optimizer)
    else:
        take_step = torch_model.make_evaluate_step(losses)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            take_step(images)
        if device == "cuda":
            torch.cuda.synchronize()

    run(2)  # compiles, and cuDNN chooses its algorithms
    moments = [x for of_one in optimizer.state.values() for x in of_one.values()]
    tensors = (images, *model.parameters(), *model.buffers(), *moments)
    return Contender(run, measure.torch_memory(run, tensors))


def _reset_torch() -> None:
    """Gives memory back, and forgets what was compiled: there is a limit to it."""
    import torch

    torch.compiler.reset()
    torch.cuda.empty_cache()


def require_torch() -> None:
    """Raises UserError unless PyTorch is installed and runs where JAX does."""
    if importlib.util.find_spec("torch") is None:
        raise UserError('PyTorch is not installed: pip install "torch>=2.6"')
    import torch

    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        raise UserError(f"JAX runs on {backend}, PyTorch does not: give JAX_PLATFORMS=cpu")
    if backend == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"JAX runs on a GPU that PyTorch {torch.__version__} does not find: install PyTorch "
            "for CUDA, or give JAX_PLATFORMS=cpu"
        )


def _case(dataset: str, quantizer: str, step: str, batch_size: int, image_size: int) -> Case:
    config = get_config(dataset, quantizer)
    is_cpu = jax.default_backend() == "cpu"
    default_batch_size, default_size = (
        ON_CPU[dataset] if is_cpu else (config.batch_size, config.model.image_shape[0])
    )
    config.batch_size = batch_size or default_batch_size
    size = image_size or default_size
    config.model.image_shape = (size, size, config.model.image_shape[-1])
    configuration.validate(config)
    setting = {"data set": dataset, "step": step, "quantizer": quantizer}
    setting |= {"batch": config.batch_size, "image": f"{size}×{size}"}
    contenders: dict[str, Callable[[], Contender]] = {}
    for dtype in ("float32",) if is_cpu else ("float32", "bfloat16"):
        ours = config.copy_and_resolve_references()
        ours.compute_dtype = dtype
        name = "llvq" if dtype == "float32" else f"llvq {dtype}"
        contenders[name] = functools.partial(prepare_llvq, ours, step)
        if config.steps_per_call > 1 and step == "train" and not is_cpu:  # see llvq/feeding.py
            contenders[f"{name}, {config.steps_per_call} steps a call"] = functools.partial(
                prepare_llvq, ours, step, steps_per_call=config.steps_per_call
            )
    contenders["network alone"] = functools.partial(prepare_llvq, config, step, quantizes=False)
    for name, how in (_EAGER if is_cpu else _EAGER | _ON_GPU).items():
        contenders[name] = functools.partial(prepare_torch, config, step, **how)
    return Case(setting, config.batch_size, contenders)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all comparisons can be told."""
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each")
    parser.add_argument(
        "--min-seconds", type=float, default=0.2, help="a run has as many calls as fill this time"
    )
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to keep the figures in")


def check_options(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError unless the options of these names, and the repeats, are above 0."""
    for name in ("repeats", *names):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if not options.min_seconds >= 0:
        raise UserError(f"--min-seconds: {options.min_seconds} must be 0 or more")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    title, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="train_step.py", description=title)
    for name, choices in (("datasets", DATASETS), ("quantizers", QUANTIZERS), ("steps", STEPS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[], help="one or several")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[], help="height and width, one or several"
    )
    add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    try:
        require_torch()
        check_options(options, "batch_size", "image_size")
        all_choices = itertools.product(
            *(options.datasets, options.quantizers, options.steps),
            *(options.batch_size or [0], options.image_size or [0]),
        )
        cases = [_case(*choices) for choices in all_choices]
        packages = ("jax", "flax", "torch")
        measure.record("train_step.py", packages, cases, "images", options, _reset_torch)
    except UserError as error:
        sys.exit(f"train_step.py: {error}")


if __name__ == "__main__":
    main()
