"""The memory of one step as a picture: what was planned and, where it was recorded, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.memory.timeline import Timeline
from ..passes.memory.words import gib


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        planned: bytes by operator.
        title: above it.
        budget: a line across; None for none.
        forward, backward: measured bytes at moments that are evenly spread over each half; drawn over the plan, whose
            halves are stretched to them.
    """

    planned: Timeline
    title: str
    budget: int | None = None
    forward: Sequence[int] = ()
    backward: Sequence[int] = ()


def draw(picture: Picture, path: Path) -> None:
    """Draw it.

    Args:
        path: a ``.png``, ``.svg`` or ``.pdf`` file; folders are made.
    """
    from matplotlib.figure import Figure

    timeline, there = picture.planned, picture.planned.standing
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    count = len(timeline.names)
    flat = {"weights": there.weights, "trained": there.trained, "optimiser": there.optimiser}
    rows = {name: [size] * count for name, size in flat.items()}
    rows |= {"kept for backward": list(timeline.kept), "gradients": list(timeline.gradients)}
    rows |= {"working": [w + there.library for w in timeline.working]}
    scaled = [[size / 2**30 for size in row] for row in rows.values()]
    axes.stackplot(range(count), *scaled, labels=list(rows), step="mid", linewidth=0)
    for values, start, end in ((picture.forward, 0, timeline.turn), (picture.backward, timeline.turn, count)):
        if len(values):
            places = np.linspace(start, max(start, end - 1), len(values))
            label = "measured" if start == 0 or not picture.forward else None
            axes.plot(places, np.asarray(values) / 2**30, color="black", linewidth=0.8, label=label)
    _lines(axes, picture)
    axes.set(xlabel="operators: forward, then backward", ylabel="GiB", title=picture.title)
    axes.set_xlim(0, max(1, count - 1))
    axes.legend(loc="lower left", fontsize=8, ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _lines(axes: Any, picture: Picture) -> None:
    timeline = picture.planned
    if picture.budget is not None:
        axes.axhline(picture.budget / 2**30, color="black", linestyle="--", linewidth=1, label="budget")
    axes.axvline(timeline.turn, color="grey", linestyle=":", linewidth=1)
    if not timeline.names:
        return
    axes.annotate(
        f"peak {gib(timeline.peak)} at {timeline.names[timeline.worst]}",
        (timeline.worst, timeline.peak / 2**30),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
