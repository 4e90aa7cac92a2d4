"""Turns a checkpoint of the authors' PyTorch program into one of this project.

    python -m llvq.import_torch --checkpoint=vq.ckpt --output=imported/vq
    python main.py --config=configs/fashion_mnist.py:vq --mode=evaluate --checkpoint=imported/vq …

Network and quantizer are recognised from the tensors alone. Their state dicts name the layers
`_encoder.N…`, `_decoder.N…` and `_quantizer…`; convolution weights are [out, in, h, w], transposed
ones [in, out, h, w]. Both lattices are a single row [1, D] and told apart by its size: a sparse
basis starts within ±9.77 (for a codebook size of 512) and grows, a dense one starts within ±1 and
shrinks, so that a mean |b| of 1 lies between them.

Tensors do not tell everything. Height and width do not matter to the network; the value range is
the authors' for as many channels, unless --value_range says another; the data set is named by the
config used for evaluation. The only option of a quantizer that tensors tell is codebook_size; the
others are taken to be the defaults, which are the authors' values.

Reading the files needs PyTorch, the optional extra `torch`: pip install "torch>=2.6".
"""

import argparse
import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import numpy as jnp
from jaxtyping import Float

from llvq import checkpointing
from llvq.checkpointing.saved_config import AUTHORS_VALUE_RANGES, from_saved
from llvq.errors import UserError, first_line, one_line_exit
from llvq.fields import flatten
from llvq.models import factory
from llvq.models.factory import Tree
from llvq.quantizers.registry import complete
from llvq.training.train_state import TrainState

_SMALLEST_SPARSE_BASIS = 1.0  # in the mean of |b|; see above

_EMBEDDING = "_quantizer.embedding.weight"
_EMA_NAMES = {
    "_quantizer.ema_w": "ema_sum",
    "_quantizer.ema_cluster_size": "cluster_size",
}

_REMEDY = "name a .ckpt file that the authors of LL-VQ-VAE released or that their program wrote"


def conv_kernel(weight: Float[np.ndarray, "out in h w"]) -> Float[np.ndarray, "h w in out"]:
    """A convolution's weight in Flax's layout."""
    return weight.transpose(2, 3, 1, 0)


def conv_transpose_kernel(
    weight: Float[np.ndarray, "in out h w"],
) -> Float[np.ndarray, "h w in out"]:
    """A transposed convolution's weight in Flax's layout, which does not mirror the kernel."""
    return weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)


def _layers(num_steps: int, num_blocks: int) -> dict[str, tuple[Any, ...]]:
    """Where each layer goes in our trees, by its name in PyTorch, e.g. "_encoder.0.0".

    Args:
      num_steps: how often the network halves the image.
      num_blocks: residual blocks in the encoder, and in the decoder.
    """
    layers: dict[str, tuple[Any, ...]] = {}
    for part, mix in (("encoder", num_steps), ("decoder", 0)):
        layers[f"_{part}.{mix}.0"] = part, "mix"
        for block in range(num_blocks):
            path, name = (part, "residual_blocks", block), f"_{part}.{mix + 1 + block}.resblock"
            layers[f"{name}.0"] = *path, "conv3x3"
            layers[f"{name}.2"] = *path, "conv1x1"
    behind_blocks = num_blocks + 2  # the mixing layer, the blocks, and an activation
    layers[f"_encoder.{num_steps + behind_blocks}.0"] = "encoder", "project"
    for step in range(num_steps):
        layers[f"_encoder.{step}.0"] = "encoder", "downsample", step
        layers[f"_decoder.{behind_blocks + step}.0"] = "decoder", "upsample", step
    return layers


