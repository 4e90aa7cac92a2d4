"""Checkpoints of a run, in WORKDIR/checkpoints, and checkpoints to evaluate."""

from llvq.checkpointing.integrity import require_writable
from llvq.checkpointing.manager import describe_newest, open_manager, save, save_for_inference
from llvq.checkpointing.reading import (
    Checkpoint,
    absolute,
    find,
    load,
    model_of,
    resume,
)

__all__ = [
    "Checkpoint",
    "absolute",
    "describe_newest",
    "find",
    "load",
    "model_of",
    "open_manager",
    "require_writable",
    "resume",
    "save",
    "save_for_inference",
]
