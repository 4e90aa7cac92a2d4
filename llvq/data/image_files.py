"""Image files as arrays."""

import os
from collections.abc import Collection, Iterator

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from llvq.errors import UserError

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp")

_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "P", "RGB")  # whatever becomes RGB without loss


def find_files(folder: epath.Path, suffixes: Collection[str]) -> Iterator[epath.Path]:
    """Yields the files of a folder and of the folders in it that have one of the suffixes.

    Hidden files and folders are left out. Suffixes are compared in lower case.

    Raises:
      UserError: if a folder cannot be read, or if a link leads back to a folder that it is in.
    """
    try:
        yield from _find_files(folder, suffixes, ())
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror})") from error


def _find_files(
    folder: epath.Path, suffixes: Collection[str], parents: tuple[str, ...]
) -> Iterator[epath.Path]:
    parents = (*parents, os.path.realpath(folder))
    if parents[-1] in parents[:-1]:
        raise UserError(f"{folder} is {parents[-1]} again: remove the link that leads there")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _find_files(path, suffixes, parents)
        elif path.suffix.lower() in suffixes:
            yield path


def read_image(
    path: epath.PathLike, channels: int, *, convert: bool = False
) -> UInt8[np.ndarray, "height width channels"]:
    """The pixels of an image file, upright as its EXIF data says.

    Args:
      path: a PNG, JPEG or WebP file.
      channels: 1 or 3. Greyscale images become RGB; images with colours do not become greyscale.
      convert: whether to make 8-bit RGB of what has transparency (over white), more bits or other
        colour spaces. If not, these are refused.

    Raises:
      UserError: if the file cannot be read, or has what would be lost; the message names it.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file, formats=_FORMATS) as image:
            if not convert and (lost := _would_be_lost(image)):
                raise UserError(
                    f"{path} has {lost}: convert it to 8-bit greyscale or RGB without transparency "
                    "first"
                )
            pixels = np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no PNG, JPEG or WebP image, or is damaged") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason})") from error
    if channels == 1 and np.any(pixels != pixels[..., :1]):
        raise UserError(f"{path} has colours, and the model's images are greyscale")
    return pixels[..., :channels]


def _has_transparency(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info


def _would_be_lost(image: Image.Image) -> str:
    """What an image has beyond 8-bit RGB; empty if nothing."""
    if _has_transparency(image):
        return "transparency"
    # Pillow opens RGB of 16 bits as RGB of 8, and only the decoder's arguments tell.
    tiles = getattr(image, "tile", ())
    if image.mode.startswith("I") or any("16" in str(tile[3]) for tile in tiles):
        return "16 bits per channel"
    return "" if image.mode in _MODES else f"the mode {image.mode}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if _has_transparency(image):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("RGB")
