"""Trains on the tiny data set in a process of its own: python -m tests.run_tiny DIR QUANTIZER N."""

import sys

from llvq import train
from tests import tiny

if __name__ == "__main__":
    workdir, quantizer, num_train_steps = sys.argv[1:]
    config = tiny.config(quantizer, num_train_steps=int(num_train_steps), checkpoint_every_steps=1)
    train.train_and_evaluate(config, workdir, tiny.dataset())
