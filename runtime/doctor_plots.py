"""What the doctor looked at, as pictures: lengths of rows, how much of them is trained on, and the embedding's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..models.doctor import Subject
from ..models.doctor.weights import untrained
from .curves import write_png

POINTS = 4000
"""Rows of the embedding that are drawn, of those that are trained."""


def draw(subject: Subject, folder: Path) -> list[Path]:
    """Draw what there is: ``lengths.png`` and ``labels.png`` of data, ``norms.png`` and ``pca.png`` of weights.

    Returns:
        the files.

    Raises:
        OSError: when they cannot be written.
    """
    found = []
    if subject.rows:
        found += [
            write_png(_lengths(subject), folder / "lengths.png"),
            write_png(_labels(subject), folder / "labels.png"),
        ]
    if subject.tensors is not None and subject.tensors.embedding is not None:
        found += [write_png(_norms(subject), folder / "norms.png"), write_png(_pca(subject), folder / "pca.png")]
    return found


def _axes(**words: str) -> tuple[Figure, Any]:
    # Not by pyplot, which chooses a backend for the whole process and keeps every figure.
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(**words)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lengths(subject: Subject) -> Figure:
    lengths = [len(row.ids) for row in subject.rows or ()]
    figure, axes = _axes(title=f"{len(lengths)} rows of the data", xlabel="tokens", ylabel="rows")
    axes.hist(lengths, bins=min(40, max(1, max(lengths) - min(lengths) + 1)), color="tab:blue")
    limit = subject.run.max_length if subject.run is not None else None
    if limit is not None:
        axes.axvline(
            limit, color="tab:red", label=f"max_length {limit:,}: {sum(n > limit for n in lengths)} are longer"
        )
        axes.legend(frameon=False)
    return figure


def _labels(subject: Subject) -> Figure:
    limit = subject.run.max_length if subject.run is not None else None
    shares = [np.mean([label >= 0 for label in row.labels[:limit]]) for row in subject.rows or () if row.labels]
    figure, axes = _axes(title="what is trained on", xlabel="share of a row's tokens with a label", ylabel="rows")
    axes.hist(shares, bins=20, range=(0, 1), color="tab:green")
    return figure


def _norms(subject: Subject) -> Figure:
    assert subject.tensors is not None and subject.tensors.embedding is not None
    name = subject.tensors.embedding
    norms = subject.tensors.row_norms(name).numpy()
    figure, axes = _axes(title=name, xlabel="token", ylabel="norm of its row")
    axes.plot(norms, ",", color="tab:blue", rasterized=True)
    bad = sorted(untrained(subject.tensors, name))
    if bad:
        axes.plot(bad, norms[bad], "x", color="tab:red", label=f"{len(bad):,} that look untrained")
    used = sorted({i for row in subject.rows or () for i in row.ids if i < len(norms)})
    if used:
        axes.plot(used, norms[used], ".", markersize=2, color="tab:orange", label=f"{len(used):,} that the data uses")
    if bad or used:
        axes.legend(frameon=False)
    return figure


def _pca(subject: Subject) -> Figure:
    """The rows' two principal components; untrained rows fall into one point, apart from the others."""
    assert subject.tensors is not None and subject.tensors.embedding is not None
    name = subject.tensors.embedding
    rows = subject.tensors.read(name).float().cpu()
    special = sorted({i for i in getattr(subject.tokenizer, "all_special_ids", []) if i < len(rows)})
    bad = sorted(untrained(subject.tensors, name))
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:POINTS]
    centre = rows.mean(0)
    _, axes_of = torch.linalg.eigh(torch.cov(rows.T))
    components = axes_of[:, [-1, -2]]

    def at(which: Any) -> np.ndarray:
        return ((rows[which] - centre) @ components).numpy().T

    figure, axes = _axes(title=name, xlabel="first principal component", ylabel="second")
    axes.plot(*at(drawn), ".", markersize=2, color="tab:blue", alpha=0.5, label="tokens", rasterized=True)
    for which, colour, word in ((special, "tab:orange", "special"), (bad, "tab:red", "untrained")):
        if which:
            axes.plot(*at(which), "x", color=colour, label=f"{len(which):,} {word}")
    axes.legend(frameon=False)
    return figure
