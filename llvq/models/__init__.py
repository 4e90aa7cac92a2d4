"""The VQ-VAE: encoder and decoder around a quantizer, and the networks by name."""

from llvq.models.registry import NETWORKS
from llvq.models.vqvae import VQVAE, Pair, VQVAEOutput

__all__ = ["NETWORKS", "VQVAE", "Pair", "VQVAEOutput"]
