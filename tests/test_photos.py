"""The comparison on colour images: its runs, and what it measures of photographs."""

import io

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the command reads images with it")

from PIL import Image

from llvq import Codec, checkpointing, load_pretrained
from results import other_codecs, photo_runs, photos
from tests import tiny
from tests.runs import create_state


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / (9 + i) + y / 17) for i in range(3)]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("format_name", ["JPEG", "WebP"])
def test_the_nearest_file(format_name):
    pixels = smooth(120, 90)
    sizes = []
    for quality in range(101):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format_name, quality=quality)
        sizes.append(len(buffer.getvalue()))
    # WebP's sizes fall by some bytes here and there.
    slack = 0.02 if format_name == "WebP" else 0.0
    for num_bytes in (0, 1500, 3000, sizes[100], 10**6):
        best = min(abs(size - num_bytes) for size in sizes)
        found = abs(len(other_codecs.nearest_file(pixels, format_name, num_bytes)) - num_bytes)
        assert found <= best + slack * min(num_bytes, sizes[100])
        assert Image.open(io.BytesIO(other_codecs.nearest_file(pixels, format_name, num_bytes)))


def test_what_is_measured(tmp_path):
    config = tiny.config("fsq", **{"model.image_shape": (12, 12, 3)})
    state = create_state(config)
    checkpointing.save_for_inference(tmp_path / "model", state, config)
    photographs = [smooth(180, 200), smooth(200, 180)]
    images = [image[None] for image in photographs]
    codec = Codec.fit(load_pretrained(tmp_path / "model"), images)
    found = other_codecs.measure(codec, photographs)
    streams = list(map(codec.compress, images))
    bits = 8 * sum(map(len, streams)) / (2 * 180 * 200)
    assert found["llvq"]["coded_bits_per_pixel"] == pytest.approx(bits)
    psnr = 0.0
    for image, stream in zip(photographs, streams, strict=True):
        error = image.astype(np.float64) - codec.decompress(stream)[0]
        psnr += 10 * np.log10(255**2 / np.mean(error**2)) / 2
    assert found["llvq"]["psnr"] == pytest.approx(psnr, abs=1e-3)  # TensorFlow's float32
    assert found["llvq with contexts"]["psnr"] == found["llvq"]["psnr"]
    for figures in found.values():
        assert 0 < figures["ms_ssim"] <= 1
        assert 0 < figures["ssim"] <= 1

    photograph = smooth(300, 400)
    picture, num_bytes = other_codecs.compared(codec, photograph)
    stream = codec.compress(photograph[None])
    np.testing.assert_array_equal(picture[:240, :320], photograph[30:270, 40:360])
    np.testing.assert_array_equal(picture[:240, 320:], codec.decompress(stream)[0, 30:270, 40:360])
    assert picture.shape == (480, 640, 3)
    assert list(num_bytes) == ["pixels", "llvq", "JPEG", "WebP"]
    assert num_bytes["pixels"] == 300 * 400 * 3
    assert num_bytes["llvq"] == len(stream)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    for module in (photos, photo_runs):
        monkeypatch.setattr(module, "DIRECTORY", tmp_path / "photos")
    with pytest.raises(SystemExit, match=r"not found in .*: bsds500, .*; docs/data\.md says"):
        photos.main([f"--sources={tmp_path}", "--only", "photographs", "faces"])
    assert (tmp_path / "photos.md").read_text().startswith("# Models of photographs")


def test_seeds_share_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "DIRECTORY", tmp_path / "photos")
    names = ("coded_bits_per_vector", "coded_bits_per_pixel", "reconstruction_loss", "psnr", "ssim")
    runs = [photos.Run("faces", "fsq", (8, 5), seed) for seed in (2, 32)]
    photos.write(
        {
            run: {"evaluation": dict.fromkeys((*names, "effective_codebook_size"), value)}
            for run, value in zip(runs, (1, 3), strict=True)
        }
    )
    rows = (tmp_path / "photos.md").read_text().split("| --- |")[-1].splitlines()[1:]
    assert rows == [  # the deviation of a sample is sqrt(2)
        "| `fsq` | levels (8, 5) | 2, 32 | 2.000 ± 1.414 | 2.000 ± 1.414 | 2.00000 ± 1.41421 "
        "| 2.00 ± 1.41 | 2.000 ± 1.414 | 2 ± 1 |"
    ]


def test_folders_are_joined_split_by_split(tmp_path):
    for folder in ("a", "b"):
        for split in ("train", "validation", "test"):
            (tmp_path / folder / split).mkdir(parents=True)
            (tmp_path / folder / split / f"{folder}.png").write_bytes(b"")
    for _ in range(2):  # a second run finds the first one's links
        joined = photo_runs._joined([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    found = sorted(path.relative_to(joined).as_posix() for path in joined.glob("*/*/*.png"))
    assert found == [f"{s}/{f}/{f}.png" for s in ("test", "train", "validation") for f in "ab"]
    assert photo_runs._joined([tmp_path / "a"], tmp_path / "joined") == tmp_path / "a"
