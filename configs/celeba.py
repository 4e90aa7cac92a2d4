"""CelebA, the centre of each image."""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """See configs/default.py for the argument and the fields."""
    config = default.get_config(argument)
    config.dataset.name = "celeba"
    config.model.image_shape = (148, 148, 3)
    config.model.value_range = (0.0, 1.0)
    config.model.hidden_dims = (64,)
    config.eval_every_steps = 636  # a quarter of an epoch
    config.checkpoint_every_steps = 636
    return config
