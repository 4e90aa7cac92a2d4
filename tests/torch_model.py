"""LL-VQ-VAE in PyTorch, with the layers' names as in the authors' files: an oracle for imports."""

import itertools

import numpy as np
import torch
from torch import nn


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resblock = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        )

    def forward(self, x):
        return x + self.resblock(x)


class Quantizer(nn.Module):
    """Either a codebook, with EMA buffers or without, or the single row of a lattice basis."""

    def __init__(self, name, codebook_size, latent_dim):
        super().__init__()
        if name == "vq_ema":
            self.ema_w = nn.Parameter(torch.randn(codebook_size, latent_dim))
            self.register_buffer("ema_cluster_size", torch.rand(codebook_size))
        self.embedding = nn.Embedding(1 if "lattice" in name else codebook_size, latent_dim)
        if name == "sparse_lattice":  # 1 in the mean, yet fine enough for codes other than 0
            basis = torch.tensor([0.02, -0.03, 0.01, 0.05] + [9.1] * (latent_dim - 4))
            self.embedding.weight.data = basis[None]
        else:
            self.embedding.weight.data *= 0.05

    def forward(self, z):
        weight = self.embedding.weight
        if len(weight) == 1:
            return torch.round(z / weight[0]) * weight[0]
        distances = ((z[..., None, :] - weight) ** 2).sum(-1)
        return weight[distances.argmin(-1)]


class Model(nn.Module):
    """Images and reconstructions are NumPy arrays, NHWC."""

    def __init__(self, quantizer, channels, hidden_dims, num_blocks=2, latent_dim=8, size=16):
        super().__init__()

        def layer(convolution):
            return nn.Sequential(convolution, nn.LeakyReLU())

        def middle():
            return [*(ResidualBlock(width) for _ in range(num_blocks)), nn.LeakyReLU()]

        widths, width = (channels, *hidden_dims), hidden_dims[-1]
        pairs = list(itertools.pairwise(widths))
        self._encoder = nn.Sequential(
            *(layer(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in pairs),
            layer(nn.Conv2d(width, width, 3, padding=1)),
            *middle(),
            layer(nn.Conv2d(width, latent_dim, 1)),
        )
        self._quantizer = Quantizer(quantizer, size, latent_dim)
        self._decoder = nn.Sequential(
            layer(nn.Conv2d(latent_dim, width, 3, padding=1)),
            *middle(),
            *(layer(nn.ConvTranspose2d(b, a, 4, 2, 1)) for a, b in reversed(pairs)),
        )

    @torch.no_grad()
    def reconstruct(self, images):
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        quantized = self._quantizer(self._encoder(x).permute(0, 2, 3, 1))
        return self._decoder(quantized.permute(0, 3, 1, 2)).numpy().transpose(0, 2, 3, 1)


def lightning_file(model, step=7):
    """What Lightning would save of a model (and more besides)."""
    return {"state_dict": model.state_dict(), "global_step": step, "epoch": 4, "loops": {}}
