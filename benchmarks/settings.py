"""The data sets, configs and models that the benchmarks measure."""

import importlib
import importlib.util
import pathlib
import sys
import types
from typing import Any

from jax.sharding import Mesh

from llvq.config import TrainConfig, parse
from llvq.models import VQVAE, factory
from llvq.training.objective import Objective

_FILES = (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
DATASETS = tuple(sorted({path.stem for path in _FILES} - {"__init__", "default"}))


class _Fields(dict):
    """The part of ml_collections.ConfigDict that the files of configs/ use."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(
            {name: _Fields(x) if isinstance(x, dict) else x for name, x in fields.items()}
        )

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


# A machine with a GPU may lack ml_collections.
if importlib.util.find_spec("ml_collections") is None:
    sys.modules["ml_collections"] = types.ModuleType("ml_collections")
    vars(sys.modules["ml_collections"])["ConfigDict"] = _Fields


def get_config(
    dataset: str,
    quantizer: str,
    *,
    batch_size: int = 0,
    image_size: int = 0,
    compute_dtype: str = "float32",
    options: dict[str, Any] | None = None,
) -> TrainConfig:
    """Returns the config of the paper's recipe.

    Args:
      dataset: of DATASETS.
      quantizer: of llvq.quantizers.QUANTIZERS.
      batch_size: images per step, if above 0.
      image_size: height and width of the images, if above 0.
      compute_dtype: of the convolutions' arithmetic.
      options: of the quantizer, where they are not the defaults.

    Raises:
      UserError: if a run with this config is impossible.
    """
    config = importlib.import_module(f"configs.{dataset}").get_config(f"{quantizer},paper")
    config.compute_dtype = compute_dtype
    if batch_size:
        config.batch_size = batch_size
    if image_size:
        config.model.image_shape = (image_size, image_size, config.model.image_shape[-1])
    config.quantizer.update(options or {})
    return parse(config)


def objective(config: TrainConfig) -> Objective:
    """Returns what a config's run minimises."""
    return Objective(config.loss, config.loss_options)


def create_model(config: TrainConfig, mesh: Mesh | None = None) -> VQVAE:
    """Initializes a config's model, in the form that suits a mesh if there is one."""
    model = factory.create_model(config.architecture, config.seed)
    if mesh is not None:
        factory.fit_to_mesh(model, mesh, config.model.image_shape)
    return model


def abstract_model(config: TrainConfig, mesh: Mesh | None = None) -> VQVAE:
    """Makes the model of `create_model` with shapes instead of arrays."""
    model = factory.abstract_model(config.architecture)
    if mesh is not None:
        factory.fit_to_mesh(model, mesh, config.model.image_shape)
    return model
