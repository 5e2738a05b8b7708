"""The place for a run's results: is it free, can it be written, is there room."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from . import checkpoints
from .config import TrainConfig

SPARE_BYTES = 64 * 2**20
"""Disk space for what is small: configuration, log, curve."""


class OutputError(ValueError):
    """The results cannot be written where they should go."""


def check_output(config: TrainConfig, *, make: bool = True) -> Path:
    """Find out whether results can go to ``output_dir``, and whether there is what the run resumes from.

    Args:
        make: create the folder, and prove that a file can be written there.

    Returns:
        the folder, or the one above it that exists.

    Raises:
        OutputError: when it is a file, holds a model already, or cannot be written.
        CheckpointError: when there is nothing to resume from.
    """
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir {folder} is a file")
    done = [n for n in ("adapter_config.json", "config.json") if (folder / n).exists()]
    if done and not config.overwrite:
        raise OutputError(f"output_dir {folder} already holds a model ({done[0]}); choose another, or set overwrite")
    resume = config.trainer.get("resume_from_checkpoint")
    if resume and not (checkpoints.checkpoints(folder) if resume is True else Path(str(resume)).exists()):
        wanted = f"checkpoint in {folder}" if resume is True else f"checkpoint {resume}"
        raise checkpoints.CheckpointError(f"there is no {wanted} to resume from")
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except OSError as error:
        raise OutputError(f"output_dir {folder} cannot be written: {error.strerror}") from None
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "read-only" if above.is_dir() else "a file"
        raise OutputError(f"output_dir {folder} cannot be written: {above} is {reason}")
    return above


def check_space(config: TrainConfig, model: Any) -> None:
    """Find out whether what will be trained fits on the disk, checkpoints included.

    Raises:
        OutputError: saying what is needed and what is free.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # A checkpoint holds Adam's two moments as well; the third is being written while two are kept.
    copies = 1 if save_strategy(config) == "no" else 1 + 3 * 3
    needed, free = trained * copies + SPARE_BYTES, shutil.disk_usage(config.output_dir).free
    if free < needed:
        raise OutputError(
            f"output_dir {config.output_dir} has {free / 2**20:,.0f} MiB free; the run needs {needed / 2**20:,.0f} MiB"
        )


def save_strategy(config: TrainConfig) -> str:
    """Adapters are small; a checkpoint of all parameters with Adam's moments is three times the model."""
    return str(config.trainer.get("save_strategy", "steps" if config.use_peft else "no"))
