"""One step of training, as a pure function on the train state."""

from collections.abc import Callable

import jax
import optax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llvq.models import VQVAE
from llvq.runtime import sharding
from llvq.training import streams, train_state
from llvq.training.train_state import OPTIMIZER, TrainState, Tree

Metrics = dict[str, Float[Array, "*steps"]]
# Takes (state, images), or (state, all images, index) if it takes several steps: see
# `make_train_step`.
Step = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    graphdef: nnx.GraphDef[VQVAE],
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int = 0,
    warmup_steps: float = 0,
    several: bool = False,
) -> tuple[Step, Step]:
    """The jitted steps of a run: (train_step, statistics_step).

    Both map (state, images) to (new state, metrics), with images uint8 split over the mesh, the
    state replicated and donated. `train_step` minimises reconstruction loss + quantizer loss;
    `statistics_step` does what is left of that where the learning rate is 0: without a backward
    pass, only the quantizer's statistics move.

    With `several` both take several steps in one call, and map (state, all images, index) to
    (new state, metrics [steps]): index [steps, batch], split over the mesh, says which of all
    images, replicated, belong to each step.

    Args:
      graphdef: the model's structure (see `train_state.split`), fitted to the mesh.
      schedule: maps `state.step` to the learning rate.
      mesh: the devices.
      seed: of the training keys. A step's key depends on the seed and the step alone.
      warmup_steps: over which the weight of the quantizer's loss rises from 0 to 1.
      several: whether a call takes several steps.
    """

    def loss_fn(
        params: Tree, statistics: Tree, step: Array, images: Array
    ) -> tuple[Array, tuple[Metrics, Tree, Tree]]:
        """(loss, (metrics, params, statistics)), the last two as the forward pass leaves them."""
        model = nnx.merge(graphdef, params, statistics)
        targets = model.to_floats(model.pack(images))
        key = jax.random.fold_in(streams.key(seed, streams.TRAINING), step)
        reconstructions, _, quantizer_losses = model(targets, train=True, key=key)
        reconstructions = reconstructions.astype(targets.dtype)
        reconstruction_loss = jnp.mean((reconstructions - targets) ** 2)
        if warmup_steps:
            weight = jnp.minimum(step / warmup_steps, 1).astype(targets.dtype)
            quantizer_losses["quantizer_loss"] *= weight
            quantizer_losses["quantizer_loss_weight"] = weight
        loss = reconstruction_loss + quantizer_losses["quantizer_loss"]
        metrics = {"loss": loss, "reconstruction_loss": reconstruction_loss, **quantizer_losses}
        _, params, statistics = train_state.split(model)
        return loss, (metrics, params, statistics)

    def train_step(state: TrainState, images: Array) -> tuple[TrainState, Metrics]:
        grads, (metrics, params, statistics) = jax.grad(loss_fn, has_aux=True)(
            state.params, state.statistics, state.step, images
        )
        rate = jnp.asarray(schedule(state.step))
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
        updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
        params = optax.apply_updates(params, updates)
        metrics |= {"gradient_norm": optax.tree.norm(grads), "learning_rate": rate}
        return TrainState(state.step + 1, params, statistics, opt_state), metrics

    def statistics_step(state: TrainState, images: Array) -> tuple[TrainState, Metrics]:
        _, (metrics, params, statistics) = loss_fn(
            state.params, state.statistics, state.step, images
        )
        metrics["learning_rate"] = jnp.asarray(schedule(state.step))
        return TrainState(state.step + 1, params, statistics, state.opt_state), metrics

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
