"""Random command lines and configs: each is run, or refused in one line that names its mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

pytest.importorskip("ml_collections", reason="main.py parses configs with ml_collections")

from configs import default, fashion_mnist
from llvq.config import RECIPES
from llvq.fields import flatten, plain
from llvq.quantizers.registry import complete
from llvq.training.schedules import SCHEDULES
from tests import fuzz_targets, processes, tiny

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = settings.default.max_examples
FIELDS = sorted({name for q in tiny.NAMES for name in flatten(plain(default.get_config(q)))})

ODD = "None nan inf -inf () [] {} (8 vq float64 bfloat16 constant first_epoch = -- '"
GOOD = """
batch_size=8 num_epochs=2 num_train_steps=10 seed=4294967295 learning_rate=1 keep_checkpoints=9
compute_dtype=bfloat16 compute_dtype=float64 schedule=first_epoch model.hidden_dims=(8,16)
model.hidden_dims=8 model.latent_dim=1 model.num_residual_blocks=0 model.value_range=(-1,1.5)
dataset.manual_dir=ä dataset.data_dir=~ quantizer.commitment_cost=0 log_every_steps=1
"""
OTHER_FLAGS = """
--mode=evaluate --mode=play --mode --checkpoint=x --config --workdir= --noconfig train
--config.seed --noconfig.seed -- -config.seed=3 --x=1
"""

numbers = st.one_of(
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["1e-3", "0x10", "1_000", "010", "1e400", "-0", "８", "١", "2147483648", "4294967296"]
        + [str(10**n) for n in (5, 9, 12, 18, 19, 30, 400)]
        + ["9" * 5000, "10**3", "1/2", "True", "false"]
    ),
)
literals = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=3),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3),
    ),
    max_leaves=6,
).map(repr)
tuples = st.lists(numbers, max_size=4).map(lambda items: f"({', '.join(items)},)")
# What an argument of a process cannot hold is "\0".
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=12)
odd = st.sampled_from(
    ["", " ", "8,", "(8, 'a')", "lambda: 0", "a\nb", "\u2028", "[" * 300, *ODD.split()]
)
values = st.one_of(numbers, tuples, literals, texts, odd)

names = st.one_of(
    st.sampled_from(FIELDS),
    st.sampled_from(FIELDS),
    st.sampled_from(["model", "quantizer", "dataset", "", ".", "model.", "modell", "lr", "seed.x"]),
    st.sampled_from(FIELDS).map(lambda name: f"{name}.0"),
    texts,
)
overrides = st.tuples(names, values).map(lambda pair: f"--config.{pair[0]}={pair[1]}")
good = st.sampled_from(GOOD.split()).map("--config.{}".format)
# Whole sections, with one of their fields changed to anything.
plain_configs = [plain(fashion_mnist.get_config(q)) for q in tiny.NAMES]


@st.composite
def sections(draw):
    config = draw(st.sampled_from(plain_configs))
    name = draw(st.sampled_from(["model", "quantizer", "dataset"]))
    section = dict(config[name])
    field = draw(st.sampled_from([*section, "extra", 7]))
    if draw(st.booleans()):
        section.pop(field, None)
    else:
        section[field] = "VALUE"
    return f"--config.{name}={section!r}".replace("'VALUE'", draw(literals))


arguments = st.one_of(
    st.just(""),
    st.sampled_from([f":{q}" for q in tiny.NAMES]),
    st.lists(st.one_of(st.sampled_from([*tiny.NAMES, *RECIPES, ""]), texts), max_size=3).map(
        lambda parts: f":{','.join(parts)}"
    ),
)
files = st.one_of(
    st.sampled_from(
        [f"configs/{name}.py" for name in ("fashion_mnist", "celeba", "ffhq1024", "image_folder")]
    ),
    st.sampled_from(["configs/default.py", "configs", "README.md", "configs/mnist.py", "", "main"]),
)
other_flags = st.sampled_from(OTHER_FLAGS.split())


@st.composite
def command_lines(draw):
    """Mostly a config that is fine with something that may not be."""
    usual = st.sampled_from(tiny.NAMES).map(lambda q: f"configs/fashion_mnist.py:{q}")
    config = draw(st.one_of(usual, usual, st.tuples(files, arguments).map("".join)))
    rest = draw(
        st.lists(st.one_of(good, good, overrides, overrides, sections(), other_flags), max_size=3)
    )
    line = [f"--config={config}", "--workdir=runs/fuzz", *rest]
    return draw(st.permutations(line)) if draw(st.integers(0, 9)) == 0 else line


def words(line):
    """What a message may name of a command line: flags, fields, config arguments and values."""
    words = {word for argument in line for word in re.split(r"[=:,.]|--", argument)}
    return words - {"", "config"} | {
        "--config is missing",
        "--workdir is missing",
        "--config: ",
        "flag --config",
    }


@pytest.fixture(scope="module")
def child():
    child = processes.Child()
    yield child
    child.stop()


@settings(max_examples=EXAMPLES)
@given(command_lines())
def test_command_lines(child, line):
    kind, result = child(fuzz_targets.parse, line)
    event(kind)
    if kind == "refused":
        assert result.startswith("main.py: ")
        assert any(word in result for word in words(line))
    else:
        for argument in line:  # what was accepted is what is run
            name, _, value = argument.partition("=")
            is_last = sum(other.startswith(name) for other in line) == 1
            if name in ("--config.batch_size", "--config.seed") and is_last and value.isdecimal():
                assert result[name.removeprefix("--config.")] == int(value)


@st.composite
def possible(draw, sizes, batch_sizes, image_shapes):
    """Configs that nothing is wrong with, each a plain dict."""
    quantizer = draw(st.sampled_from(tiny.NAMES))
    options = {
        "codebook_size": st.sampled_from([2, 3, 512, 2**24 if 2**16 in sizes else 64]),
        "commitment_cost": st.sampled_from([0, 0.0, 0.25, 3]),
        "gamma": st.sampled_from([-1.0, 0, 0.5, 1]),
        "decay": st.sampled_from([0, 0.5, 0.999]),
        "epsilon": st.sampled_from([1e-8, 1e-5, 1]),
        "distance": st.sampled_from(["euclidean", "cosine"]),
        "gradient": st.sampled_from(["straight_through", "rotation"]),
        # k-means numbers a batch's latents in int32.
        "initialization": st.sampled_from(
            ["random"] if 2**20 in batch_sizes else ["random", "batch"]
        ),
        "restart_threshold": st.sampled_from([0, 0.0, 0.1, 1]),
        "levels": st.sampled_from([(2,), (8, 5, 5, 5), [3, 1000]]),
        "num_bits": st.sampled_from([1, 18, 100]),
        "entropy_weight": st.sampled_from([0, 0.1, 3]),
        "temperature": st.sampled_from([0.01, 1]),
        "depth": st.sampled_from([1, 3]),
        "stage": st.sampled_from(["vq", "vq_ema", "simvq"]),
        "dropout": st.booleans(),
        "rate_weight": st.sampled_from([0, 1e-3, 1]),
        "warmup": st.sampled_from([0, 0.4, 1]),
        "initial_step": st.sampled_from([1e-6, 0.15, 100]),
        "training": st.sampled_from(["straight_through", "noise", "mixed"]),
        "block_size": st.sampled_from([1, 8]),
    }
    if quantizer == "lfq":
        options["codebook_size"] = st.sampled_from([2, 64, 2**18])
    # Or one that has to be a multiple of something.
    has_fixed_dim = quantizer in ("fsq", "lfq", "bsq") or "warmup" in complete(quantizer, {})
    fields = {
        "batch_size": st.sampled_from(batch_sizes),
        "seed": st.sampled_from([0, 1, 2**31, 2**32 - 1]),
        "learning_rate": st.sampled_from([0, 0.0, 1e-30, 1e-3, 1]),
        "schedule": st.sampled_from([*SCHEDULES]),
        "compute_dtype": st.sampled_from(["float32", "float32", "bfloat16", "float64"]),
        "keep_checkpoints": st.sampled_from([1, 2, 2**31 - 1]),
        "steps_per_call": st.sampled_from([1, 2, 2**20]),
        "log_every_steps": st.sampled_from([1, 2, 2**31 - 1]),
        "eval_every_steps": st.sampled_from([1, 2, 2**31 - 1]),
        "checkpoint_every_steps": st.sampled_from([1, 2, 2**31 - 1]),
        "model.hidden_dims": st.lists(st.sampled_from(sizes), min_size=1, max_size=2).map(tuple),
        "model.latent_dim": st.sampled_from([0] if has_fixed_dim else [0, *sizes]),
        "model.latent_activation": st.sampled_from(["leaky_relu", "none"]),
        "model.output_activation": st.sampled_from(["leaky_relu", "none"]),
        "loss.mse": st.sampled_from([0, 0.5, 1]),
        "loss.l1": st.sampled_from([0, 1.0]),
        "loss.ssim": st.sampled_from([0, 0.1]),
        "loss.quantizer": st.sampled_from([0, 1]),
        "optimizer.clip_norm": st.sampled_from([0, 0.1]),
        "optimizer.accumulate_steps": st.sampled_from([1, 2, 8]),
        "optimizer.ema_decay": st.sampled_from([0, 0.9]),
        "model.num_residual_blocks": st.sampled_from([0, 1, 2]),
        "model.image_shape": st.sampled_from(image_shapes),
        "model.value_range": st.sampled_from([(0, 1), (-0.5, 0.5), [0.0, 255.0], (-1e-9, 1e9)]),
        **{f"quantizer.{name}": options[name] for name in options.keys() & complete(quantizer, {})},
    }
    return tiny.config(quantizer, **{name: draw(value) for name, value in fields.items()})


@settings(max_examples=max(EXAMPLES // 40, 1))
@given(
    possible(
        sizes=[1, 2, 64, 257, 2**16],
        batch_sizes=[8, 24, 2**20],
        image_shapes=[(12, 12, 1), (28, 28, 1), (12, 148, 3), (1024, 1024, 3)],
    )
)
def test_what_is_accepted_can_be_given_to_xla(child, config):
    """However large, traced for eight devices."""
    kind, result = child(fuzz_targets.trace, config)
    assert kind == "done", result


@pytest.mark.slow
@settings(max_examples=max(EXAMPLES // 150, 1))
@given(possible(sizes=[1, 3, 8], batch_sizes=[8, 16, 104], image_shapes=[(12, 12, 1)]))
def test_what_is_accepted_trains(child, tmp_path_factory, config):
    """Or diverges, with learning rates, value ranges and gammas that nobody would use."""
    config["num_train_steps"] = 2
    workdir = tmp_path_factory.mktemp("run")
    kind, result = child(fuzz_targets.train_tiny, config, str(workdir))
    assert result == 2 if kind == "done" else "stopped" in result


@pytest.mark.slow
@settings(max_examples=max(EXAMPLES // 100, 1))
@given(command_lines())
def test_command_lines_as_a_user_types_them(line):
    """In a process of their own, up to the data, which lies nowhere."""
    line = [argument.encode("utf-8", "surrogateescape") for argument in _encodable(line)]
    line += [b"--config.dataset.manual_dir=/nowhere"]
    result = subprocess.run(
        [sys.executable, "main.py", *line], cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    console = result.stderr.decode("utf-8", "replace")
    assert result.returncode == 1, console
    assert "Traceback" not in console
    lines = [text for text in console.splitlines() if text.startswith("main.py: ")]
    assert len(lines) == 1, console
    assert console.splitlines()[-1] == lines[0]


def _encodable(line):
    """What a shell can hand over; surrogates other than undecodable bytes cannot be."""
    for argument in line:
        try:
            argument.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            assume(False)
        yield argument
