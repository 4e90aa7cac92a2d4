"""The networks, by the names that configs use.

A network is a function of keyword arguments that returns (encoder, decoder):

    def vit(*, image_shape, latent_dim, dtype, param_dtype, rngs, patch: Annotated[…] = 4): …

`encoder(images)` are latents [batch, h, w, latent_dim], and the encoder has the attributes
`downsampling`, the height of an image over that of its latents, and `latent_dim`. `decoder` maps
such latents to images. Parameters with a range in their annotation are the network's options; they
become fields of config.model. `NETWORKS["vit"] = vit` registers it.
"""

from collections.abc import Callable
from typing import Any

from llvq.models.paper import paper

NETWORKS: dict[str, Callable[..., tuple[Any, Any]]] = {"paper": paper}