def _downsampling_weights(tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The weights of the encoder's 4×4 convolutions, in order."""
    weights: list[np.ndarray] = []
    while (weight := tensors.get(f"_encoder.{len(weights)}.0.weight")) is not None:
        if weight.shape[2:] != (4, 4):
            break
        weights.append(weight)
    return weights


def _num_residual_blocks(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(
        name.startswith("_encoder.") and name.endswith(".resblock.0.weight") for name in tensors
    )


def parameters_from_state_dict(
    tensors: Mapping[str, Float[np.ndarray, "..."]],
) -> tuple[Tree, Tree]:
    """(params, statistics) of a model from a state dict of the authors' program.

    Also takes its gradients, or any other tensors under the same names.

    Raises:
      UserError: if a tensor is not one of theirs.
    """
    layers = _layers(len(_downsampling_weights(tensors)), _num_residual_blocks(tensors))
    params: Tree = {}
    statistics: Tree = {}
    quantizer: Tree = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if name == _EMBEDDING:
            is_lattice = tensor.shape[0] == 1
            quantizer["basis" if is_lattice else "codebook"] = tensor[0] if is_lattice else tensor
        elif name in _EMA_NAMES:
            quantizer[_EMA_NAMES[name]] = tensor
        elif layer in layers and (kind, tensor.ndim) in (("weight", 4), ("bias", 1)):
            path = layers[layer]
            node = params
            for key in path:
                node = node.setdefault(key, {})
            if kind == "bias":
                node["bias"] = tensor
            else:
                to_kernel = conv_transpose_kernel if "upsample" in path else conv_kernel
                node["kernel"] = to_kernel(tensor)
        else:
            shape = list(tensor.shape)
            raise UserError(f"tensor {name!r} is not of an LL-VQ-VAE network (its shape: {shape})")
    if quantizer:
        (statistics if "ema_sum" in quantizer else params)["quantizer"] = quantizer
    return params, statistics


def _quantizer_config(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The `quantizer` section of a config, its options the defaults where tensors do not tell."""
    embedding = tensors[_EMBEDDING]
    if embedding.shape[0] == 1:
        is_sparse = np.mean(np.abs(embedding)) >= _SMALLEST_SPARSE_BASIS
        name = "sparse_lattice" if is_sparse else "dense_lattice"
        return {"name": name, **complete(name, {})}
    name = "vq" if tensors.keys().isdisjoint(_EMA_NAMES) else "vq_ema"
    return {"name": name, **complete(name, {"codebook_size": embedding.shape[0]})}


def recognise(tensors: Mapping[str, Float[np.ndarray, "..."]]) -> dict[str, Any]:
    """The part of a config that a state dict of the authors' program tells.

    `model.image_shape` is (0, 0, channels): a convolutional network fits every size.

    Raises:
      UserError: if the tensors are not of an LL-VQ-VAE model.
    """
    downsampling = _downsampling_weights(tensors)
    embedding = tensors.get(_EMBEDDING)
    if not downsampling or embedding is None or embedding.ndim != 2:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise UserError(
            f"no LL-VQ-VAE model, which has _encoder.0.0.weight [out, in, 4, 4] and {_EMBEDDING} "
            f"[K, D]; found {found[:100] or 'no tensors'}"
        )
    channels = downsampling[0].shape[1]
    return {
        "model": {
            "image_shape": (0, 0, channels),
            "value_range": AUTHORS_VALUE_RANGES.get(channels, (0.0, 1.0)),
            "latent_activation": "leaky_relu",
            "output_activation": "leaky_relu",
            "hidden_dims": tuple(weight.shape[0] for weight in downsampling),
            "num_residual_blocks": _num_residual_blocks(tensors),
            "latent_dim": embedding.shape[1],
        },
        "quantizer": _quantizer_config(tensors),
    }


def _check_complete(config: dict[str, Any], params: Tree, statistics: Tree) -> None:
    """Raises UserError, naming the first parameter concerned, unless these are a whole model's."""

    def shapes(*trees: Tree) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
            for tree in trees
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    model = factory.abstract_model(from_saved(config).architecture)
    _, *abstract = factory.split(model)
    expected, found = shapes(*abstract), shapes(params, statistics)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            problem = f"has the shape {found[name]}" if name in found else "is missing"
            raise UserError(
                f"{name} {problem}; the other tensors imply "
                f"{expected.get(name, 'no such tensor')} (in this project's names and layouts)"
            )


def _read(path: epath.PathLike) -> tuple[int, dict[str, np.ndarray]]:
    """(step, state dict) of a Lightning checkpoint; runs no code that the file may hold."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            'reading a PyTorch checkpoint needs PyTorch: pip install "torch>=2.6"'
        ) from error
    if torch.__version__ < (2, 6):
        raise UserError(
            f"PyTorch {torch.__version__} can be made to run code in a file that it only loads "
            f'weights from (CVE-2025-32434): pip install "torch>=2.6"'
        )
    try:
        data = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--checkpoint={path} cannot be read: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of what the messages below say, too
            file = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no PyTorch file, or holds more than tensors and plain values (nothing in "
            f"it was run): {_REMEDY}"
        ) from error
    except Exception as error:
        raise UserError(
            f"{path} is damaged or no PyTorch file ({first_line(error)}): {_REMEDY}"
        ) from error
    step = file.get("global_step") if isinstance(file, dict) else None
    if not (isinstance(step, int) and 0 <= step < 2**31) or not isinstance(
        file.get("state_dict"), dict
    ):
        raise UserError(
            f"{path} is no Lightning checkpoint, which has a state_dict and a global_step: "
            f"{_REMEDY}"
        )
    for name, tensor in file["state_dict"].items():
        is_tensor = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        is_named = isinstance(name, str)
        if not is_named or not is_tensor or tensor.dtype != torch.float32 or not tensor.numel():
            found = f"{tensor.dtype} {list(tensor.shape)}" if is_tensor else type(tensor).__name__
            raise UserError(f"{path}: {name} is {found}, not an array of float32: {_REMEDY}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity: {_REMEDY}")
    tensors = {name: tensor.detach().numpy() for name, tensor in file["state_dict"].items()}
    return step, tensors


def import_checkpoint(
    checkpoint: epath.PathLike,
    output: epath.PathLike,
    value_range: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint for inference from a Lightning checkpoint of the authors' program.

    Args:
      checkpoint: the authors' file, of any data set and quantizer. No code in it is run.
      output: the directory to write; must not exist, or be empty.
      value_range: what pixel values 0 … 255 were mapped to; by default the authors' range for as
        many channels: −0.5 to 0.5 for greyscale, 0 to 1 for colour.

    Returns:
      The part of the config that the file tells (see `recognise`).

    Raises:
      UserError: if PyTorch is not installed, the file is not such a checkpoint, or the output
        cannot be written. Then nothing is.
    """
    step, tensors = _read(checkpoint)
    try:
        config = recognise(tensors)
        params, statistics = parameters_from_state_dict(tensors)
        _check_complete(config, params, statistics)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}: {_REMEDY}") from error
    if value_range is not None:
        low, high = value_range
        if not low < high:
            raise UserError(f"--value_range={low} {high} is impossible: the first must be lower")
        config["model"]["value_range"] = [low, high]
    state = TrainState(jnp.asarray(step), params, statistics, opt_state=())
    checkpointing.save_for_inference(output, state, config)
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line."""
    parser = argparse.ArgumentParser(
        prog="llvq.import_torch", description="Imports a checkpoint of the authors' program."
    )
    parser.add_argument("--checkpoint", required=True, help="the authors' .ckpt file")
    parser.add_argument("--output", required=True, help="a new directory, for --mode=evaluate")
    parser.add_argument(
        "--value_range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="what pixel values 0 … 255 were mapped to, if not to the authors' values",
    )
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        config = import_checkpoint(options.checkpoint, options.output, options.value_range)
    sections = {"model": config["model"], "quantizer": config["quantizer"]}
    recognised = (f"{name}={value}" for name, value in flatten(sections).items())
    print(f"{options.output}: {', '.join(recognised)}")


if __name__ == "__main__":
    main()
