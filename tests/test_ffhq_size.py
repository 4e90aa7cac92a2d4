"""Evaluation at 1024×1024, from PNG files to evaluation.json, in an ordinary machine's memory."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

from input_pipeline import ffhq1024
from tests.image_data import encode, picture
from tests.run_ffhq_size import NUM_IMAGES

TOTAL = sum(NUM_IMAGES.values())


@pytest.mark.long
def test_evaluation_of_full_size_images_in_batches_of_two(tmp_path):
    for index in range(TOTAL):
        path = tmp_path / "manual/images1024x1024" / ffhq1024._path(index, 1000)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(index, 1024, 1024), "PNG"))
    child = subprocess.run(
        [sys.executable, "-m", "tests.run_ffhq_size", str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": ""},  # one device: batches of two do not divide by eight
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout.splitlines()[-1])
    assert results["num_devices"] == 1
    assert results["split"] == "validation"
    assert results["num_quantized_vectors"] == TOTAL * 256 * 256
    # An untrained decoder's last layer gives about 0: what is lost is about the images' square.
    squares = [
        np.mean((np.asarray(picture(index, 1024, 1024)) / 255.0) ** 2)
        for index in range(NUM_IMAGES["train"], TOTAL)
    ]
    assert results["reconstruction_loss"] == pytest.approx(np.mean(squares), rel=0.5)
    # Measured: 1.4 GB. Four is half of a small laptop's.
    assert results["peak_bytes"] < 4e9
