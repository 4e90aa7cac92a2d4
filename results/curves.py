"""The quantizers that are compared, each at several rates."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Curve(NamedTuple):
    """One quantizer at several rates.

    Attributes:
      quantizer: of llvq.quantizers.QUANTIZERS.
      knob: the option that sets the rate.
      values: of the knob; the trials of results.compare have the second one.
      latent_dim: 0 if the knob decides.
      latent_activation: at the end of the encoder.
      options: the quantizer's other options, where they are not the defaults.
    """

    quantizer: str
    knob: str
    values: Sequence[Any]
    latent_dim: int
    latent_activation: str
    options: Mapping[str, Any] = {}

    def setting(self, value: Any) -> str:
        """Returns the knob and its value in words."""
        return f"{self.knob} {value}"

    def at(self, value: Any, config: ConfigDict) -> ConfigDict:
        """Sets a config to this quantizer, these latents, and the knob's value."""
        config.model.latent_dim = self.latent_dim
        config.model.latent_activation = self.latent_activation
        config.model.output_activation = "leaky_relu"
        config.quantizer.update({**self.options, self.knob: value})
        return config


def in_name(value: Any) -> str:
    """Returns a knob's value as part of a file's name."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Options against dead codes.
_STRONG = {"restart_threshold": 0.1, "initialization": "batch"}
_RESIDUAL = {"codebook_size": 16, "dropout": False}
_RATE_WEIGHTS = (2e-3, 7e-4, 2.5e-4, 1e-4)

CURVES = {
    "vq": Curve("vq", "codebook_size", (8, 64, 512, 4096), 64, "leaky_relu"),
    "vq_restarts": Curve("vq", "codebook_size", (8, 64, 1024, 16384), 4, "none", _STRONG),
    "vq_ema_restarts": Curve("vq_ema", "codebook_size", (8, 64, 512, 4096), 64, "none", _STRONG),
    # γ from 0.001 to 1 moves the rate by a bit (see the trials), so that the first basis is varied,
    # which the desired codebook size sets.
    "sparse_lattice": Curve(
        "sparse_lattice", "codebook_size", (8, 512, 2**16, 2**24), 64, "leaky_relu"
    ),
    "fsq": Curve("fsq", "levels", ((5,), (8, 6), (8, 5, 5, 5), (8, 8, 8, 6, 5)), 0, "none"),
    "lfq": Curve("lfq", "codebook_size", (4, 64, 1024, 4096), 0, "none"),
    "bsq": Curve("bsq", "num_bits", (3, 6, 10, 14), 0, "none"),
    "simvq": Curve("simvq", "codebook_size", (8, 64, 1024, 4096), 8, "none"),
    "residual_vq": Curve("residual_vq", "depth", (1, 2, 3, 4), 64, "none", _RESIDUAL),
    "diagonal_lattice": Curve("diagonal_lattice", "rate_weight", _RATE_WEIGHTS, 4, "none"),
    "e8_lattice": Curve("e8_lattice", "rate_weight", _RATE_WEIGHTS, 8, "none"),
    "learned_lattice": Curve("learned_lattice", "rate_weight", _RATE_WEIGHTS, 8, "none"),
    "d4_lattice": Curve("d4_lattice", "rate_weight", _RATE_WEIGHTS, 4, "none"),
    "leech_lattice": Curve("leech_lattice", "rate_weight", _RATE_WEIGHTS[:2], 24, "none"),
    # Evaluated at its first rate.
    "multirate_lattice": Curve(
        "multirate_lattice", "rate_weights", (_RATE_WEIGHTS[:2], _RATE_WEIGHTS[1::-1]), 8, "none"
    ),
}
# Those with a rate in the loss.
LATTICES = tuple(name for name in CURVES if name.endswith("_lattice") and name != "sparse_lattice")
