"""The benchmarks' PyTorch model as an oracle for imports and for training steps."""

import numpy as np
import torch

from benchmarks import torch_model
from llvq.quantizers.registry import complete


class Model(torch_model.VQVAE):
    """A model whose quantizer maps latents to different codes. Images are NumPy arrays, NHWC."""

    def __init__(self, quantizer, channels, hidden_dims, num_blocks=2, latent_dim=8, size=16):
        super().__init__(
            torch_model.create_quantizer(quantizer, latent_dim, options(quantizer, size)),
            latent_dim,
            image_channels=channels,
            hidden_dims=hidden_dims,
            num_residual_blocks=num_blocks,
        )
        weight = self._quantizer.embedding.weight
        if quantizer == "sparse_lattice":  # fine enough for codes other than 0
            basis = [0.02, -0.03, 0.01, 0.05] + [9.1] * (latent_dim - 4)
            weight.data = torch.tensor(basis)[None]
        else:
            weight.data = 0.05 * torch.randn(weight.shape)
        if quantizer == "vq_ema":
            self._quantizer.ema_cluster_size.uniform_()

    @torch.no_grad()
    def reconstruct(self, images):
        self.eval()
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return self(x)[0].numpy().transpose(0, 2, 3, 1)


def options(quantizer, codebook_size):
    """A quantizer's default options, with another codebook size if it has one."""
    defaults = complete(quantizer, {})
    return defaults | {"codebook_size": codebook_size} if "codebook_size" in defaults else defaults


def lightning_file(model, step=7):
    """The part of a Lightning file that matters, and some other entries."""
    return {"state_dict": model.state_dict(), "global_step": step, "epoch": 4, "loops": {}}
