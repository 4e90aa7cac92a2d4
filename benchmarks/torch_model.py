"""LL-VQ-VAE and its steps in idiomatic PyTorch, for comparison with llvq.

The method is llvq's (see llvq/quantizers); layers and buffers have the names of the authors' files.
Modules take images NCHW, usually in the channels-last memory format, so that the quantizers'
[batch, height, width, latent_dim] is a view of the encoder's output.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llvq.models.factory import Architecture
from llvq.quantizers.lattice import SMALLEST_BASIS, sparse_basis_bound

Step = Callable[[torch.Tensor], torch.Tensor]


class ResidualBlock(nn.Module):
    """x + conv1×1(relu(conv3×3(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblock = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.resblock(x)


class _Codebook(nn.Module):
    """Base class of VQ and VQ-EMA."""

    def __init__(self, codebook_size: int, latent_dim: int, commitment_cost: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, latent_dim)
        self.commitment_cost = commitment_cost

    @torch.no_grad()
    def nearest(self, flat: torch.Tensor) -> torch.Tensor:
        codebook = self.embedding.weight
        norms = flat.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return torch.addmm(norms, flat, codebook.T, alpha=-2.0).argmin(1)


class VQ(_Codebook):
    """VQ. All quantizers here map latents [..., latent_dim] to (quantized, codes, loss)."""

    def __init__(self, latent_dim: int, codebook_size: int, commitment_cost: float) -> None:
        super().__init__(codebook_size, latent_dim, commitment_cost)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = self.nearest(z.reshape(-1, z.shape[-1])).view(z.shape[:-1])
        quantized = self.embedding(codes)
        loss = functional.mse_loss(quantized, z.detach())
        loss = loss + self.commitment_cost * functional.mse_loss(z, quantized.detach())
        return z + (quantized - z).detach(), codes, loss


class VQEMA(_Codebook):
    """VQ-EMA."""

    def __init__(
        self,
        latent_dim: int,
        codebook_size: int,
        commitment_cost: float,
        decay: float,
        epsilon: float,
    ) -> None:
        super().__init__(codebook_size, latent_dim, commitment_cost)
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("ema_w", torch.randn(codebook_size, latent_dim))
        self.register_buffer("ema_cluster_size", torch.zeros(codebook_size))
        self.decay, self.epsilon = decay, epsilon

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = z.reshape(-1, z.shape[-1])
        codes = self.nearest(flat)
        quantized = self.embedding(codes).view(z.shape)
        if self.training:
            self._update(flat.detach(), codes)
        loss = self.commitment_cost * functional.mse_loss(z, quantized)
        return z + (quantized - z).detach(), codes.view(z.shape[:-1]), loss

    @torch.no_grad()
    def _update(self, flat: torch.Tensor, codes: torch.Tensor) -> None:
        codebook_size = len(self.embedding.weight)
        one_hot = torch.zeros(len(flat), codebook_size, dtype=flat.dtype, device=flat.device)
        one_hot.scatter_(1, codes[:, None], 1.0)
        size = self.ema_cluster_size * self.decay + one_hot.sum(0) * (1 - self.decay)
        total = size.sum()
        size = (size + self.epsilon) / (total + codebook_size * self.epsilon) * total
        self.ema_cluster_size.copy_(size)
        self.ema_w.mul_(self.decay).add_(one_hot.T @ flat, alpha=1 - self.decay)
        self.embedding.weight.copy_(self.ema_w / size[:, None])


class Lattice(nn.Module):
    """Either lattice; codes are integers in the latents' dtype."""

    def __init__(
        self, latent_dim: int, basis_bound: float, gamma: float, commitment_cost: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1, latent_dim)
        nn.init.uniform_(self.embedding.weight, -basis_bound, basis_bound)
        self.gamma, self.commitment_cost = gamma, commitment_cost

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parameter = self.embedding.weight[0]
        sign = torch.where(parameter < 0, -1.0, 1.0)
        basis = torch.where(parameter.abs() >= SMALLEST_BASIS, parameter, sign * SMALLEST_BASIS)
        codes = torch.round(z.detach() * (1 / basis.detach()))
        quantized = basis * codes
        loss = functional.mse_loss(quantized, z.detach())
        loss = loss + self.commitment_cost * functional.mse_loss(z, quantized.detach())
        loss = loss - self.gamma * (sign * parameter).sum()
        return z + (quantized - z).detach(), codes, loss


def _sparse_lattice(latent_dim: int, codebook_size: int, **options: float) -> Lattice:
    return Lattice(latent_dim, sparse_basis_bound(codebook_size, latent_dim), **options)


# The counterparts of those in llvq.quantizers.QUANTIZERS.
QUANTIZERS: dict[str, Callable[..., nn.Module]] = {
    "vq": VQ,
    "vq_ema": VQEMA,
    "sparse_lattice": _sparse_lattice,
    "dense_lattice": functools.partial(Lattice, basis_bound=1.0),
}


# Options that the counterparts lack; they behave as the defaults do.
_LACKING = ("distance", "gradient", "initialization", "restart_threshold")


def create_quantizer(name: str, latent_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Creates the counterpart of a quantizer, with the same options."""
    known = {option: value for option, value in options.items() if option not in _LACKING}
    return QUANTIZERS[name](latent_dim, **known)


class VQVAE(nn.Module):
    """The autoencoder; see `llvq.VQVAE` for the arguments."""

    def __init__(
        self,
        quantizer: nn.Module,
        latent_dim: int,
        *,
        image_channels: int,
        hidden_dims: Sequence[int],
        num_residual_blocks: int,
    ) -> None:
        super().__init__()

        def layer(convolution: nn.Module) -> nn.Module:
            return nn.Sequential(convolution, nn.LeakyReLU())

        def middle() -> list[nn.Module]:
            return [*(ResidualBlock(width) for _ in range(num_residual_blocks)), nn.LeakyReLU()]

        width = hidden_dims[-1]
        pairs = list(itertools.pairwise((image_channels, *hidden_dims)))
        self._encoder = nn.Sequential(
            *(layer(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in pairs),
            layer(nn.Conv2d(width, width, 3, padding=1)),
            *middle(),
            layer(nn.Conv2d(width, latent_dim, 1)),
        )
        self._quantizer = quantizer
        self._decoder = nn.Sequential(
            layer(nn.Conv2d(latent_dim, width, 3, padding=1)),
            *middle(),
            *(layer(nn.ConvTranspose2d(b, a, 4, 2, 1)) for a, b in reversed(pairs)),
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(reconstructions, codes, quantizer loss); the quantizer stays out of autocast."""
        latents = self._encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            z = latents.to(images.dtype).permute(0, 2, 3, 1)
            quantized, codes, loss = self._quantizer(z)
        return self._decoder(quantized.permute(0, 3, 1, 2)), codes, loss


def create(architecture: Architecture) -> VQVAE:
    """Initializes a model with the architecture of a config."""
    options, latent_dim = architecture.network_options, architecture.latent_dim
    return VQVAE(
        create_quantizer(architecture.quantizer, latent_dim, architecture.quantizer_options),
        latent_dim,
        image_channels=architecture.image_shape[-1],
        hidden_dims=options["hidden_dims"],
        num_residual_blocks=options["num_residual_blocks"],
    )


def make_losses(model: nn.Module, value_range: Sequence[float], *, amp: bool) -> Callable[..., Any]:
    """Makes a function from images, uint8 NHWC, to (reconstruction loss, quantizer loss).

    Args:
      model: a VQVAE.
      value_range: what 0 … 255 is mapped to.
      amp: whether the network runs in bfloat16 (automatic mixed precision).
    """
    low, high = value_range
    dtype = next(model.parameters()).dtype

    def losses(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The transposed images are a view in channels-last format.
        targets = low + images.permute(0, 3, 1, 2).to(dtype) / 255.0 * (high - low)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            reconstructions, _, quantizer_loss = model(targets)
        return functional.mse_loss(reconstructions.to(dtype), targets), quantizer_loss

    return losses


def make_train_step(losses: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Step:
    """Makes a training step, which maps images, uint8 NHWC, to the loss."""

    def train_step(images: torch.Tensor) -> torch.Tensor:
        loss = sum(losses(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step


def make_evaluate_step(losses: Callable[..., Any]) -> Step:
    """Makes a step that maps images, uint8 NHWC, to the reconstruction and the quantizer loss."""
    return torch.inference_mode()(losses)
