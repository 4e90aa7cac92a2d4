"""FFHQ-1024.

    python main.py --config=configs/ffhq1024.py:sparse_lattice --workdir=runs/ffhq1024

No run on the real data has been recorded yet, so there are no times and no results here.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """See configs/default.py for the argument, llvq/config.py for the fields."""
    config = default.get_config(argument)
    config.dataset.name = "ffhq1024"
    config.batch_size = 32
    config.model.image_shape = (1024, 1024, 3)
    config.model.hidden_dims = (16, 32)
    config.log_every_steps = 25
    config.eval_every_steps = 625  # a third of an epoch: the validation split is large
    config.checkpoint_every_steps = 125  # steps take long here, and a stopped run should lose few
    return config
