"""Checkpoints of a run, in WORKDIR/checkpoints, and checkpoints to evaluate."""

from llvq.checkpointing.checkpoints import *  # noqa: F403
