"""Predicted peak memory against measured, and speed over the budget.

    python -m benchmarks.memory --parallel 3
    python -m benchmarks.memory --only 8b:qlora
    python -m benchmarks.memory --points llama-8b:lora:2x2048@most,llama-8b:lora:2x2048@16.7GiB

A point is a shape, a mode (lora, qlora, full), batch x sequence and a budget. It is measured in a process of its own
and written at once, so an interrupted run goes on where it stopped; points stand in the order of their value. Beside
sizes a budget may be "most" (everything kept), "half" and "quarter" (of the way from recomputing to that),
"recompute" (as little as can be on the device alone) and "least" (as little as can be, host memory used).

Several points at one time load and compile together, and each is timed alone. What runs out of memory then is measured
once more by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from . import pareto
from .step import RESULTS, in_process, provenance, read, write
from .worker import Workload

DEFAULT = (
    ("llama-8b:lora:2x2048", ("16.7GiB", "most", "half", "least")),
    ("llama-8b:qlora:2x2048", ("7GiB", "most", "half")),
    ("llama-8b:qlora:1x32768", ("14.2GiB", "24GiB", "60GiB")),
    ("llama-1b:lora:4x2048", ("most", "half", "least", "quarter", "recompute")),
    ("llama-1b:lora:1x65536", ("most", "half", "least")),
    ("llama-8b:lora:1x512", ("most", "half", "least")),
    ("llama-1b:qlora:4x2048", ("most", "half", "least")),
    ("llama-8b:lora:2x2048", ("quarter", "recompute")),
    ("llama-8b:qlora:2x2048", ("least", "quarter", "recompute")),
    ("llama-8b:qlora:1x8192", ("most", "half", "least")),
    ("llama-1b:lora:1x16384", ("most", "half", "least")),
    ("llama-8b:lora:1x8192", ("most", "half", "least")),
    ("llama-1b:qlora:1x512", ("most", "half", "least")),
    ("llama-8b:qlora:1x65536", ("least", "40GiB", "70GiB")),
)
"""Workloads and their budgets, the most telling ones first."""


def parse_point(text: str) -> tuple[str, str, dict[str, Any]]:
    """``llama-1b:lora:4x2048@20GiB`` as the workload's name, the budget, and shape, mode, batch and seq.

    Raises:
        ValueError: naming the point.
    """
    name, at, budget = text.partition("@")
    try:
        shape, mode, size = name.split(":")
        batch, seq = map(int, size.split("x"))
    except ValueError as error:
        raise ValueError(f"point {text!r} is not SHAPE:MODE:BATCHxSEQ@BUDGET: llama-1b:lora:4x2048@half") from error
    if not at or not budget:
        raise ValueError(f"point {text!r} has no budget: {name}@half")
    if mode not in ("lora", "qlora", "full"):
        raise ValueError(f"point {text!r}: mode {mode!r} is none of lora, qlora, full")
    return name, budget, {"shape": shape, "mode": mode, "batch": batch, "seq": seq}


def points(given: str | None, only: str | None) -> list[str]:
    """What is to be measured: the default or what was given, and of that what holds one of some comma-separated words.

    Raises:
        ValueError: for a point that is none, and where no point is left.
    """
    every = [f"{name}@{budget}" for name, budgets in DEFAULT for budget in budgets]
    every = given.split(",") if given else every
    for point in every:
        parse_point(point)  # noticed before the first one has run for a minute
    wanted = [p for p in every if not only or any(word in p for word in only.split(","))]
    if not wanted:
        raise ValueError(f"--only {only!r} fits none of {', '.join(every)}")
    return wanted


def measure(point: str, args: argparse.Namespace, turns: str | None) -> dict[str, Any]:
    """Measure a point in a process of its own; whatever happens to it becomes a row."""
    name, budget, where = parse_point(point)
    work = Workload(
        "ours", {}, **where, steps=args.steps, warmup=args.warmup, device=args.device, regime="bf16",
        checkpointing="none", profile=None, turns=turns,
    )  # fmt: skip
    settings = json.dumps({**dataclasses.asdict(work), "budget": budget})
    command = [sys.executable, "-m", "benchmarks.memory_worker", settings]
    found = in_process(command, args.limit, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return {"name": name, "budget": budget, **found, **provenance("benchmarks.memory")}


COLUMNS = ("workload", "budget", "predicted", "measured", "error", "reserved", "host", "ms", "tokens/s", "plan")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, memory in GiB."""
    if "error" in row:
        return [row["name"], row["budget"], *["–"] * (len(COLUMNS) - 3), f"failed: {row['error'][:100]}"]
    measured = [f"{row[n]:.2f}" if row[n] else "–" for n in ("measured_gib", "reserved_gib")]
    error = f"{row['ratio'] - 1:+.1%}" if row["ratio"] else "–"
    host = f"{row['host_gib']:.2f}" if row["host_gib"] else "–"
    speed = [f"{row['ms']:,.1f}", f"{row['tokens_per_s']:,.0f}"]
    told = [f"{row['predicted_gib']:.2f}", measured[0], error, measured[1], host, *speed, row["policy"]]
    return [row["name"], row["budget"], *told]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    widths = (24, 11, 11, 10, 8, 10, 8, 11, 11, 0)
    lines = []
    for row in [list(COLUMNS), *map(cells, rows)]:
        left = f"{row[0]:<{widths[0]}}{row[1]:>{widths[1]}}"
        lines.append(left + "".join(f"{c:>{w}}" for c, w in zip(row[2:-1], widths[2:], strict=False)) + f"  {row[-1]}")
    return "\n".join(lines)


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a table for a page."""
    lines = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 3), "---"), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def judged(rows: Iterable[dict[str, Any]]) -> str:
    """How far off predictions are, and whether every budget of a workload gave the same loss and gradient."""
    rows = [r for r in rows if "error" not in r]
    ratios = [r["ratio"] - 1 for r in rows if r["ratio"]]
    lines = [f"{len(ratios)} measured points, off by {min(ratios):+.1%} to {max(ratios):+.1%}"] if ratios else []
    numbers: dict[str, set[tuple[float, float]]] = defaultdict(set)
    for row in rows:
        numbers[f"{row['name']} on {row['device']}"].add((row["losses"][0], row["grad_norm"]))
    for name, found in numbers.items():
        if len(found) > 1:
            lines.append(f"{name}: (loss, grad_norm) differ between budgets: {sorted(found)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, point by point."""
    arguments = argparse.ArgumentParser("benchmarks.memory", description=__doc__.split("\n")[0])
    arguments.add_argument("--points", help="SHAPE:MODE:BATCHxSEQ@BUDGET, comma-separated (default: a sweep)")
    arguments.add_argument("--only", help="of these the points that hold one of some words, comma-separated: 8b:qlora")
    arguments.add_argument("--steps", type=int, default=8, help="timed steps; a quarter of them where they are long")
    arguments.add_argument("--warmup", type=int, default=2)
    arguments.add_argument("--parallel", type=int, default=1, help="points that load and compile at one time")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--limit", type=int, default=600, help="seconds per point")
    arguments.add_argument("--out", help="result file (default: benchmarks/results/memory/DEVICE.json)")
    arguments.add_argument("--force", action="store_true", help="measure again what is there")
    arguments.add_argument("--draw", action="store_true", help="measure nothing: table and picture of what is there")
    args = arguments.parse_args(argv)
    path = Path(args.out) if args.out else RESULTS / "memory" / f"{args.device}.json"
    try:
        wanted = points(args.points, args.only)
    except ValueError as error:
        arguments.error(str(error))
    done = {f"{r['name']}@{r['budget']}" for r in read(path) if "error" not in r}
    missing = [] if args.draw else [p for p in wanted if args.force or p not in done]
    crowded = _measure_all(missing, args, path, args.parallel)
    if args.parallel > 1:
        _measure_all(crowded, args, path, 1)
    _report(path)


def _measure_all(missing: list[str], args: argparse.Namespace, path: Path, parallel: int) -> list[str]:
    """Measure points; returns those that ran out of memory."""
    crowded = []
    with tempfile.TemporaryDirectory() as turns, ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(measure, p, args, turns if parallel > 1 else None): p for p in missing}
        for future in as_completed(futures):
            row = future.result()
            write(path, [r for r in read(path) if (r["name"], r["budget"]) != (row["name"], row["budget"])] + [row])
            print(table([row]).splitlines()[-1], flush=True)
            if "out of memory" in row.get("error", ""):
                crowded.append(futures[future])
    return crowded


def _report(path: Path) -> None:
    """Print all rows, and write them beside the file as a page and a picture."""
    rows = read(path)
    print(f"\n{table(rows)}\n\n{judged(rows)}\n{path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(markdown(rows))
    try:
        pareto.draw(rows, pareto.peers(), path.with_suffix(".png"))
    except ValueError as error:
        print(f"no picture: {error}")


if __name__ == "__main__":
    main()
