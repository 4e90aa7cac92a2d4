"""README and docs/: their snippets run, their commands parse, and what they name exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import nbclient
import nbformat
import numpy as np
import pytest

from llvq.evaluation import metrics
from llvq.models import NETWORKS
from llvq.quantizers import QUANTIZERS
from llvq.training.objective import LOSSES
from llvq.training.optimizer import OPTIMIZERS
from llvq.training.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# These show command lines, too, in their docstrings.
SCRIPTS = [ROOT / "main.py", *sorted((ROOT / "configs").glob("*.py"))]

MAX_README_LINES = 150

# Long runs are cut short: what is printed is what runs, but for these words.
SHORTER = {"num_train_steps=200": "num_train_steps=2"}

# Paths that the pages use as examples.
EXAMPLES = {
    "llvq/quantizers/uniform.py",
    "input_pipeline/NAME.py",
    "checkpoints/STEP",
    "checkpoints/STEP/code_model.npz",
}


def name(path):
    return str(path.relative_to(ROOT))


def each(paths):
    return pytest.mark.parametrize("page", paths, ids=name)


def blocks(page, language):
    """The fenced blocks of a language, each with the number of its first line."""
    text = page.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start(1)].count("\n") + 1, match[1]


def pages_with(language):
    return [page for page in PAGES if any(blocks(page, language))]


def joined(text):
    """Text whose continued shell lines are one line each."""
    return re.sub(r"\\\n\s*", "", text)


@pytest.fixture
def _registries():
    """Takes back what a page registers."""
    registries = QUANTIZERS, NETWORKS, LOSSES, OPTIMIZERS, SCHEDULES, metrics.METRICS
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def _quick_compilation():
    """Compiles in less than half of the time what then runs for a step or two."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def prelude():
    """What the snippets use and do not define."""
    rng = np.random.default_rng(0)
    return {
        "__name__": "__main__",
        "train_images": rng.integers(0, 256, (64, 28, 28, 1), np.uint8),
        "validation_images": rng.integers(0, 256, (16, 28, 28, 1), np.uint8),
    }


def run_snippets(page, *, until=None):
    """Runs a page's snippets in order, in one namespace, up to the one that holds `until`."""
    namespace = prelude()
    for line, code in blocks(page, "python"):
        for text, shorter in SHORTER.items():
            code = code.replace(text, shorter)
        # Empty lines in front: a traceback then names the line of the page.
        program = compile("\n" * (line - 1) + code, page, "exec")
        exec(program, namespace)
        if until and until in code:
            return


@pytest.mark.parametrize(
    "page",
    [
        # One snippet for each quantizer, op by op: 20 s.
        pytest.param(page, marks=[pytest.mark.slow] if page.name == "quantizers.md" else [])
        for page in pages_with("python")
    ],
    ids=name,
)
@pytest.mark.usefixtures("_registries", "_quick_compilation")
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippets(page)


def test_shortened_runs_are_those_of_the_pages():
    text = "".join(page.read_text() for page in PAGES)
    assert all(words in text for words in SHORTER)


@each([*PAGES, *SCRIPTS])
@pytest.mark.usefixtures("_registries")
def test_main_accepts_every_command_line_shown(page, tmp_path, monkeypatch):
    text = joined(page.read_text())
    commands = re.findall(r"python main\.py((?: --[\w.]+(?:=[^\s'\"`]+)?)*)(.?.?)", text)
    assert len(commands) == text.count("python main.py")
    if not commands:
        return
    pytest.importorskip("ml_collections", reason="main.py parses configs with it")
    from tests.fuzz_targets import parse

    monkeypatch.setattr(sys, "argv", ["main.py"])
    if "QUANTIZERS[" in text:  # a quantizer of the page, which its commands name
        monkeypatch.chdir(tmp_path)
        run_snippets(page, until="QUANTIZERS[")
    monkeypatch.chdir(ROOT)
    for flags, what_follows in commands:
        if not flags and what_follows.strip() != "…":
            continue  # the program's name in a sentence
        if "…" in flags or what_follows.strip().startswith("…"):
            continue  # a placeholder
        if "--help" in flags:
            continue
        outcome, result = parse(flags.split())
        assert outcome == "done", f"{name(page)}: main.py{flags}: {result}"


@each(PAGES)
def test_every_program_named_exists(page):
    text = page.read_text()
    programs = re.findall(r"python ((?:[\w]+/)*\w+\.py)", text)
    programs += re.findall(r"(?<![\w/])\./([\w./]+\.sh)", text)
    missing = [program for program in programs if not (ROOT / program).is_file()]
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        if not (ROOT / module.split(".")[0]).is_dir():
            missing += [module] if importlib.util.find_spec(module) is None else []
        elif not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            missing.append(module)
    assert not missing


@each(PAGES)
def test_scripts_take_the_options_shown(page):
    for script, arguments in re.findall(r"\./((?:run|test)\.sh)((?: [^\s`]+)+)", page.read_text()):
        for option in re.findall(r" (--\w+)(?=[=\s]|$)", arguments):
            if not option.startswith("--hypothesis"):  # pytest's
                assert option in (ROOT / script).read_text(), f"{script} {option}"


@each(pages_with("sh"))
def test_shell_blocks_are_shell(page):
    for line, block in blocks(page, "sh"):
        result = subprocess.run(
            ["sh", "-n"], input=block, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{name(page)}:{line}: {result.stderr}"


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@each([*PAGES, ROOT / "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name(page)} links to {target}"


@each(PAGES)
def test_files_in_the_text_exist(page):
    """Paths in backticks, such as `llvq/train.py` or `docs/`, from the root of the repository."""
    tops = "llvq|input_pipeline|configs|benchmarks|checkpoints|results|tests|docs"
    paths = re.findall(rf"`((?:{tops})/[\w./-]*)`", page.read_text())
    assert [path for path in paths if path not in EXAMPLES and not (ROOT / path).exists()] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def flatten(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_config_field_is_described():
    pytest.importorskip("ml_collections", reason="configs are ConfigDicts")
    from configs import fashion_mnist

    config = fashion_mnist.get_config("vq").to_dict()
    fields = {
        field
        for field in flatten(config)
        if not field.startswith("quantizer.") or field == "quantizer.name"
    }
    text = (ROOT / "docs/training.md").read_text()
    section = text.split("\n## Losses")[1].split("\n## Quantizer options")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    described = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert described == fields


@pytest.mark.slow  # compiles a model of photographs: half a minute
def test_the_tour_runs_and_shows_what_it_shows():
    book = nbformat.read(ROOT / "docs/tour.ipynb", as_version=4)
    shown = [kinds(cell) for cell in book.cells]
    place = {"metadata": {"path": str(ROOT / "docs")}}
    nbclient.NotebookClient(book, timeout=300, resources=place).execute()
    assert [kinds(cell) for cell in book.cells] == shown


def kinds(cell):
    """The types of a cell's outputs, without messages. They are a set: a text may come in parts."""
    outputs = cell.get("outputs", [])
    return {output.output_type for output in outputs if output.get("name") != "stderr"}
