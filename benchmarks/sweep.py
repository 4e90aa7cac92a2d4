"""Time of a training step against codebook size, batch size and image size: VQ and the lattice.

    python benchmarks/sweep.py [--repeats=7] [--output=results/benchmarks.json]

Times whole training steps of FashionMNIST's network (Adam, random images). By default the codebook
has 512 vectors and a step takes 64 images of 28×28; each of the three varies over a range, with 8
images per step where their size varies. The two quantizers run in turns. For a lattice, the
codebook size only sets the initial basis. results/README.md plots the file named above.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

from benchmarks import comparison
from benchmarks.measure import Case, Contender
from benchmarks.settings import abstract_model, get_config
from benchmarks.train_step import prepare_llvq
from llvq.config import TrainConfig
from llvq.errors import one_line_exit
from llvq.models import factory
from llvq.runtime import host_memory

PROGRAM = "sweep.py"
CODEBOOK_SIZE, BATCH_SIZE, IMAGE_SIZE = "codebook size K", "images per step", "height and width"
SWEEPS: dict[str, Sequence[int]] = {
    CODEBOOK_SIZE: [2**i for i in range(6, 17, 2)],
    BATCH_SIZE: [2**i for i in range(3, 10)],
    IMAGE_SIZE: [28, 56, 84, 112, 168, 224],
}
_QUANTIZERS = ("vq", "sparse_lattice")


def make_config(quantizer: str, varied: str, value: int) -> TrainConfig:
    """Returns FashionMNIST's config with one value of a sweep."""
    if varied == CODEBOOK_SIZE:
        return get_config("fashion_mnist", quantizer, options={"codebook_size": value})
    if varied == BATCH_SIZE:
        return get_config("fashion_mnist", quantizer, batch_size=value)
    return get_config("fashion_mnist", quantizer, batch_size=8, image_size=value)


def num_parameters(quantizer: str, codebook_size: int) -> int:
    """Counts the parameters of a sweep's quantizer."""
    config = make_config(quantizer, CODEBOOK_SIZE, codebook_size)
    _, params, statistics = factory.split(abstract_model(config))
    return factory.num_parameters([params["quantizer"], statistics.get("quantizer", {})])


def _case(varied: str, value: int) -> Case:
    configs = {quantizer: make_config(quantizer, varied, value) for quantizer in _QUANTIZERS}
    contenders: dict[str, Callable[[], Contender]] = {
        quantizer: functools.partial(prepare_llvq, config, "train")
        for quantizer, config in configs.items()
    }
    amount = configs[_QUANTIZERS[0]].batch_size
    return Case({"varied": varied, "value": value}, amount, contenders)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = comparison.make_parser(PROGRAM, __doc__).parse_args(arguments)
    with one_line_exit(PROGRAM):
        comparison.check_options(options)
        cases = [_case(varied, value) for varied, values in SWEEPS.items() for value in values]
        comparison.record(PROGRAM, ("jax", "flax"), cases, "images", options)


if __name__ == "__main__":
    main()
