"""Rewrites the README's result tables from ``benchmarks/results/*.json``: ``python -m benchmarks.table``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .step import RESULTS, label, read

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


OURS = ("ours", "recorded")


def tables(folder: Path = RESULTS) -> str:
    """Markdown: ours over the best of the others, and a table per result file of a GPU, fastest system first."""
    measured = []
    for path in sorted(folder.glob("*.json")):
        rows = [r for r in read(path) if r.get("device") not in (None, "cpu") and r["system"] != "float32"]
        if rows:
            measured.append(rows)
    if not measured:
        return "No measurement has been committed yet."
    return "\n\n".join([ratios(measured), *map(_table, measured)])


def ratios(measured: list[list[dict[str, Any]]]) -> str:
    """Ours over the fastest other system, for each workload, of those that keep everything and of those that do not."""
    lines = [
        "| workload | tokens/s | fastest other | speed | memory |",
        "|---|---:|---|---:|---:|",
    ]
    for rows in measured:
        for saving in (False, True):
            alike = [r for r in rows if "error" not in r and _saves_memory(r) == saving]
            ours = [r for r in alike if r["system"] in OURS]
            others = [r for r in alike if r["system"] not in OURS]
            if ours and others:
                own, other = (max(part, key=lambda r: r["tokens_per_s"]) for part in (ours, others))
                speed, memory = (own[n] / other[n] for n in ("tokens_per_s", "peak_allocated_gib"))
                lines.append(
                    f"| {_workload(own)}{', memory saved' if saving else ''}, {own['device']} | "
                    f"{own['tokens_per_s']:,.0f} | {label(other)} | {speed:.2f} × | {memory:.2f} × |"
                )
    return "\n".join(lines)


def _saves_memory(row: dict[str, Any]) -> bool:
    work = row["workload"]
    return work["checkpointing"] != "none" or "memory_budget" in work["options"]


def _workload(row: dict[str, Any]) -> str:
    work = row["workload"]
    return f"{work['shape']} {work['mode']}, {work['batch']}×{work['seq']} tokens"


def _table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    versions = ", ".join(f"{n} {first['versions'][n]}" for n in ("torch", "transformers", "peft"))
    lines = [
        f"**{_workload(first)}**, {first['device']}, {versions}, {first['date']}",
        "",
        "| system | tokens/s | ms per step | peak GiB | first step s |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda r: -r.get("tokens_per_s", 0)):
        if "error" in row:
            lines.append(f"| {label(row)} | failed | | | |")
        else:
            lines.append(
                f"| {label(row)} | {row['tokens_per_s']:,.0f} | {row.get('ms_in_a_row', row['ms_median']):.1f} | "
                f"{row['peak_allocated_gib']:.2f} | {row['first_step_s']:.1f} |"
            )
    return "\n".join(lines)


def updated(text: str, generated: str) -> str:
    """The README with its results section replaced.

    Raises:
        ValueError: when the markers are missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md has no {BEGIN} … {END}")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{generated}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(), tables()))
