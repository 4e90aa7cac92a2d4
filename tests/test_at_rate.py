"""One rate of a multirate model as a checkpoint of its own."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from llvq import at_rate, checkpointing
from llvq.errors import UserError
from llvq.training import train_state
from tests import tiny
from tests.runs import create_model

WEIGHTS = (0.1, 0.03)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """(model, path) of a multirate model whose rates differ."""
    config = tiny.config("multirate_lattice", **{"quantizer.rate_weights": WEIGHTS})
    model = create_model(config)
    for index, lattice in enumerate(model.quantizer.rates):
        lattice.log_steps[...] += 1 + index
    directory = tmp_path_factory.mktemp("several") / "checkpoint"
    state = train_state.create_train_state(model, optax.adam(1e-3))
    checkpointing.save_for_inference(directory, state, config)
    return model, directory


@pytest.mark.parametrize("rate", range(len(WEIGHTS)))
def test_the_network_with_one_of_the_lattices(rate, several, tmp_path):
    model, source = several
    at_rate.main([f"--checkpoint={source}", f"--rate={rate}", f"--output={tmp_path / 'one'}"])
    found = checkpointing.load(tmp_path / "one")
    assert found.config.quantizer.name == "e8_lattice"
    assert found.config.quantizer.options == {
        "rate_weight": WEIGHTS[rate],
        "warmup": 0.4,
        "initial_step": model.quantizer.rates[0].initial_step,
        "training": model.quantizer.rates[0].training,
    }
    one = checkpointing.model_of(found)
    images = tiny.images(3)

    @nnx.jit
    def by_hand(model, images):
        latents = model.encoder(model.to_floats(images))
        return model.quantizer.rates[rate].quantize(latents)[1]

    codes = by_hand(model, images)
    np.testing.assert_array_equal(nnx.jit(type(one).encode)(one, images), codes)
    np.testing.assert_array_equal(
        one.quantizer.lookup(codes), model.quantizer.rates[rate].lookup(codes)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(one.decoder)),
        nnx.to_pure_dict(nnx.state(model.decoder)),
    )


def test_mistakes_are_named(several, tmp_path):
    _, source = several
    with pytest.raises(UserError, match=r"^rate 2: .* has rates 0 to 1$"):
        at_rate.at_rate(source, 2, tmp_path / "none")
    with pytest.raises(UserError, match=r"^rate -1: "):
        at_rate.at_rate(source, -1, tmp_path / "none")
    with pytest.raises(UserError, match="exists already"):
        at_rate.at_rate(source, 0, source)
    at_rate.at_rate(source, 1, tmp_path / "one")
    with pytest.raises(UserError, match="is of e8_lattice: only multirate_lattice"):
        at_rate.at_rate(tmp_path / "one", 0, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match=r"^llvq\.at_rate: no checkpoint in .*/x: ") as ended:
        at_rate.main([f"--checkpoint={tmp_path / 'x'}", "--rate=0", f"--output={tmp_path / 'y'}"])
    assert "\n" not in str(ended.value)
