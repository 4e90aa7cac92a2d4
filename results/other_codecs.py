"""A model's files of photographs beside JPEG and WebP files of the nearest size."""

import bisect
import io
from collections.abc import Collection

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from input_pipeline.host_tensorflow import tf
from llvq import Codec

Pixels = UInt8[np.ndarray, "height width channels"]

_CROP = 240, 320  # rows and columns


def nearest_file(pixels: Pixels, format_name: str, num_bytes: int) -> bytes:
    """Returns the JPEG or WebP file, over all qualities, whose size is nearest."""
    files: dict[int, bytes] = {}

    def size(quality: int) -> int:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format_name, quality=quality)
        files[quality] = buffer.getvalue()
        return len(files[quality])

    bisect.bisect_left(range(101), num_bytes, key=size)  # size hardly ever falls as quality rises
    return min(files.values(), key=lambda file: abs(len(file) - num_bytes))


def quality(original: Pixels, reconstruction: Pixels) -> dict[str, float]:
    """Computes PSNR, SSIM and MS-SSIM of an image with TensorFlow."""
    pair = [tf.constant(image) for image in (original, reconstruction)]
    return {
        "psnr": float(tf.image.psnr(*pair, max_val=255)),
        "ssim": float(tf.image.ssim(*pair, max_val=255)),
        "ms_ssim": float(tf.image.ssim_multiscale(*pair, max_val=255)),
    }


def compress(codec: Codec, pixels: Pixels) -> dict[str, tuple[int, Pixels]]:
    """Compresses a photograph with this program and others: size in bytes and decoded pixels."""
    images = pixels[None]
    stream = codec.compress(images)
    with_contexts = codec.compress(images, contexts=True)
    decoded = codec.decompress(stream)[0]
    files = {"llvq": (len(stream), decoded), "llvq with contexts": (len(with_contexts), decoded)}
    for format_name in ("JPEG", "WebP"):
        file = nearest_file(pixels, format_name, len(stream))
        files[format_name] = len(file), np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    return files


def measure(codec: Codec, photographs: Collection[Pixels]) -> dict[str, dict[str, float]]:
    """Measures coded bits per pixel over all photographs and their mean qualities, by format."""
    num_pixels = sum(pixels.shape[0] * pixels.shape[1] for pixels in photographs)
    totals: dict[str, dict[str, float]] = {}
    for pixels in photographs:
        for name, (num_bytes, decoded) in compress(codec, pixels).items():
            of_format = totals.setdefault(name, {})
            shares = {"coded_bits_per_pixel": 8 * num_bytes / num_pixels}
            for figure, value in quality(pixels, decoded).items():
                shares[figure] = value / len(photographs)
            for figure, share in shares.items():
                of_format[figure] = of_format.get(figure, 0.0) + share
    return totals


def compared(codec: Codec, pixels: Pixels) -> tuple[Pixels, dict[str, int]]:
    """Makes a picture of a photograph's centre, and the number of bytes by name.

    The picture has the original and `codec`'s version above those of JPEG and WebP. The bytes are
    those of the original's pixels and of the whole photograph's files.
    """
    files = {"pixels": (pixels.nbytes, pixels), **compress(codec, pixels)}
    del files["llvq with contexts"]  # it decodes to the same
    top, left = (length // 2 - crop // 2 for length, crop in zip(pixels.shape, _CROP, strict=False))
    (a, b, c, d) = (
        image[top : top + _CROP[0], left : left + _CROP[1]] for _, image in files.values()
    )
    picture = np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])
    return picture, {name: num_bytes for name, (num_bytes, _) in files.items()}
