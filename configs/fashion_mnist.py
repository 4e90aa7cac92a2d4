"""FashionMNIST."""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """See configs/default.py for the argument and the fields."""
    config = default.get_config(argument)
    config.dataset.name = "fashion_mnist"
    config.model.image_shape = (28, 28, 1)
    config.model.value_range = (-0.5, 0.5)
    config.model.hidden_dims = (64,)
    config.eval_every_steps = 215
    config.checkpoint_every_steps = 215
    return config
