"""The config of a quantizer and a recipe; a data set's file fills in the rest.

The config argument names both: `configs/fashion_mnist.py:vq` or `configs/fashion_mnist.py:vq,long`.
llvq/config.py has every field with its meaning, default and range, and the recipes:

  paper   what the authors' released models were trained with (the default)
  long    ten epochs; the learning rate rises, then falls to 0
  pod     the same with 8 images per device, however many devices there are

A quantizer's options are the parameters of its constructor: see llvq/quantizers.
"""

from ml_collections import ConfigDict

from llvq.config import make_config, to_dict


def get_config(argument: str) -> ConfigDict:
    """The default config for an argument "quantizer", "quantizer,recipe" or "".

    Raises:
      UserError: if there is no such quantizer or recipe.
    """
    quantizer, _, recipe = (argument or "sparse_lattice").partition(",")
    return ConfigDict(to_dict(make_config(quantizer, recipe or "paper")))
