"""Pictures of reconstructions."""

import io

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image


def comparison(
    originals: Float[np.ndarray, "n height width channels"],
    reconstructions: Float[np.ndarray, "n height width channels"],
) -> UInt8[np.ndarray, "grid_height grid_width channels"]:
    """One picture: a row of originals above a row of their reconstructions, values in [0, 1]."""
    rows = [np.concatenate(list(images), axis=1) for images in (originals, reconstructions)]
    return np.rint(255 * np.clip(np.concatenate(rows), 0.0, 1.0)).astype(np.uint8)


def write_png(path: epath.PathLike, picture: UInt8[np.ndarray, "height width channels"]) -> None:
    """Writes a picture; small ones are enlarged until a person can see them.

    It shows the first three channels, or the first one where there are fewer than three.
    """
    scale = max(1, 256 // picture.shape[0])
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    shown = picture[..., :3] if picture.shape[-1] >= 3 else picture[..., 0]
    Image.fromarray(shown).save(buffer, "PNG")
    epath.Path(path).write_bytes(buffer.getvalue())
