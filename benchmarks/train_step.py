r"""The whole steps of training and evaluation, in llvq and in PyTorch, in turns.

    python benchmarks/train_step.py [--datasets celeba] [--quantizers vq sparse_lattice] \
        [--steps train] [--batch-size 8] [--image-size 148] [--repeats=7] \
        [--output=results/benchmarks.json]

Needs PyTorch: pip install "torch>=2.6". Both sides get the same random images, uint8 and already on
the device. A training step scales them, runs the network and the quantizer forward and backward,
and takes a step of Adam; llvq also returns the parts of the loss and the norm of the gradient. On a
GPU, llvq is also timed with several steps per call, as many as the config says, on one batch that
the GPU holds. An evaluation step is the forward pass, the mean squared error and the quantizer's
loss; metrics without a counterpart in PyTorch (PSNR, SSIM, counting codes) are left out. The step
"metrics" is PSNR and SSIM of a batch in [0, 1]. The steps "encode" and "decode" are the codec's
passes, images on the host to codes on the host, and back. PyTorch has none of these three.

PyTorch's model is in benchmarks/torch_model.py: channels-last, fused Adam, and cuDNN searches for
its fastest algorithms. "network alone" is llvq's step (float32) without the quantizer; the
difference is what quantizing costs. All contenders keep freed memory, as main.py does
(llvq/runtime/host_memory.py).

On a CPU, PyTorch runs eagerly, and the default sizes are what a CPU can do: of images larger than
32×32 it takes 8 per step, of at most 256×256. On a GPU, the sizes are the configs', and PyTorch
also runs compiled (torch.compile), in bfloat16 (AMP), and both; llvq also runs in bfloat16. Float32
convolutions on a GPU may use TF32 on both sides, which is the default of both, but for the
contenders "without TF32". The shares of the memory's and of the arithmetic's speed are the bytes
and operations that XLA counts, over the time, over what a copy and a matrix product reach in the
same process.

Memory is what a step takes, including parameters, optimizer and images: XLA's plan for llvq, and
the most that PyTorch's allocator held.
"""

import argparse
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

# PyTorch uses the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh

from benchmarks import comparison, measure
from benchmarks.measure import Case, Contender
from benchmarks.settings import DATASETS, create_model, get_config
from llvq.config import TrainConfig, parse, to_dict
from llvq.errors import one_line_exit
from llvq.evaluation import metrics
from llvq.models import VQVAE
from llvq.quantizers import QUANTIZERS, QuantizerOutput
from llvq.runtime import host_memory, sharding
from llvq.training import train_state
from llvq.training.objective import Objective, default_weights
from llvq.training.train_state import TrainState
from llvq.training.train_step import make_train_step

STEPS = ("train", "evaluate", "metrics", "encode", "decode")
_IN_PYTORCH = ("train", "evaluate")

# Arguments of `prepare_torch`, by the contender's name.
_EAGER: dict[str, dict[str, bool]] = {"PyTorch": {}}
_ON_GPU = {
    "PyTorch without TF32": {"tf32": False},
    "PyTorch compiled": {"compiled": True},
    "PyTorch bfloat16": {"amp": True},
    "PyTorch bfloat16 compiled": {"amp": True, "compiled": True},
}


def default_sizes(config: TrainConfig) -> tuple[int, int]:
    """Returns (images per step, their height and width) where neither is asked for."""
    size = config.model.image_shape[0]
    if jax.default_backend() != "cpu":
        return config.batch_size, size
    return config.batch_size if size <= 32 else 8, min(size, 256)


def random_images(config: TrainConfig) -> np.ndarray:
    """Makes a batch of the config's size."""
    shape = (config.batch_size, *config.model.image_shape)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_evaluate_step(graphdef: nnx.GraphDef[VQVAE], mesh: Mesh) -> Callable[..., Any]:
    """Makes a jitted function: reconstruction and quantizer loss of a state on images, uint8."""

    @functools.partial(jax.jit, compiler_options=sharding.compiler_options(mesh))
    def evaluate_step(state: TrainState, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state.params, state.statistics)
        _, metrics, _ = Objective(default_weights())(model, images)
        return metrics["reconstruction_loss"], metrics["quantizer_loss"]

    return evaluate_step


