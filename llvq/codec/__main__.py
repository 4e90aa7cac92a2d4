"""Compresses images to small files and decompresses them.

    python -m llvq.codec compress --model=fashion_mnist/vq IN.png … --output=DIRECTORY
    python -m llvq.codec decompress --model=fashion_mnist/vq DIRECTORY/IN.llvq … --output=DIRECTORY
    python -m llvq.codec fit --model=CHECKPOINT IMAGE …

A folder stands for all images or streams in it; its sub-folders appear in the output. A model is
the name of a trained model, a checkpoint or a workdir. `fit` estimates a code model from images,
for a checkpoint without one.
"""

import argparse
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from llvq import checkpointing
from llvq.codec import Codec
from llvq.codec import code_model as code_models
from llvq.data.files import writing
from llvq.data.image_files import SUFFIXES, find_files, read_image
from llvq.errors import UserError, one_line_exit
from llvq.models import VQVAE
from llvq.pretrained import find_pretrained

_SUFFIX = ".llvq"


def _read(path: pathlib.Path, model: VQVAE) -> UInt8[np.ndarray, "1 height width channels"]:
    assert model.image_channels is not None  # a checkpoint's model knows it
    return read_image(path, model.image_channels)[None]


def _compress(codec: Codec, contexts: bool, source: pathlib.Path, target: pathlib.Path) -> None:
    images = _read(source, codec.model)
    with writing(target) as file:
        file.write_bytes(codec.compress(images, contexts))


def _decompress(codec: Codec, source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        images = codec.decompress(source.read_bytes())
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for i, image in enumerate(images):
        name = target if len(images) == 1 else target.with_stem(f"{target.stem}_{i:06d}")
        with writing(name) as file:
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture.save(file, "PNG")


def _find(
    named: Iterable[pathlib.Path], suffixes: Sequence[str]
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Lists the files named and those in the folders named, each with its path in the output."""
    found: list[tuple[pathlib.Path, pathlib.Path]] = []
    for path in named:
        if not path.is_dir():
            found.append((path, pathlib.Path(path.name)))
            continue
        inside = sorted(map(pathlib.Path, find_files(epath.Path(path), suffixes)))
        if not inside:
            raise UserError(f"{path} has no files of {', '.join(suffixes)}")
        found += [(file, file.relative_to(path)) for file in inside]
    return list(dict.fromkeys(found))


def _convert(
    convert: Callable[[pathlib.Path, pathlib.Path], None],
    found: Sequence[tuple[pathlib.Path, pathlib.Path]],
    output: pathlib.Path,
    suffix: str,
) -> None:
    """Converts files, one per core at a time."""
    files = [file for file, _ in found]
    targets = [(output / name).with_suffix(suffix) for _, name in found]
    by_target = dict(zip(targets, files, strict=True))
    for file, target in zip(files, targets, strict=True):
        if by_target[target] != file:
            raise UserError(f"{file} and {by_target[target]} would become {target}: rename one")
    for directory in {target.parent for target in targets}:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output={directory} is not a directory ({error.strerror})"
            ) from error
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(convert, *paths) for paths in zip(files, targets, strict=True)]
        try:
            for job in tqdm(futures.as_completed(jobs), total=len(jobs), unit="file", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fit(name: str, files: Sequence[pathlib.Path]) -> None:
    checkpoint = checkpointing.load(find_pretrained(name))
    model, path = checkpointing.model_of(checkpoint), checkpoint.path
    existing = code_models.load(path)
    if existing and existing.belongs_to(model):
        raise UserError(
            f"{path} has a code model, without which its streams would not decode: delete its "
            "code_model.npz to fit another one"
        )
    Codec.fit(model, (_read(file, model) for file in files)).save(path)
    print(f"{path} has a code model of {len(files)} images")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends in one line."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # hides Orbax's messages
    parser = argparse.ArgumentParser(prog="llvq.codec", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("compress", "turns images into streams"),
        ("decompress", "turns streams into PNG images"),
        ("fit", "estimates a code model from images"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--model", required=True, help="name, checkpoint or workdir")
        command.add_argument("files", nargs="+", type=pathlib.Path, help="files or folders")
        if name != "fit":
            command.add_argument("--output", required=True, type=pathlib.Path, help="a directory")
        if name == "compress":
            command.add_argument(
                "--contexts", action="store_true", help="makes smaller files, and takes longer"
            )
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        if options.command == "fit":
            _fit(options.model, [file for file, _ in _find(options.files, SUFFIXES)])
            return
        codec = Codec.load(options.model)
        if options.command == "compress":
            compress = functools.partial(_compress, codec, options.contexts)
            _convert(compress, _find(options.files, SUFFIXES), options.output, _SUFFIX)
        else:
            decompress = functools.partial(_decompress, codec)
            _convert(decompress, _find(options.files, [_SUFFIX]), options.output, ".png")


if __name__ == "__main__":
    main()
