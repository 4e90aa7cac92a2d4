"""CelebA: the central 148×148 pixels of each image.

    python main.py --config=configs/celeba.py:sparse_lattice --workdir=runs/celeba

No run on the real data has been recorded yet, so there are no times and no results here.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """See configs/default.py for the argument, llvq/config.py for the fields."""
    config = default.get_config(argument)
    config.dataset.name = "celeba"
    config.model.image_shape = (148, 148, 3)
    config.eval_every_steps = 636  # a quarter of an epoch
    config.checkpoint_every_steps = 636
    return config
