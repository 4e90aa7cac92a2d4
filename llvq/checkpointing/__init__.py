"""Checkpoints of a run, in WORKDIR/checkpoints, and checkpoints to evaluate."""

from llvq.checkpointing.integrity import require_writable
from llvq.checkpointing.manager import describe_newest, open_manager, save, save_for_inference
from llvq.checkpointing.reading import (
    Checkpoint,
    absolute,
    config_of,
    find,
    load,
    load_for,
    model_of,
    resume,
)
from llvq.checkpointing.saved_config import check_initial, check_resumable, from_saved

__all__ = [
    "Checkpoint",
    "absolute",
    "check_initial",
    "check_resumable",
    "config_of",
    "describe_newest",
    "find",
    "from_saved",
    "load",
    "load_for",
    "model_of",
    "open_manager",
    "require_writable",
    "resume",
    "save",
    "save_for_inference",
]
