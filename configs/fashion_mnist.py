"""FashionMNIST, 28×28 greyscale.

    python main.py --config=configs/fashion_mnist.py:sparse_lattice --workdir=runs/sparse_lattice

Expected with seed 0; times on 2 CPU cores that were doing other work besides (README has more):

  quantizer       steps   train    evaluate   test MSE   effective codebook size
  vq                860    9 min    4 min      0.00983             28
  vq_ema          4,300   29 min    4 min      0.05194             16
  sparse_lattice    860    7 min    2 min      0.00963            158
  dense_lattice     860   10 min    4 min      0.00682     11,456,731
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """See configs/default.py for the argument and the fields."""
    config = default.get_config(argument)
    config.dataset.name = "fashion_mnist"
    config.model.image_shape = (28, 28, 1)
    config.model.value_range = (-0.5, 0.5)
    config.steps_per_call = 5
    config.eval_every_steps = 215
    config.checkpoint_every_steps = 215
    return config
