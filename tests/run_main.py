"""main.py, as it is, on the tiny data set instead of a real one: no TensorFlow is needed.

python -m tests.run_main WORKDIR NUM_TRAIN_STEPS SECONDS_A_BATCH [--mode=… and the like]
"""

import sys
import time

from absl import flags

import main
from llvq import evaluate, train
from tests import tiny


class SlowDataset:
    """The tiny data set, on a slow disk, so that training takes a while."""

    def __init__(self, seconds):
        self._data, self._seconds = tiny.dataset(), seconds
        self.image_shape, self.num_images = self._data.image_shape, self._data.num_images
        self.fingerprint = ""

    def batches(self, split, index_batches):
        for batch in self._data.batches(split, index_batches):
            time.sleep(self._seconds)
            yield batch


if __name__ == "__main__":
    workdir, num_steps, seconds, *options = sys.argv[1:]
    config = tiny.config(
        "vq_ema",
        num_train_steps=int(num_steps),
        checkpoint_every_steps=1000,
        eval_every_steps=20,
        log_every_steps=5,
        **{"model.num_residual_blocks": 0},
    )
    data = SlowDataset(float(seconds))
    run = {
        "train": lambda: train.train_and_evaluate(config, workdir, data),
        "evaluate": lambda: evaluate.evaluate(workdir, data),
    }
    main._run = lambda: run[main._MODE.value]()
    flags.FLAGS(["run_main.py", *options])
    main.main([])
