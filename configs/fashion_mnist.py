"""FashionMNIST, 28×28 greyscale.

    python main.py --config=configs/fashion_mnist.py:sparse_lattice --workdir=runs/sparse_lattice

Results with seed 0 and the recipe `paper`, from version 0.1.0 on 2 busy CPU cores. Another
machine rounds differently and gives other figures; README shows their spread.

  quantizer       steps   train    evaluate   test MSE   effective codebook size
  vq                860    4 min    1 min      0.00963             51
  vq_ema          4,300    8 min    1 min      0.03662             60
  sparse_lattice    860    2 min    1 min      0.00880            160
  dense_lattice     860    3 min    1 min      0.00667     11,474,539
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """See configs/default.py for the argument, llvq/config.py for the fields."""
    config = default.get_config(argument)
    config.dataset.name = "fashion_mnist"
    config.model.image_shape = (28, 28, 1)
    config.model.value_range = (-0.5, 0.5)
    config.steps_per_call = 5
    config.eval_every_steps = 215
    config.checkpoint_every_steps = 215
    return config
