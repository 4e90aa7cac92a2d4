"""The VQ-VAE: encoder and decoder around a quantizer."""

from llvq.models.vqvae import VQVAE

__all__ = ["VQVAE"]
