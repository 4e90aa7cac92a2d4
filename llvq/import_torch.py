"""The authors' released PyTorch weights as parameters of this project's modules.

Their state dicts name the layers `_encoder.N…`, `_decoder.N…` and `_quantizer…`; convolution
weights are [out, in, h, w], transposed ones [in, out, h, w].
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from llvq.errors import UserError
from llvq.train_state import Tree

_QUANTIZER_NAMES = {
    "_quantizer.ema_w": "ema_sum",
    "_quantizer.ema_cluster_size": "cluster_size",
}


def conv_kernel(weight: Float[np.ndarray, "out in h w"]) -> Float[np.ndarray, "h w in out"]:
    """A convolution's weight in Flax's layout."""
    return weight.transpose(2, 3, 1, 0)


def conv_transpose_kernel(
    weight: Float[np.ndarray, "in out h w"],
) -> Float[np.ndarray, "h w in out"]:
    """A transposed convolution's weight in Flax's layout, which does not mirror the kernel."""
    return weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)


def _layer_path(name: str, num_steps: int, num_blocks: int) -> tuple[Any, ...]:
    """Where a tensor of `_encoder` or `_decoder` goes, but for the last key, e.g. ("mix",)."""
    match = re.fullmatch(r"_(encoder|decoder)\.(\d+)\.(?:resblock\.)?(\d)\.(?:weight|bias)", name)
    if match is None:
        raise UserError(f"tensor {name!r} is not of an LL-VQ-VAE network")
    part, index, inner = match[1], int(match[2]), int(match[3])
    if part == "encoder" and index < num_steps:
        return part, "downsample", index
    index -= num_steps if part == "encoder" else 0
    if index == 0:
        return part, "mix"
    if index <= num_blocks:
        return part, "residual_blocks", index - 1, "conv3x3" if inner == 0 else "conv1x1"
    if part == "encoder":
        return part, "project"
    return part, "upsample", index - num_blocks - 2


def parameters_from_state_dict(
    tensors: Mapping[str, Float[np.ndarray, "..."]],
) -> tuple[Tree, Tree]:
    """(params, statistics) of a model from a state dict of the authors' program.

    Also takes its gradients, or any other tensors under the same names.

    Raises:
      UserError: if a tensor is not one of theirs.
    """
    is_ema = "_quantizer.ema_w" in tensors
    num_steps = sum(
        name.startswith("_encoder.") and weight.shape[2:] == (4, 4)
        for name, weight in tensors.items()
        if name.endswith(".weight")
    )
    num_blocks = sum("_encoder" in name and "resblock.0" in name for name in tensors)
    params: Tree = {}
    statistics: Tree = {}
    for name, tensor in tensors.items():
        if name.startswith("_quantizer."):
            is_lattice = tensor.shape[0] == 1
            key = _QUANTIZER_NAMES.get(name, "basis" if is_lattice else "codebook")
            tree = statistics if is_ema else params
            tree.setdefault("quantizer", {})[key] = tensor[0] if is_lattice else tensor
            continue
        node = params
        path = _layer_path(name, num_steps, num_blocks)
        for step in path:
            node = node.setdefault(step, {})
        if name.endswith("bias"):
            node["bias"] = tensor
        else:
            to_kernel = conv_transpose_kernel if "upsample" in path else conv_kernel
            node["kernel"] = to_kernel(tensor)
    return params, statistics
