"""Speed over memory: our points under several budgets, and those of others, as one picture per workload."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from .step import RESULTS, read

Point = dict[str, Any]
"""What is drawn: "label", "gib" and "tokens_per_s"."""


def peers(folder: Path = RESULTS) -> dict[str, list[Point]]:
    """Committed rows of other systems, by workload, ``llama-8b:lora:2x2048 on NVIDIA H100 80GB HBM3``."""
    found: dict[str, list[Point]] = defaultdict(list)
    for path in sorted([*folder.glob("*.json"), *folder.glob("memory/*.json")]):
        for row in read(path):
            work = row.get("workload")
            if work is None or row.get("system") in (None, "ours", "recorded") or not row.get("peak_allocated_gib"):
                continue
            name = f"{work['shape']}:{work['mode']}:{work['batch']}x{work['seq']} on {row['device']}"
            ways = {"none": "", "hf": ", checkpointing", "unsloth": ", offloading"}
            label = row["system"] + ways.get(work["checkpointing"], f", {work['checkpointing']}")
            found[name].append({"label": label, "gib": row["peak_allocated_gib"], "tokens_per_s": row["tokens_per_s"]})
    return dict(found)


def draw(rows: list[dict[str, Any]], others: dict[str, list[Point]], path: Path) -> None:
    """Draw a panel for each workload with at least two points of ours.

    Args:
        rows: of ``benchmarks.memory``; failures are left out.
        others: as :func:`peers` gives them.
        path: a ``.png``, ``.svg`` or ``.pdf`` file.

    Raises:
        ValueError: where nothing was measured twice.
    """
    from matplotlib.figure import Figure

    by_workload: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "error" not in row and row["measured_gib"]:
            by_workload[f"{row['name']} on {row['device']}"].append(row)
    panels = {name: found for name, found in by_workload.items() if len(found) > 1}
    if not panels:
        raise ValueError("no workload has two measured points to draw")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (name, found) in zip(grid, panels.items(), strict=False):
        found = sorted(found, key=lambda r: r["measured_gib"])
        xs, ys = [r["measured_gib"] for r in found], [r["tokens_per_s"] for r in found]
        axes.plot(xs, ys, "o-", color="tab:blue", label="ours, by budget")
        for row in found:
            _label(axes, row["budget"], row["measured_gib"], row["tokens_per_s"])
        theirs = others.get(name, [])
        for point in theirs:
            axes.plot(point["gib"], point["tokens_per_s"], "s", color="tab:grey")
            _label(axes, point["label"], point["gib"], point["tokens_per_s"])
        axes.set(title=name.split(" on ")[0], xlabel="peak GiB", ylabel="tokens/s")
        axes.set_ylim(0, 1.15 * max([*ys, *(p["tokens_per_s"] for p in theirs)]))
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _label(axes: Any, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
