"""The loss of a run as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SMOOTHING = 1 / 20
"""A smoothed point is the mean over this part of the run, before it and after it."""


def plot_loss(history: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the training loss, faint and smoothed, and the loss on held-out rows; returns the path of the PNG.

    The file appears when it is whole, or not at all.

    Args:
        history: entries as transformers logs them, in any order: ``{"step": 10, "loss": 2.1}`` and
            ``{"step": 10, "eval_loss": 2.3}``, in nats per token. Other entries, and losses that are not finite, are
            left out. A run too short to log a loss has ``train_loss``, its mean, which is drawn then.
        path: where the PNG goes; its folder is made.

    Raises:
        ValueError: when the history holds no loss.
        OSError: when the file cannot be written.
    """
    history = list(history)
    training = _points(history, "loss") or _points(history, "train_loss")
    held_out = _points(history, "eval_loss")
    if not training and not held_out:
        raise ValueError(f"no loss to plot: none of the history's {len(history)} entries has a step and a finite loss")
    # Not by pyplot, which chooses a backend for the whole process and keeps every figure.
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if training:
        _draw_training(axes, *zip(*training, strict=True))
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="tab:orange", label="held out")
        for step, loss in {held_out[0], held_out[-1]}:
            axes.annotate(f"{loss:.3f}", (step, loss), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.05, y=0.1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return write_png(figure, Path(path))


def _points(history: list[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, loss) in the order of the steps."""
    found = [(entry["step"], float(entry[name])) for entry in history if "step" in entry and name in entry]
    return sorted(point for point in found if math.isfinite(point[1]))


def _draw_training(axes: Any, steps: Sequence[int], losses: Sequence[float]) -> None:
    reach = int(len(losses) * SMOOTHING)
    if reach == 0:  # too few to smooth
        axes.plot(steps, losses, ".-", color="tab:blue", label="training")
        return
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training")
    axes.plot(steps, smoothed(losses, reach), color="tab:blue", linewidth=2, label="training, smoothed")


def smoothed(values: Sequence[float], reach: int) -> np.ndarray:
    """Each value's mean with up to ``reach`` neighbours on either side; at the ends there are fewer. float64."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def write_png(figure: Figure, path: Path) -> Path:
    """Write a figure; the file appears when it is whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(aside, format="png")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