class _Nothing(nnx.Module):
    """Passes latents on as they are, in the quantizer's place."""

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim

    def __call__(self, latents: jax.Array, **_: Any) -> QuantizerOutput:
        codes = jnp.zeros(latents.shape[:-1], jnp.int32)
        return QuantizerOutput(latents, codes, jnp.zeros((), latents.dtype), {})


def prepare_llvq(
    config: TrainConfig,
    step: str,
    *,
    quantizes: bool = True,
    steps_per_call: int = 1,
    tf32: bool = True,
) -> Contender:
    """Prepares the step of a config on the first device, or that of the network alone.

    Only calls of training can take several steps.
    """
    precision = jax.default_matmul_precision("default" if tf32 else "highest")
    mesh = sharding.make_mesh(jax.devices()[:1])
    model = create_model(config, mesh)
    if not quantizes:
        nothing: Any = _Nothing(config.model.latent_dim)
        model.quantizer = nothing
    graphdef = nnx.graphdef(model)
    schedule = optax.constant_schedule(config.learning_rate)
    optimizer = optax.adam(schedule)
    state = sharding.replicate(train_state.create_train_state(model, optimizer), mesh)
    images = sharding.to_devices(random_images(config), mesh)
    if step == "evaluate":
        evaluate_step: Any = make_evaluate_step(graphdef, mesh)
        with precision:
            compiled = evaluate_step.lower(state, images).compile()
        run = measure.calls(functools.partial(compiled, state, images))
    else:
        inputs: tuple[jax.Array, ...] = (images,)
        several = steps_per_call > 1
        if several:
            index = np.tile(np.arange(len(images), dtype=np.int32), (steps_per_call, 1))
            inputs += (jax.device_put(index, sharding.steps_sharded(mesh)),)
        train_step: Any = make_train_step(
            graphdef, Objective(default_weights()), optimizer, schedule, mesh, several=several
        )[0]
        with precision:
            compiled = train_step.lower(state, *inputs).compile()
        states = [state]

        def take_step() -> Any:
            states[0], results = compiled(states[0], *inputs)
            return results

        run = measure.calls(take_step)
    run(1)
    arithmetic = "tf32" if tf32 else "float32"
    if config.compute_dtype == "bfloat16":
        arithmetic = "bfloat16"
    work = measure.work(compiled, arithmetic)
    return Contender(run, measure.compiled_memory(compiled), steps_per_call, work)


