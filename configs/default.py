"""Every field of a config, with its meaning; a data set's file fills in the rest.

The config argument names the quantizer and the recipe: `configs/fashion_mnist.py:vq` or
`configs/fashion_mnist.py:vq,paper`. Quantizers: see llvq/quantizers. Recipes:

  paper   what the authors' released models were trained with (the default)
  long    ten epochs, the learning rate rising and then falling to 0
  pod     the same with 8 images a device, however many there are, and a learning rate that goes
          with the batch (llvq/scaling.py)
"""

from ml_collections import ConfigDict

from llvq.errors import UserError
from llvq.models.vqvae import NUM_RESIDUAL_BLOCKS
from llvq.quantizers import default_options


def _paper(config: ConfigDict) -> None:
    # The authors ran 5 epochs with a learning rate of exactly 0 from the second on, which only
    # the EMA codebook notices.
    is_ema = config.quantizer.name == "vq_ema"
    config.num_epochs = 5 if is_ema else 1
    config.schedule = "first_epoch" if is_ema else "constant"


def _long(config: ConfigDict) -> None:
    config.num_epochs = 10
    config.schedule = "cosine"


def _pod(config: ConfigDict) -> None:
    _long(config)
    config.images_per_device = 8


RECIPES = {"paper": _paper, "long": _long, "pod": _pod}


def get_config(argument: str) -> ConfigDict:
    """The default config for an argument "quantizer", "quantizer,recipe" or "".

    Raises:
      UserError: if there is no such quantizer or recipe.
    """
    quantizer, _, recipe = (argument or "sparse_lattice").partition(",")
    recipe = recipe or "paper"
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")

    config = ConfigDict()
    config.seed = 0  # of the initial parameters and the input order
    config.batch_size = 64  # images a step, over all devices and hosts
    # If above 0, a run takes so many times the number of devices instead, and batch_size is only
    # what learning rate, EMA decay and intervals are meant for: see llvq/scaling.py.
    config.images_per_device = 0
    config.num_train_steps = 0  # if above 0, wins over num_epochs
    # Steps in one call of the compiled program, if the data set is in memory: each device then has
    # all of it. Their largest divisor is taken that fits intervals and length of the run, and the
    # step that it goes on from; 1 on a CPU. See llvq/feeding.py.
    config.steps_per_call = 1
    config.learning_rate = 1e-3  # Adam's
    # Of the convolutions' arithmetic: float32, bfloat16 or float64. Parameters, losses and the
    # quantizer stay in float32 (float64 for float64).
    config.compute_dtype = "float32"
    config.keep_checkpoints = 2  # the newest; the two best by validation loss are kept besides
    config.log_every_steps = 50
    config.eval_every_steps = 500
    config.checkpoint_every_steps = 500
    # Whether a checkpoint that cannot be saved (a full disk) ends the run; if not, it is a warning,
    # unless there are several processes.
    config.stop_on_failed_save = True

    config.dataset = ConfigDict()
    config.dataset.name = ""  # of the data set, as in input_pipeline
    config.dataset.data_dir = ""  # of TFDS; its default (~/tensorflow_datasets) if empty
    config.dataset.manual_dir = ""  # where files fetched by hand lie; see README

    # The name of the quantizer, and all its options with their defaults: codebook_size,
    # commitment_cost; vq_ema: decay, epsilon; lattices: gamma.
    config.quantizer = ConfigDict({"name": quantizer, **default_options(quantizer)})

    config.model = ConfigDict()
    config.model.image_shape = (0, 0, 0)  # height, width, channels
    config.model.value_range = (0.0, 1.0)  # what pixel values 0 … 255 are mapped to
    config.model.hidden_dims = (64,)  # the network's width after each halving of the image
    config.model.num_residual_blocks = NUM_RESIDUAL_BLOCKS  # in the encoder, as many in the decoder
    config.model.latent_dim = 64  # of each latent vector

    RECIPES[recipe](config)  # num_epochs and schedule (see llvq/schedules.py)
    return config
