"""Images to small files and back.

    python -m llvq.codec encode --model=fashion_mnist/vq IN.png … --output=DIRECTORY
    python -m llvq.codec decode --model=fashion_mnist/vq DIRECTORY/IN.llvq … --output=DIRECTORY
    python -m llvq.codec fit --model=CHECKPOINT IMAGE …

A folder stands for all images or streams in it; its sub-folders appear in the output. A model is
the name of one that the project ships, a checkpoint or a workdir. `fit` gives a checkpoint that has
no code model one that is estimated from some images.
"""

import argparse
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures

from etils import epath
from PIL import Image
from tqdm import tqdm

from llvq import checkpointing, codec
from llvq.data.files import writing
from llvq.data.image_files import SUFFIXES, find_files, read_image
from llvq.errors import UserError, one_line_exit
from llvq.models import VQVAE
from llvq.pretrained import find_pretrained, load_pretrained

_SUFFIX = ".llvq"


def _encode(model: VQVAE, with_contexts: bool, source: pathlib.Path, target: pathlib.Path) -> None:
    images = read_image(source, model.image_channels)[None]
    with writing(target) as file:
        file.write_bytes(codec.encode(model, images, with_contexts=with_contexts))


def _decode(model: VQVAE, source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        images = codec.decode(model, source.read_bytes())
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
    """The files named and those in the folders named, each with its path in the output."""
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
    """Converts files, as many at a time as there are cores."""
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
            raise UserError(f"--output={directory} is no directory ({error.strerror})") from error
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(convert, *paths) for paths in zip(files, targets, strict=True)]
        try:
            for job in tqdm(futures.as_completed(jobs), total=len(jobs), unit="file", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fit(model: VQVAE, checkpoint: epath.Path, files: Sequence[pathlib.Path]) -> None:
    if model.code_model is not None:
        raise UserError(
            f"{checkpoint} has a code model, without which its streams would not decode: delete "
            "its code_model.npz to have another one"
        )
    codec.fit(model, (read_image(path, model.image_channels)[None] for path in files))
    codec.code_model_of(model).save(checkpoint)
    print(f"{checkpoint} has a code model of {len(files)} images")


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
        command.add_argument("files", nargs="+", type=pathlib.Path, help="files or folders")
        if name != "fit":
            command.add_argument("--output", required=True, type=pathlib.Path, help="a directory")
        if name == "encode":
            command.add_argument(
                "--contexts", action="store_true", help="smaller files, in a longer time"
            )
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        model = load_pretrained(options.model)
        if options.command == "fit":
            checkpoint = checkpointing.load(find_pretrained(options.model)).path
            _fit(model, checkpoint, [file for file, _ in _find(options.files, SUFFIXES)])
            return
        codec.code_model_of(model)  # before files are read
        if options.command == "encode":
            encode = functools.partial(_encode, model, options.contexts)
            convert, before, after = encode, SUFFIXES, _SUFFIX
        else:
            convert, before, after = functools.partial(_decode, model), (_SUFFIX,), ".png"
        _convert(convert, _find(options.files, before), options.output, after)


if __name__ == "__main__":
    main()
