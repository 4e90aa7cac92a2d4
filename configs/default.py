"""The config of a quantizer and a recipe; a data set's file fills in the rest.

The config argument names both: `configs/fashion_mnist.py:vq` or
`configs/fashion_mnist.py:vq,standard`. llvq/config.py has every field with its meaning, default and
range, and the recipes:

  paper     what the authors' released models were trained with, the LeakyReLU after the decoder
            included
  standard  ten epochs of a linear decoder; the learning rate rises, then falls to 0; options that
            keep codebooks from collapsing

Further words name another network or optimizer, whose options then are fields of the config:
`configs/fashion_mnist.py:vq,standard,optimizer=adamw`. The options of a quantizer, a network and an
optimizer are parameters of its constructor: see llvq/quantizers, llvq/models and
llvq/training/optimizer.py.
"""

from ml_collections import ConfigDict

from llvq.config import make_dict
from llvq.errors import UserError


def get_config(argument: str = "", recipe: str = "paper") -> ConfigDict:
    """Makes the default config for an argument.

    Args:
      argument: "QUANTIZER,RECIPE,model=NETWORK,optimizer=OPTIMIZER", each of which may be missing.
      recipe: where the argument names none.

    Raises:
      UserError: if the argument has other words, or there is nothing of such a name.
    """
    words = argument.split(",") if argument else []
    named = dict(word.split("=", 1) for word in words if "=" in word)
    quantizer, *recipes = [word for word in words if "=" not in word] or ["sparse_lattice"]
    if len(recipes) > 1 or named.keys() - {"model", "optimizer"}:
        raise UserError(
            f"the config argument {argument!r} must be QUANTIZER,RECIPE,model=…,optimizer=…"
        )
    return ConfigDict(make_dict(quantizer, *(recipes or [recipe]), **named))
