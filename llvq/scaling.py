"""Batches that grow with the number of devices, and what has to change with them.

Where a config's images_per_device is above 0, its other numbers are meant for its batch_size, and a
run takes images_per_device times the number of devices instead. With k times as many images a step,
and so 1/k of the steps (num_train_steps, if it is given, stays as it is):

  learning rate    × √k, Adam's rule (Malladi et al. 2022, arXiv 2205.10287)
  EMA decay        to the power of k: it forgets as fast an image (Busbridge et al. 2023,
                   arXiv 2307.13813)
  intervals        of logs, evaluations and checkpoints: 1/k of the steps, at least one
  warm-up          a share of the steps (llvq/schedules.py), so as many images as before
"""

import math

from llvq.config import INTERVALS, Config, to_plain


def global_batch_size(config: Config, num_devices: int) -> int:
    """How many images a step takes, over all devices and hosts."""
    return config["images_per_device"] * num_devices or config["batch_size"]


def scale(config: Config, num_devices: int, saved_batch_size: int | None) -> Config:
    """The config of a run, with nothing left to derive: its images_per_device is 0.

    Args:
      config: as the user gave it.
      num_devices: over all hosts.
      saved_batch_size: of the run that is gone on with, if it is: it stays, on whatever number of
        devices.
    """
    if not config["images_per_device"]:
        return config
    batch_size = saved_batch_size or global_batch_size(config, num_devices)
    factor = batch_size / config["batch_size"]
    scaled = to_plain(config)
    scaled["images_per_device"] = 0
    scaled["batch_size"] = batch_size
    scaled["learning_rate"] *= math.sqrt(factor)
    if "decay" in scaled["quantizer"]:
        scaled["quantizer"]["decay"] **= factor
    for name in INTERVALS:
        scaled[name] = max(1, round(scaled[name] / factor))
    return scaled
