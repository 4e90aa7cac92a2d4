"""One step of training, as a pure function on the train state."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llvq.models import VQVAE, factory, streams
from llvq.models.factory import Tree
from llvq.runtime import sharding
from llvq.training.objective import Objective
from llvq.training.train_state import TrainState

Metrics = dict[str, Float[Array, "*steps"]]
# Takes (state, images), or (state, all images, index) if it takes several steps: see
# `make_train_step`.
Step = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    graphdef: nnx.GraphDef[VQVAE],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int = 0,
    warmup_steps: float = 0,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    several: bool = False,
) -> tuple[Step, Step]:
    """Makes the jitted steps of a run: (train_step, statistics_step).

    Both map (state, images) to (new state, metrics), with images uint8 split over the mesh, the
    state replicated and donated. `train_step` minimises the objective; `statistics_step` is the
    cheaper step for a learning rate of 0: without a backward pass, only the quantizer's statistics
    move.

    With `several` both take several steps in one call, and map (state, all images, index) to
    (new state, metrics [steps]): index [steps, batch], split over the mesh, says which of all
    images, replicated, belong to each step.

    Args:
      graphdef: the model's structure (see `factory.split`), fitted to the mesh.
      objective: what is minimised.
      optimizer: maps gradients to updates.
      schedule: maps `state.step` to the learning rate, to be reported.
      mesh: the devices.
      seed: of the training keys. A step's key depends on the seed and the step alone.
      warmup_steps: over which the weight of the quantizer's loss rises from 0 to 1.
      accumulate_steps: into how many parts a batch is divided, whose gradients are added up one
        after the other. Each part updates the quantizer's statistics.
      ema_decay: of the moving averages of the parameters; 0 if there are none.
      several: whether a call takes several steps.
    """

    def loss_fn(
        params: Tree, statistics: Tree, step: Array, part: int, images: Array
    ) -> tuple[Array, tuple[Metrics, Tree, Tree]]:
        """(loss, (metrics, params, statistics)), the last two as the forward pass leaves them."""
        model = nnx.merge(graphdef, params, statistics)
        key = jax.random.fold_in(streams.key(seed, streams.TRAINING), step)
        key = jax.random.fold_in(key, part) if accumulate_steps > 1 else key
        weight = None
        if warmup_steps:
            weight = jnp.minimum(step / warmup_steps, 1).astype(model.param_dtype)
        loss, metrics, _ = objective(model, images, train=True, key=key, quantizer_weight=weight)
        _, params, statistics = factory.split(model)
        return loss, (metrics, params, statistics)

    def gradients(
        params: Tree, statistics: Tree, step: Array, images: Array
    ) -> tuple[Tree, Metrics, Tree, Tree]:
        """(gradients, metrics, params, statistics) of a batch, the first two its parts' means."""
        grad_fn = jax.grad(loss_fn, has_aux=True)
        if accumulate_steps == 1:
            grads, (metrics, params, statistics) = grad_fn(params, statistics, step, 0, images)
            return grads, metrics, params, statistics
        # The images of every part are spread over all devices.
        by_part = images.reshape(-1, accumulate_steps, *images.shape[1:])
        totals: Any = None
        for part in range(accumulate_steps):
            grads, (metrics, params, statistics) = grad_fn(
                params, statistics, step, part, by_part[:, part]
            )
            own = grads, metrics
            totals = own if totals is None else jax.tree.map(jnp.add, totals, own)
            # The barrier keeps the parts apart, so that each reuses the memory of the one before.
            params, statistics, totals = lax.optimization_barrier((params, statistics, totals))
        grads, metrics = jax.tree.map(lambda total: total / accumulate_steps, totals)
        return grads, metrics, params, statistics

    def train_step(state: TrainState, images: Array) -> tuple[TrainState, Metrics]:
        grads, metrics, params, statistics = gradients(
            state.params, state.statistics, state.step, images
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(params, updates)
        averages = state.averages
        if ema_decay:
            # The first averages forget faster, or they would keep the initial parameters.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            averages = optax.incremental_update(params, averages, 1 - decay)
        metrics |= {"gradient_norm": optax.tree.norm(grads)}
        metrics |= {"learning_rate": jnp.asarray(schedule(state.step))}
        state = state.replace(
            step=state.step + 1,
            params=params,
            statistics=statistics,
            opt_state=opt_state,
            averages=averages,
        )
        return state, metrics

    def statistics_step(state: TrainState, images: Array) -> tuple[TrainState, Metrics]:
        _, (metrics, params, statistics) = loss_fn(
            state.params, state.statistics, state.step, 0, images
        )
        metrics["learning_rate"] = jnp.asarray(schedule(state.step))
        return state.replace(step=state.step + 1, params=params, statistics=statistics), metrics

    replicated, images_sharded = sharding.replicated(mesh), sharding.images_sharded(mesh)
    inputs = (replicated, sharding.steps_sharded(mesh)) if several else (images_sharded,)

    def jit(step: Step) -> Step:
        def steps(
            state: TrainState, images: Array, index: Int[Array, "steps batch"]
        ) -> tuple[TrainState, Metrics]:
            def next_step(state: TrainState, index: Array) -> tuple[TrainState, Metrics]:
                return step(state, lax.with_sharding_constraint(images[index], images_sharded))

            return lax.scan(next_step, state, index)

        steps.__name__ = step.__name__  # names the program in a profile
        return jax.jit(
            steps if several else step,
            donate_argnums=0,
            in_shardings=(replicated, *inputs),
            out_shardings=replicated,
            compiler_options=sharding.compiler_options(mesh),
        )

    return jit(train_step), jit(statistics_step)
