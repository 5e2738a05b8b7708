"""Predicted peak memory against measured, and speed over the budget.

    python -m benchmarks.memory --rows llama-1b:lora:4x2048,llama-8b:qlora:1x8192 --budgets most,half,least,16.7GiB

A row is a shape, a mode (lora, qlora, full) and batch x sequence; it is measured under each budget in a process of its
own and written at once, so an interrupted run goes on where it stopped. "most" keeps everything, "least" is the
smallest plan, "half" is a budget half-way between what those two were predicted to need (both are then measured first).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from .step import RESULTS, in_process, provenance, read, write
from .worker import Workload, environment

GIB = 2**30
DEFAULT_ROWS = (
    "llama-1b:lora:4x2048",
    "llama-1b:lora:1x16384",
    "llama-8b:lora:2x2048",
    "llama-8b:qlora:2x2048",
    "llama-8b:qlora:1x512",
    "llama-8b:qlora:1x32768",
)
SHARES = {"most": 1.0, "least": 0.0, "half": 0.5, "quarter": 0.25}
AMPLE = 1 << 50


def parse_row(text: str) -> dict[str, Any]:
    """``llama-1b:lora:4x2048`` as shape, mode, batch and seq.

    Raises:
        ValueError: naming the row.
    """
    try:
        shape, mode, size = text.split(":")
        batch, seq = map(int, size.split("x"))
    except ValueError as error:
        raise ValueError(f"row {text!r} is not SHAPE:MODE:BATCHxSEQ, such as llama-1b:lora:4x2048") from error
    if mode not in ("lora", "qlora", "full"):
        raise ValueError(f"row {text!r}: mode {mode!r} is none of lora, qlora, full")
    return {"shape": shape, "mode": mode, "batch": batch, "seq": seq}


def measure(work: Workload, budget: int) -> dict[str, Any]:
    """Run steps under a budget in this process; predicted and measured peak, time and losses."""
    from unsloth.compiler.options import Options
    from unsloth.compiler.run import compiled

    from .worker import _models, _plain

    # A plan that comes out of a cache has no prediction with it.
    torch._functorch.config.enable_autograd_cache = False  # type: ignore[attr-defined]
    cuda = work.device == "cuda"
    model = _plain(work)
    reports: list[Any] = []
    options = Options.parse({"memory_budget": budget, "logits": "drop", **work.options})
    run = compiled(model, options, reports)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    vocabulary = _models("presets").config(work.shape).vocab_size
    ids = torch.randint(vocabulary, (work.batch, work.seq), generator=torch.Generator().manual_seed(0)).to(work.device)

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.stack([p.grad.float().norm() for p in trained if p.grad is not None]).norm()
        norms.append(float(norm))
        optimiser.step()
        return float(loss.detach())

    norms: list[float] = []
    started = time.perf_counter()
    losses = [step()]
    first = time.perf_counter() - started
    losses += [step() for _ in range(work.warmup)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(work.steps):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    if not norms[-1] > 0:
        raise RuntimeError(f"grad_norm is {norms[-1]}: nothing is trained")
    plans = [r.partitioner.last_plan for r in reports if r.partitioner and r.partitioner.last_plan]
    if len(plans) != 1:
        raise RuntimeError(f"{len(plans)} graphs were planned, expected one")
    (plan,), median = plans, statistics.median(seconds)
    measured = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "predicted_gib": plan.peak_bytes / GIB,
        "measured_gib": measured and measured / GIB,
        "ratio": measured and plan.peak_bytes / measured,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        "parts_gib": {name: size / GIB for name, size in plan.parts.items()},
        "policy": plan.policy,
        "plan": plan.words,
        "predicted_extra_ms": plan.seconds * 1e3,
        "ms_median": median * 1e3,
        "tokens_per_s": work.batch * work.seq / median,
        "first_step_s": first,
        "losses": losses,
        "grad_norms": norms,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [f"{'row':<26}{'budget':>9}{'predicted':>11}{'measured':>10}{'error':>8}{'ms':>10}{'+ms':>8}  plan"]
    for row in rows:
        name = f"{row['name']:<26}{row['budget']:>9}"
        if "error" in row:
            lines.append(f"{name}  failed: {row['error'][:100]}")
            continue
        measured = f"{row['measured_gib']:.2f}" if row["measured_gib"] else "–"
        error = f"{row['ratio'] - 1:+.1%}" if row["ratio"] else "–"
        lines.append(
            f"{name}{row['predicted_gib']:>11.2f}{measured:>10}{error:>8}{row['ms_median']:>10.1f}"
            f"{row['predicted_extra_ms']:>8.1f}  {row['policy']}"
        )
    return "\n".join(lines)


def bytes_of(budget: str, rows: dict[str, dict[str, Any]]) -> int:
    """A budget's bytes; a share stands between what "least" and "most" were predicted to need.

    Raises:
        ValueError: where those two failed, or the budget is no size.
    """
    if budget not in SHARES:
        from unsloth.compiler.options import parse_bytes

        return parse_bytes(budget) or 0
    if budget in ("most", "least"):
        return AMPLE if budget == "most" else 0
    if any("predicted_gib" not in rows.get(end, {}) for end in ("least", "most")):
        raise ValueError(f"budget {budget!r} stands between 'least' and 'most', and one of those failed")
    least, most = (rows[end]["predicted_gib"] for end in ("least", "most"))
    return int((least + (most - least) * SHARES[budget]) * GIB)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, row by row."""
    arguments = argparse.ArgumentParser("benchmarks.memory", description=__doc__.split("\n")[0])
    arguments.add_argument("--rows", default=",".join(DEFAULT_ROWS), help="SHAPE:MODE:BATCHxSEQ, comma-separated")
    arguments.add_argument("--budgets", default="most,least,half", help="most, least, half, quarter, or sizes")
    arguments.add_argument("--steps", type=int, default=5)
    arguments.add_argument("--warmup", type=int, default=2)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--limit", type=int, default=600, help="seconds per measurement")
    arguments.add_argument("--out", help="result file (default: benchmarks/results/memory/DEVICE.json)")
    arguments.add_argument("--force", action="store_true", help="measure again what is there")
    arguments.add_argument("--measure", nargs=2, metavar=("JSON", "OUTPUT"), help=argparse.SUPPRESS)
    args = arguments.parse_args(argv)
    if args.measure:
        _worker(*args.measure)
        return
    path = Path(args.out) if args.out else RESULTS / "memory" / f"{args.device}.json"
    wanted = {name: parse_row(name) for name in args.rows.split(",")}
    budgets = args.budgets.split(",")
    if any(0 < SHARES.get(b, 0) < 1 for b in budgets):
        budgets = list(dict.fromkeys(["most", "least", *budgets]))
    for name, row in wanted.items():
        work = Workload(
            "ours", {}, **row, steps=args.steps, warmup=args.warmup, device=args.device, regime="bf16",
            checkpointing="none", profile=None,
        )  # fmt: skip
        for budget in budgets:
            rows = read(path)
            done = {r["budget"]: r for r in rows if r["name"] == name and "error" not in r}
            if budget in done and not args.force:
                continue
            try:
                settings = json.dumps({**dataclasses.asdict(work), "budget": bytes_of(budget, done)})
                command = [sys.executable, "-m", "benchmarks.memory", "--measure", settings]
                found = in_process(command, args.limit, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            except ValueError as error:
                found = {"error": str(error)}
            result = {"name": name, "budget": budget, **found, **provenance("benchmarks.memory")}
            write(path, [r for r in rows if (r["name"], r["budget"]) != (name, budget)] + [result])
            print(table([result]).splitlines()[-1], flush=True)
    print(f"\n{table(read(path))}\n\n{path}")


def _worker(settings: str, output: str) -> None:
    given = json.loads(settings)
    budget = given.pop("budget")
    try:
        row = measure(Workload(**given), budget)
    except Exception as error:  # noqa: BLE001  a failure is a result
        traceback.print_exc()
        row = {"error": f"{type(error).__name__}: {error}"[:2000]}
    Path(output).write_text(json.dumps(row | environment(given["device"])))


if __name__ == "__main__":
    main()