def prepare_metrics(config: TrainConfig) -> Contender:
    """Prepares PSNR and SSIM of random images and others."""

    @functools.partial(jax.jit, compiler_options=sharding.compiler_options(sharding.make_mesh()))
    def measure_images(originals: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
        return metrics.psnr(originals, others), metrics.ssim(originals, others)

    originals = jnp.asarray(random_images(config), jnp.float32) / 255.0
    compiled = measure_images.lower(originals, originals).compile()
    run = measure.calls(functools.partial(compiled, originals, 1.0 - originals))
    run(1)
    return Contender(run, measure.compiled_memory(compiled), work=measure.work(compiled, "float32"))


def prepare_codec(config: TrainConfig, step: str) -> Contender:
    """Prepares the codec's passes over a batch; they choose how many images go at a time."""
    from llvq.codec.passes import Passes  # needs constriction

    model = create_model(config)
    model.value_range = config.model.value_range
    passes = Passes(model, jax.devices()[:1])
    images = random_images(config)
    codes = passes.codes(images)
    convert = passes.codes if step == "encode" else passes.images
    run = measure.calls(functools.partial(convert, images if step == "encode" else codes))
    run(1)
    return Contender(run, None)


def prepare(config: TrainConfig, step: str) -> Contender:
    """Prepares any step, in llvq."""
    if step in _IN_PYTORCH:
        return prepare_llvq(config, step)
    return prepare_metrics(config) if step == "metrics" else prepare_codec(config, step)


def prepare_torch(
    config: TrainConfig, step: str, *, amp: bool = False, compiled: bool = False, tf32: bool = True
) -> Contender:
    """Prepares the same in PyTorch, on the same kind of device."""
    import torch

    from benchmarks import torch_model

    torch.manual_seed(config.seed)
    model = torch_model.create(config.architecture)
    model.to(measure.torch_device(), memory_format=torch.channels_last).train(step == "train")
    images = torch.from_numpy(random_images(config)).to(measure.torch_device())
    losses = torch_model.make_losses(model, config.model.value_range, amp=amp)
    if compiled:
        losses = torch.compile(losses)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    if step == "train":
        take_step = torch_model.make_train_step(losses, optimizer)
    else:
        take_step = torch_model.make_evaluate_step(losses)

    def take_step_so() -> None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            take_step(images)

    run = measure.torch_calls(take_step_so)
    run(2)  # compiles, and cuDNN chooses its algorithms
    moments = [x for per_parameter in optimizer.state.values() for x in per_parameter.values()]
    tensors = (images, *model.parameters(), *model.buffers(), *moments)
    return Contender(run, measure.torch_memory(run, tensors))


def _reset_torch() -> None:
    """Frees memory, and forgets what was compiled, of which PyTorch keeps a limited number."""
    import torch

    torch.compiler.reset()
    torch.cuda.empty_cache()


def _case(dataset: str, quantizer: str, step: str, batch_size: int, image_size: int) -> Case:
    from benchmarks import torch_model

    default_batch_size, default_size = default_sizes(get_config(dataset, quantizer))
    size = image_size or default_size
    config = get_config(
        dataset, quantizer, batch_size=batch_size or default_batch_size, image_size=size
    )
    setting: dict[str, Any] = {"data set": dataset, "step": step, "quantizer": quantizer}
    setting |= {"batch": config.batch_size, "image": f"{size}×{size}"}
    is_cpu = jax.default_backend() == "cpu"
    contenders: dict[str, Callable[[], Contender]] = {}
    if step not in _IN_PYTORCH:
        contenders["llvq"] = functools.partial(prepare, config, step)
        return Case(setting, config.batch_size, contenders)
    for dtype in ("float32",) if is_cpu else ("float32", "bfloat16"):
        ours = parse({**to_dict(config), "compute_dtype": dtype})
        name = "llvq" if dtype == "float32" else f"llvq {dtype}"
        contenders[name] = functools.partial(prepare_llvq, ours, step)
        if dtype == "float32" and not is_cpu:
            contenders["llvq without TF32"] = functools.partial(
                prepare_llvq, ours, step, tf32=False
            )
        if config.steps_per_call > 1 and step == "train" and not is_cpu:
            contenders[f"{name}, {config.steps_per_call} steps per call"] = functools.partial(
                prepare_llvq, ours, step, steps_per_call=config.steps_per_call
            )
    contenders["network alone"] = functools.partial(prepare_llvq, config, step, quantizes=False)
    if quantizer in torch_model.QUANTIZERS:
        for name, how in (_EAGER if is_cpu else _EAGER | _ON_GPU).items():
            contenders[name] = functools.partial(prepare_torch, config, step, **how)
    return Case(setting, config.batch_size, contenders)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = comparison.make_parser("train_step.py", __doc__)
    for name, choices in (("datasets", DATASETS), ("quantizers", QUANTIZERS), ("steps", STEPS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[], help="one or several")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[], help="height and width, one or several"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    with one_line_exit("train_step.py"):
        comparison.require_torch()
        comparison.check_options(options, "batch_size", "image_size")
        batch_sizes, image_sizes = options.batch_size or [0], options.image_size or [0]
        cases = [
            _case(dataset, quantizer, step, batch_size, image_size)
            for dataset, quantizer, step, batch_size, image_size in itertools.product(
                options.datasets, options.quantizers, options.steps, batch_sizes, image_sizes
            )
        ]
        packages = ("jax", "flax", "torch")
        comparison.record(
            "train_step.py", packages, cases, "images", options, _reset_torch, measure.ceilings
        )


if __name__ == "__main__":
    main()
