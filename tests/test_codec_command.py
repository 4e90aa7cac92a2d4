"""python -m llvq.codec: image files to streams and back, and what a mistake ends in."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llvq import Codec, checkpointing, load_pretrained
from llvq.codec.__main__ import main
from tests import tiny
from tests.runs import create_state


@pytest.fixture(autouse=True)
def _keep_log_level():
    """The command silences absl's logger in its process."""
    logger = logging.getLogger("absl")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{channels: a checkpoint with a code model}."""
    root = tmp_path_factory.mktemp("checkpoints")
    for channels in (1, 3):
        config = tiny.config("sparse_lattice", **{"model.image_shape": (12, 12, channels)})
        state = create_state(config)
        checkpointing.save_for_inference(root / str(channels), state, config)
        images = np.repeat(tiny.images(20), channels, axis=-1)
        Codec.fit(load_pretrained(root / str(channels)), images).save(root / str(channels))
    return {channels: str(root / str(channels)) for channels in (1, 3)}


def picture(height, width, mode, seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(pixels, mode)


def run(*arguments):
    main([str(argument) for argument in arguments])


def test_a_folder_stands_for_what_is_in_it(checkpoints, tmp_path):
    names = ("a.png", "deep/er/b.JPG", "deep/a.webp")
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(13, 12 + i, "RGB").save(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("no image")
    (tmp_path / "in/.hidden").mkdir()
    picture(12, 12, "RGB").save(tmp_path / "in/.hidden/c.png")
    model = f"--model={checkpoints[3]}"
    run("compress", model, tmp_path / "in", f"--output={tmp_path / 'streams'}")
    run("decompress", model, tmp_path / "streams", f"--output={tmp_path / 'out'}")
    decoded = {
        path.relative_to(tmp_path / "out").as_posix(): Image.open(path).size
        for path in (tmp_path / "out").rglob("*.*")
    }
    assert decoded == {"a.png": (12, 13), "deep/er/b.png": (13, 13), "deep/a.png": (14, 13)}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (3, "L")])
def test_files_become_streams_and_pictures(channels, mode, checkpoints, tmp_path):
    codec = Codec.load(checkpoints[channels])
    inputs = []
    for name, size in (("a.png", (13, 20)), ("b.webp", (12, 12)), ("c.jpg", (31, 7))):
        inputs.append(tmp_path / name)
        options = {"lossless": True} if name == "b.webp" else {}
        picture(*size, mode).save(inputs[-1], **options)
    model = f"--model={checkpoints[channels]}"
    run("compress", model, *inputs, f"--output={tmp_path / 'streams'}")
    streams = [tmp_path / "streams" / f"{path.stem}.llvq" for path in inputs]
    run("decompress", model, *streams, f"--output={tmp_path / 'out'}")
    for source, stream in zip(inputs, streams, strict=True):
        with Image.open(source) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        batch = pixels.reshape(1, *pixels.shape[:2], channels)
        assert stream.read_bytes() == codec.compress(batch)
        with Image.open(tmp_path / "out" / f"{source.stem}.png") as image:
            found = np.asarray(image).reshape(batch.shape)
        np.testing.assert_array_equal(found, codec.decompress(stream.read_bytes()))
    assert len(list((tmp_path / "out").iterdir())) == len(inputs)


def test_contexts_make_other_streams_of_the_same_pictures(checkpoints, tmp_path):
    picture(12, 12, "L").save(tmp_path / "a.png")
    for name, options in {"plain": (), "contexts": ("--contexts",)}.items():
        model = f"--model={checkpoints[1]}"
        run("compress", model, *options, tmp_path / "a.png", f"--output={tmp_path / name}")
        run("decompress", model, tmp_path / name / "a.llvq", f"--output={tmp_path / name}")
    plain, contexts = ((tmp_path / name / "a.llvq").read_bytes() for name in ("plain", "contexts"))
    assert plain != contexts
    assert (tmp_path / "plain/a.png").read_bytes() == (tmp_path / "contexts/a.png").read_bytes()


def test_a_photograph_is_turned_upright(checkpoints, tmp_path):
    upright = picture(12, 20, "RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    files = [tmp_path / f"{name}.png" for name in ("turned", "upright")]
    run("compress", f"--model={checkpoints[3]}", *files, f"--output={tmp_path}")
    streams = [(tmp_path / f"{name}.llvq").read_bytes() for name in ("turned", "upright")]
    assert streams[0] == streams[1]


def test_a_stream_of_several_images_makes_several_pictures(checkpoints, tmp_path):
    (tmp_path / "many.llvq").write_bytes(Codec.load(checkpoints[1]).compress(tiny.images(3)))
    run("decompress", f"--model={checkpoints[1]}", tmp_path / "many.llvq", f"--output={tmp_path}")
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"many_00000{i}.png" for i in range(3)]


def test_fit_gives_a_checkpoint_a_code_model(tmp_path, capsys):
    config = tiny.config("vq")
    state = create_state(config)
    checkpointing.save_for_inference(tmp_path / "model", state, config)
    picture(12, 12, "L").save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=r"^llvq.codec: the model has no code model: evaluate"):
        run("compress", f"--model={tmp_path}/model", tmp_path / "a.png", f"--output={tmp_path}")
    run("fit", f"--model={tmp_path}/model", tmp_path / "a.png")
    assert "a code model of 1 images" in capsys.readouterr().out
    run("compress", f"--model={tmp_path}/model", tmp_path / "a.png", f"--output={tmp_path}")
    assert (tmp_path / "a.llvq").exists()
    with pytest.raises(SystemExit, match=r"has a code model, without which its streams"):
        run("fit", f"--model={tmp_path}/model", tmp_path / "a.png")


def test_a_file_named_twice_is_converted_once(checkpoints, tmp_path, monkeypatch):
    picture(12, 12, "L").save(tmp_path / "a.png")
    compressed = []
    monkeypatch.setattr(Codec, "compress", lambda *_: compressed.append("a") or b"")
    model, output = f"--model={checkpoints[1]}", f"--output={tmp_path}"
    run("compress", model, tmp_path, tmp_path / "a.png", output)
    assert compressed == ["a"]


def mistakes(directory):
    """{file: what the message says of it}, each with its content written."""
    picture(12, 12, "RGBA").save(directory / "alpha.png")
    picture(12, 12, "LA").save(directory / "grey_alpha.png")
    Image.fromarray(np.zeros((12, 12), np.uint16)).save(directory / "deep.png")
    picture(12, 12, "RGB").save(directory / "bitmap.bmp")
    picture(40, 40, "RGB").save(directory / "torn.png")
    content = (directory / "torn.png").read_bytes()
    (directory / "torn.png").write_bytes(content[: len(content) // 2])
    (directory / "text.png").write_text("no picture")
    (directory / "empty.png").write_bytes(b"")
    return {
        "alpha.png": "has transparency: convert it to 8-bit greyscale or RGB without transparency",
        "grey_alpha.png": "has transparency",
        "deep.png": "has 16 bits per channel",
        "bitmap.bmp": "is no PNG, JPEG or WebP image",
        "torn.png": "cannot be read",
        "text.png": "is no PNG, JPEG or WebP image",
        "empty.png": "is no PNG, JPEG or WebP image",
        "missing.png": "cannot be read (No such file or directory)",
    }


def test_an_image_that_cannot_be_read_is_one_line(checkpoints, tmp_path):
    for name, words in mistakes(tmp_path).items():
        with pytest.raises(SystemExit) as ended:
            run("compress", f"--model={checkpoints[3]}", tmp_path / name, f"--output={tmp_path}")
        message = str(ended.value)
        assert message.startswith(f"llvq.codec: {tmp_path / name} ")
        assert words in message
        assert "\n" not in message
    assert not list(tmp_path.glob("*.llvq*"))


def test_other_mistakes_are_one_line(checkpoints, tmp_path):
    picture(12, 12, "L").save(tmp_path / "a.png")
    for name in ("sub", "empty"):
        (tmp_path / name).mkdir()
    picture(12, 12, "L").save(tmp_path / "sub/a.jpg")
    (tmp_path / "a.llvq").write_bytes(b"LLVQ" + bytes(40))
    picture(12, 12, "RGB").save(tmp_path / "colours.png")
    model = f"--model={checkpoints[1]}"
    a, output = tmp_path / "a.png", f"--output={tmp_path}"
    missing = "--model=fashion_mnist/none"
    for (command, *arguments), words in {
        ("compress", missing, a, output): "no trained model 'fashion_mnist/none'",
        ("compress", model, a, tmp_path / "sub/a.jpg", output): "a.jpg would become",
        ("compress", model, a, f"--output={a}"): "is not a directory",
        ("compress", model, tmp_path / "empty", output): "empty has no files of .png, .jpg",
        ("compress", model, tmp_path / "colours.png", output): "the model's images are greyscale",
        ("decompress", model, a, output): "a.png: the stream is not of this program",
        ("decompress", model, tmp_path / "a.llvq", output): "a.llvq: the stream has version 0",
        ("decompress", model, tmp_path / "b.llvq", output): "b.llvq cannot be read",
    }.items():
        with pytest.raises(SystemExit) as ended:
            run(command, *arguments)
        assert str(ended.value).startswith("llvq.codec: ")
        assert words in str(ended.value)
        assert "\n" not in str(ended.value)


@pytest.mark.long
def test_a_photograph_takes_little_memory(tmp_path):
    """4,000×3,000 pixels through FFHQ's network, in a process of its own for each command."""
    config = tiny.config(
        "sparse_lattice",
        **{"model.image_shape": (1024, 1024, 3), "model.hidden_dims": (16, 32)},
        **{"model.latent_dim": 64},
    )
    state = create_state(config)
    checkpointing.save_for_inference(tmp_path / "model", state, config)
    y, x = np.mgrid[:3000, :4000]
    waves = [128 + 127 * np.sin(x / (50 + i) + y * y / 1e5) for i in range(3)]
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(tmp_path / "photo.png")
    model = f"--model={tmp_path / 'model'}"
    for arguments in (
        ("fit", model, tmp_path / "photo.png"),
        ("compress", model, tmp_path / "photo.png", f"--output={tmp_path / 'out'}"),
        ("decompress", model, tmp_path / "out/photo.llvq", f"--output={tmp_path / 'out'}"),
    ):
        child = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, arguments)],
            env={**os.environ, "XLA_FLAGS": ""},  # one device and compiled as for users
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        # Measured: 0.9 to 1.3 GB.
        assert int(child.stdout.splitlines()[-1]) < 4e9
    with Image.open(tmp_path / "out/photo.png") as decoded:
        assert decoded.size == (4000, 3000)


PEAK = """
import resource, sys
from llvq.codec.__main__ import main
main(sys.argv[1:])
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
