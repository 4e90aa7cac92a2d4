"""The state of a training run: one pytree of plain arrays."""

from typing import Any

import jax
import optax
from flax import struct
from jax import numpy as jnp
from jaxtyping import Array, Int

from llvq.models import VQVAE
from llvq.models.factory import Tree, num_parameters, split


class TrainState(struct.PyTreeNode):
    """Attributes:
    step: how many batches have been trained on.
    params: nested dicts of arrays that gradients train.
    statistics: nested dicts of arrays that are learned without gradients (the EMA codebook).
    opt_state: the optimizer's.
    averages: the moving averages of `params`, if the run keeps them; else empty.
    objective: what the objective learns: nothing, for the losses there are.
    """

    step: Int[Array, ""]
    params: Tree
    statistics: Tree
    opt_state: optax.OptState
    averages: Tree = struct.field(default_factory=dict)
    objective: Tree = struct.field(default_factory=dict)

    @property
    def best_params(self) -> Tree:
        """What validation, evaluation and exports use: the averages, if there are any."""
        return self.averages or self.params


def create_train_state(
    model: VQVAE, optimizer: optax.GradientTransformation, *, keeps_averages: bool = False
) -> TrainState:
    """Makes the state of a run that begins with a model.

    Args:
      model: of the first parameters.
      optimizer: of the run.
      keeps_averages: whether the run keeps moving averages of the parameters.
    """
    _, params, statistics = split(model)
    # A copy, because a step reuses the memory of the state that it is given.
    averages = jax.tree.map(jnp.copy, params) if keeps_averages else {}
    return TrainState(
        jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params), averages
    )


def num_quantizer_parameters(state: TrainState) -> int:
    """Counts the quantizer's numbers, statistics and frozen coefficients included."""
    return num_parameters([tree.get("quantizer", {}) for tree in (state.params, state.statistics)])


def parts(state: Any) -> dict[str, Any]:
    """Returns the fields of a state that hold arrays: what a checkpoint keeps of it."""
    return {name: tree for name, tree in vars(state).items() if jax.tree.leaves(tree)}
