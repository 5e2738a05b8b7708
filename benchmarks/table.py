"""Rewrites the README's result tables from ``benchmarks/results/*.json``: ``python -m benchmarks.table``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .step import RESULTS, label, read

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def tables(folder: Path = RESULTS) -> str:
    """A Markdown table per result file that was measured on a GPU, fastest system first."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        rows = [r for r in read(path) if r.get("device") not in (None, "cpu")]
        if rows:
            parts.append(_table(rows))
    return "\n\n".join(parts) or "No measurement has been committed yet."


def _table(rows: list[dict[str, Any]]) -> str:
    work, first = rows[0]["workload"], rows[0]
    versions = ", ".join(f"{n} {first['versions'][n]}" for n in ("torch", "transformers", "peft"))
    lines = [
        f"**{work['shape']} {work['mode']}, {work['batch']}×{work['seq']} tokens**, {first['device']}, {versions}, "
        f"{first['date']}",
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
