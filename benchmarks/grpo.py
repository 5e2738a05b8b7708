"""Time and memory of one training step of a policy on given completions, system against system.

    python -m benchmarks.grpo --shape llama-8b --mode qlora --generations 8 --prompt 512 --completion 19968 \\
        --systems ours:memory_budget=33GB,trl,unsloth --peer-site PEERS

An optimiser step is trained on all generations of one prompt, ``--micro`` at a time. One process per system, rows as
``benchmarks.step`` keeps them: written one by one, so that a run that is started again measures what is missing.
``ours`` plans its memory within the budget, and pads instead of sharing prompts with ``ours:shared_prompts=false``; TRL
(the one that is installed) and the peer that has our import name checkpoint every layer, as they do by default.
``--shape llama-8b@4`` cuts the model to four layers, to try things out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import step

HERE = Path(__file__).parent
SYSTEMS = ("ours", "trl", "unsloth")
WORKLOAD = ("shape", "mode", "generations", "micro", "prompt", "completion", "beta", "loss_type", "steps", "warmup")
WORKLOAD += ("device",)
TARGET_GIB = 33e9 / 2**30
"""Peak of 8B QLoRA with 8 generations of a context of 20k."""


def measure(name: str, args: argparse.Namespace, turns: str | None = None) -> dict[str, Any]:
    """Measure one system in a process of its own; whatever happens to it becomes a row."""
    system, options = parse_system(name)
    work = {"system": system, "options": options, **{n: getattr(args, n) for n in WORKLOAD}, "turns": turns}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    if system == "unsloth" and args.peer_site:
        environment["PYTHONPATH"] = str(Path(args.peer_site).resolve())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(HERE / "grpo_worker.py"), json.dumps(work)]
        row = step.in_process(command, args.limit, env=environment, cwd=folder)
    workload = {n: work[n] for n in WORKLOAD} | {"options": options}
    return {"system": system, "workload": workload, **row, **step.provenance("benchmarks.grpo")}


def parse_system(name: str) -> tuple[str, dict[str, Any]]:
    """As ``benchmarks.step`` does, of the systems that train policies.

    Raises:
        ValueError: for another system.
    """
    system, options = step.parse_system(name)
    if system not in SYSTEMS:
        raise ValueError(f"{system} trains no policies here; systems are {', '.join(SYSTEMS)}")
    return system, options


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, fastest first."""
    lines = [f"{'system':<36}{'tok/s':>9}{'s/step':>9}{'peak GiB':>10}{'reserved':>10}{'first s':>9}  loss; |gradient|"]
    for row in sorted(rows, key=lambda r: -r.get("tokens_per_s", 0)):
        options = row["workload"]["options"]
        name = ":".join([row["system"], *(f"{k}={v}" for k, v in options.items())])
        if "error" in row:
            lines.append(f"{name:<36}failed: {row['error'][:90]}")
            continue
        peak = [f"{row[n]:.2f}" if row[n] else "–" for n in ("peak_allocated_gib", "peak_reserved_gib")]
        lines.append(
            f"{name:<36}{row['tokens_per_s']:>9,.0f}{row['ms_median'] / 1e3:>9.2f}{peak[0]:>10}{peak[1]:>10}"
            f"{row['first_micro_batch_s']:>9.1f}  {row['losses'][0]:.5f} → {row['losses'][-1]:.5f};"
            f" {row['grad_norms'][0]:.5g} → {row['grad_norms'][-1]:.5g}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser("benchmarks.grpo", description=__doc__.split("\n")[0])
    arguments.add_argument("--shape", default="llama-8b", help="a preset of models/presets.py; NAME@4 with 4 layers")
    arguments.add_argument("--mode", choices=("lora", "qlora", "full"), default="qlora")
    arguments.add_argument("--generations", type=int, default=8, help="completions of an optimiser step")
    arguments.add_argument("--micro", type=int, default=1, help="of them at a time")
    arguments.add_argument("--prompt", type=int, default=512, help="tokens")
    arguments.add_argument("--completion", type=int, default=20480 - 512, help="tokens")
    arguments.add_argument("--beta", type=float, default=0.0)
    arguments.add_argument("--loss-type", default="dapo")
    arguments.add_argument("--systems", default="ours:memory_budget=33GB,trl")
    arguments.add_argument("--steps", type=int, default=2, help="timed optimiser steps")
    arguments.add_argument("--warmup", type=int, default=2, help="micro-batches before them; the first one compiles")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--peer-site", help="folder into which the peers were installed")
    arguments.add_argument("--limit", type=int, default=900, help="seconds per system")
    arguments.add_argument("--out", help="result file (default: benchmarks/results/grpo/SHAPE-MODE-GxN-DEVICE.json)")
    arguments.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="systems that load and compile at one time; each is timed alone, and all must fit into memory (default 1)",
    )
    arguments.add_argument("--force", action="store_true", help="measure rows again that are there")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, row by row."""
    args = parser().parse_args(argv)
    length = args.prompt + args.completion
    default = step.RESULTS / "grpo" / f"{args.shape}-{args.mode}-{args.generations}x{length}-{args.device}.json"
    path = Path(args.out) if args.out else default
    if args.warmup < 1:
        raise SystemExit("--warmup has to be at least 1: the micro-batch that compiles is not timed")
    if args.generations % args.micro:
        raise SystemExit(f"--generations {args.generations} is no multiple of --micro {args.micro}")
    names = args.systems.split(",")
    parsed = [parse_system(name) for name in names]  # a misspelt system is noticed before the first one has run
    settings = {n: getattr(args, n) for n in WORKLOAD}
    with tempfile.TemporaryDirectory() as turns:
        run = functools.partial(measure, args=args, turns=turns if args.parallel > 1 else None)
        rows = [
            ({"system": system, "workload": settings | {"options": options}}, functools.partial(run, name))
            for name, (system, options) in zip(names, parsed, strict=True)
        ]
        step.measure_missing(path, rows, table, force=args.force, parallel=args.parallel)


if __name__ == "__main__":
    main()
