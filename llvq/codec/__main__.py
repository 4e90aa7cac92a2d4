"""Images to small files and back.

    python -m llvq.codec encode --model=fashion_mnist/vq IN.png … --output=DIRECTORY
    python -m llvq.codec decode --model=fashion_mnist/vq DIRECTORY/IN.llvq … --output=DIRECTORY
    python -m llvq.codec fit --model=CHECKPOINT IMAGE …

A model is the name of one that the project ships, a checkpoint or a workdir. `fit` gives a
checkpoint that was not evaluated on its data set a code model estimated from some images.
"""

import argparse
import io
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from llvq import checkpointing, codec
from llvq.data.files import replacing
from llvq.errors import UserError, one_line_exit
from llvq.models import VQVAE
from llvq.pretrained import find_pretrained, load_pretrained

_SUFFIX = ".llvq"
_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "P", "RGB")  # whatever becomes RGB without loss


def read_image(path: pathlib.Path, channels: int) -> UInt8[np.ndarray, "1 height width channels"]:
    """An image file as a batch of one image, upright as its EXIF data says.

    Args:
      path: a PNG, JPEG or WebP file of 8 bits per channel.
      channels: 1 or 3, the model's.

    Raises:
      UserError: if it cannot be read, or has colours, transparency or bits that would be lost.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode not in _MODES or "transparency" in image.info:
                raise UserError(
                    f"{path} has the mode {image.mode}: convert it to 8-bit greyscale or RGB "
                    "without transparency first"
                )
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no PNG, JPEG or WebP image, or is damaged") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason})") from error
    if channels == 1 and np.any(pixels != pixels[..., :1]):
        raise UserError(f"{path} has colours, and the model's images are greyscale")
    return pixels[..., :channels]


def _encode(model: VQVAE, source: pathlib.Path, target: pathlib.Path, options: Any) -> None:
    images = read_image(source, model.image_channels)
    _write(target, codec.encode(model, images, with_contexts=options.contexts))


def _decode(model: VQVAE, source: pathlib.Path, target: pathlib.Path, options: Any) -> None:
    del options
    try:
        stream = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})") from error
    try:
        images = codec.decode(model, stream)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
        name = target if len(images) == 1 else target.with_stem(f"{target.stem}_{i:06d}")
        _write(name, buffer.getvalue())


def _write(path: pathlib.Path, content: bytes) -> None:
    try:
        with replacing(path) as file:
            file.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def _each(
    convert: Callable[[VQVAE, pathlib.Path, pathlib.Path, Any], None],
    suffix: str,
    model: VQVAE,
    options: Any,
) -> None:
    """Converts all files, one per core at a time."""
    targets = [options.output / source.with_suffix(suffix).name for source in options.files]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            raise UserError(f"two files would become {target}: give them different --output")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={options.output} is no directory ({error.strerror})") from error
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(convert, model, source, target, options)
            for source, target in zip(options.files, targets, strict=True)
        ]
        try:
            for job in tqdm(futures.as_completed(jobs), total=len(jobs), unit="file", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fit(options: Any) -> None:
    checkpoint = checkpointing.find(find_pretrained(options.model))
    model = load_pretrained(options.model)
    images = [read_image(path, model.image_channels) for path in options.files]
    codec.fit(model, images)
    codec.code_model_of(model).save(checkpoint)
    print(f"{checkpoint} has a code model of {len(images)} images")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # hides Orbax's messages
    parser = argparse.ArgumentParser(prog="llvq.codec", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("encode", "images to streams"),
        ("decode", "streams to PNG images"),
        ("fit", "a code model from images"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--model", required=True, help="name, checkpoint or workdir")
        command.add_argument("files", nargs="+", type=pathlib.Path)
        if name != "fit":
            command.add_argument("--output", required=True, type=pathlib.Path, help="a directory")
        if name == "encode":
            command.add_argument(
                "--contexts", action="store_true", help="smaller files, in a longer time"
            )
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        if options.command == "fit":
            _fit(options)
            return
        model = load_pretrained(options.model)
        codec.code_model_of(model)
        if options.command == "encode":
            _each(_encode, _SUFFIX, model, options)
        else:
            _each(_decode, ".png", model, options)


if __name__ == "__main__":
    main()
