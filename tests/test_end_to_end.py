"""CelebA and FFHQ-1024, from official files to an evaluation: a narrow network, a few steps."""

import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

from configs import celeba, ffhq1024
from llvq.evaluate import evaluate
from llvq.train import train_and_evaluate
from tests import test_celeba, test_ffhq1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "get_config", "hidden_dims", "split"),
    [
        (test_celeba, celeba.get_config, (4,), "test"),
        (test_ffhq1024, ffhq1024.get_config, (4, 4), "validation"),
    ],
)
def test_train_and_evaluate_from_official_files(module, get_config, hidden_dims, split, tmp_path):
    module.write_folder(tmp_path / "official")
    data = module.load(tmp_path / "prepared", tmp_path / "official")
    config = get_config("sparse_lattice")
    config.batch_size = 8
    config.num_train_steps = 3
    config.model.hidden_dims = hidden_dims
    config.model.latent_dim = 8
    config.model.image_shape = data.image_shape
    assert int(train_and_evaluate(config, tmp_path / "run", data).step) == 3
    results = evaluate(tmp_path / "run", data)
    height, width, _ = data.image_shape
    vectors = (height // 2 ** len(hidden_dims)) * (width // 2 ** len(hidden_dims))
    images = data.num_images["train"] + data.num_images["validation"]
    assert results["num_quantized_vectors"] == images * vectors
    assert results["split"] == split
    assert 0 < results["reconstruction_loss"] < 1  # of values in [0, 1]
