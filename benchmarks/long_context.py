"""One whole training step over a context as long as the card holds: forward, backward, optimiser.

    python -m benchmarks.long_context --shape llama-8b --tokens 350208 --rank 32 --budget 77GiB --host 100GiB
    python -m benchmarks.long_context --shape llama-70b --tokens 4096 --budget 43GiB --card 47GB --rest 1
    python -m benchmarks.long_context --shape llama-8b --layers 8 --tokens 32768 --rank 32 --budget 0 --check 40GiB

Weights are random and in NF4, made and packed one by one (``--lora`` for bf16). A long step takes minutes and is
measured once, the first time that it runs; what forward takes to compile is left out, and backward compiles meanwhile.
``--rest 1`` measures a second one in its place. ``--check`` runs the same step under another budget too, and compares
loss and grad_norm: a plan changes no number but for what the attention library adds up in no fixed order. Each run is a
process of its own, written at once to benchmarks/results/long.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from unsloth.compiler.options import OptionError, parse_bytes

from .long_context_worker import Step
from .step import RESULTS, in_process, provenance, read, write

TOLERANCE = 1e-3
"""Relative, of grad_norm between plans: the gradient of queries is added up in no fixed order."""


def step_of(args: argparse.Namespace) -> Step:
    """What the command line asks for.

    Raises:
        OptionError: for a size that is none.
    """
    shape = f"{args.shape}@{args.layers}" if args.layers else args.shape
    budget, host = parse_bytes(args.budget) or 0, parse_bytes(args.host, "host_memory_budget")
    sizes = args.rank, args.batch, args.tokens, budget, host, parse_bytes(args.card)
    return Step(shape, not args.lora, *sizes, args.rest, args.device)


def measure(step: Step, limit: int, log: Path | None) -> dict[str, Any]:
    """Run the step in a process of its own; whatever happens to it becomes a row."""
    command = [sys.executable, "-m", "benchmarks.long_context_worker", json.dumps(dataclasses.asdict(step))]
    # Tensors of gigabytes leave holes of gigabytes in segments of fixed size.
    settings = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ, "HF_HUB_OFFLINE": "1"}
    return {
        "step": dataclasses.asdict(step),
        **in_process(command, limit, env=settings, log=log),
        **provenance(__spec__.name),
    }


def compared(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two plans' numbers lie apart, relative to the first.

    Raises:
        ValueError: where a plan changed what is computed.
    """
    apart = {name: abs(row[name] - other[name]) / abs(row[name]) for name in ("loss", "grad_norm")}
    if row["plan"] == other["plan"]:
        raise ValueError(f"both budgets have one plan, nothing is compared: {row['plan']}")
    if apart["loss"] > 1e-5 or apart["grad_norm"] > TOLERANCE:
        raise ValueError(f"plans differ in what they compute: {apart}")
    return apart


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    step = row["step"]
    name = f"{step['shape']}, rank {step['rank']}, {step['batch']} x {step['tokens']:,} tokens"
    if "error" in row:
        return f"{name}: failed: {row['error'][:300]}"
    memory = f"predicted {row['predicted_gib']:.2f}"
    if row["measured_gib"] is not None:
        memory += f", measured {row['measured_gib']:.2f} ({row['ratio'] - 1:+.1%}), reserved {row['reserved_gib']:.2f}"
    lines = [
        name,
        f"  step    {row['seconds']:.2f} s: forward {row['forward_s']:.2f}, the rest {row['backward_s']:.2f}; "
        f"{row['tokens_per_s']:,.0f} tokens/s",
        f"  GiB     {memory}; in host memory {row['host_gib']:.2f}, locked {row['locked_gib']:.2f}",
        f"  before  weights {row['loading_s']:.1f} s, compiling {row['compile_s']:.1f} s",
        f"  numbers loss {row['loss']:.6f}, grad_norm {row['grad_norm']:.6g}",
        f"  plan    {row['policy']}: {row['plan']}",
    ]
    return "\n".join(lines)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as markdown."""
    head = ("shape", "tokens", "s", "tokens/s", "predicted GiB", "measured GiB", "reserved GiB", "host GiB")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in rows:
        if "error" not in row:
            step = row["step"]
            sizes = [row[f"{n}_gib"] for n in ("predicted", "measured", "reserved", "host")]
            shown = ["–" if size is None else f"{size:.2f}" for size in sizes]
            first = [step["shape"], f"{step['tokens']:,}", f"{row['seconds']:.1f}"]
            lines.append((*first, f"{row['tokens_per_s']:,.0f}", *shown))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure a step, and under another budget where that is asked for."""
    arguments = argparse.ArgumentParser("benchmarks.long_context", description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--shape", default="llama-8b", help="a preset of models/presets.py")
    arguments.add_argument("--layers", type=int, help="of the shape, in place of all")
    arguments.add_argument("--lora", action="store_true", help="weights in bf16, in place of NF4")
    arguments.add_argument("--rank", type=int, default=16, help="of the adapters on all linear layers")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--tokens", type=int, required=True, help="of each sequence")
    arguments.add_argument("--budget", default="0", help="peak of the plan (0: as little as can be)")
    arguments.add_argument("--host", help="host memory that the plan may use (default: half of the machine's)")
    arguments.add_argument("--card", help="allocate no more than this, as if the card had no more memory")
    arguments.add_argument("--check", metavar="BUDGET", help="compare with the same step under this budget")
    arguments.add_argument("--rest", type=int, default=0, help="further steps, the last of which is timed")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--log", type=Path, help="where to write what a step has done, as it happens")
    arguments.add_argument("--limit", type=int, default=1800, help="seconds for a step")
    arguments.add_argument(
        "--out", help="result file (default: benchmarks/results/long/SHAPE-MODE-BATCHxTOKENS-DEVICE.json)"
    )
    args = arguments.parse_args(argv)
    try:
        steps = [step_of(args)]
        if args.check is not None:
            steps.append(dataclasses.replace(steps[0], budget=parse_bytes(args.check) or 0))
    except OptionError as error:
        arguments.error(str(error))
    mode = "lora" if args.lora else "qlora"
    name = f"{steps[0].shape}-{mode}-{args.batch}x{args.tokens}-{args.device}.json"
    path, rows = Path(args.out) if args.out else RESULTS / "long" / name, []
    for step in steps:
        rows.append(measure(step, args.limit, args.log))
        write(path, [r for r in read(path) if r["step"] != rows[-1]["step"]] + rows[-1:])
        print(told(rows[-1]), flush=True)
        if "error" in rows[-1]:
            sys.exit(rows[-1]["log"][-2000:])
    if len(rows) > 1:
        apart = compared(*rows)
        rows[0]["check"] = {"budget_gib": steps[1].budget / 2**30, "plan": rows[1]["plan"], "apart": apart}
        write(path, [r for r in read(path) if r["step"] != rows[0]["step"]] + rows[:1])
        print(f"the same under another plan: loss off by {apart['loss']:.1e}, grad_norm by {apart['grad_norm']:.1e}")
    print(f"\n{table(read(path))}\n{path}")


if __name__ == "__main__":
    main()
