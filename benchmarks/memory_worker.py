"""One step of ours under one budget, in one process: predicted and measured peak, time and numbers, as JSON.

Started by ``benchmarks.memory``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unsloth.compiler import lower
from unsloth.compiler.options import Options, parse_bytes
from unsloth.compiler.run import compiled
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.memory.planner import Planner

from .worker import Turns, Workload, _models, _plain, serve

GIB = 2**30
SHARES = {"most": 1.0, "half": 0.5, "quarter": 0.25, "recompute": 0.0}
"""Budgets by name, between the smallest plan without host memory (0) and everything kept (1)."""
LONG = 1.5
"""Seconds from which on a step is measured fewer times."""


class Between(Partitioner):
    """A budget that is a share of the way from the smallest plan to the one that keeps everything."""

    def __init__(self, *args: Any, share: float, **others: Any) -> None:
        super().__init__(*args, **others)
        self.share = share

    def allowed(self, planner: Planner) -> int | None:
        """Bytes, known once there is a graph."""
        least, most = planner.smallest[0].peak_bytes, planner.fastest[0].peak_bytes
        self.budget = int(least + (most - least) * self.share)
        return self.budget


def options_of(budget: str) -> dict[str, Any]:
    """The backend's options for a budget of :data:`SHARES`, "least" or a size.

    Raises:
        OptionError: where it is neither.
    """
    if budget in SHARES:  # the share says how much; without a place to wait in, but for the middle
        return {"memory_budget": 0} | ({"host_memory_budget": 0} if SHARES[budget] in (0, 1) else {})
    return {"memory_budget": 0 if budget == "least" else parse_bytes(budget)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Workload):
    """A workload under a budget: one of :data:`SHARES`, "least" or a size."""

    budget: str


def measure(work: Budgeted) -> dict[str, Any]:
    """Run steps under a budget in this process."""
    # A plan that comes out of a cache has no prediction with it.
    torch._functorch.config.enable_autograd_cache = False  # type: ignore[attr-defined]
    if work.budget in SHARES:
        lower.Partitioner = functools.partial(Between, share=SHARES[work.budget])  # type: ignore[misc]
    cuda, turns = work.device == "cuda", Turns(Path(work.turns)) if work.turns else None
    model, reports = _plain(work), []
    run = compiled(model, Options.parse({"logits": "drop", **options_of(work.budget), **work.options}), reports)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    vocabulary = _models("presets").config(work.shape).vocab_size
    ids = torch.randint(vocabulary, (work.batch, work.seq), generator=torch.Generator().manual_seed(0)).to(work.device)

    def step() -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        return loss.detach()

    started = time.perf_counter()
    losses = [float(step())]
    first = time.perf_counter() - started
    norm = _norm(trained)
    if not norm > 0:
        raise RuntimeError(f"grad_norm is {norm}: nothing is trained")
    with turns.alone() if turns is not None else contextlib.nullcontext():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, more = _timed(step, 1)
        losses += more
        count = work.steps if seconds < LONG else max(1, work.steps // 4)
        if seconds < LONG:
            losses += _timed(step, work.warmup)[1]
        seconds, more = _timed(step, count)
    losses += more
    plans = [r.partitioner for r in reports if r.partitioner and r.partitioner.last_plan]
    if len(plans) != 1:
        raise RuntimeError(f"{len(plans)} graphs were planned, expected one")
    plan, planned_for = plans[0].last_plan, plans[0].budget
    measured = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "budget_gib": planned_for / GIB,
        "predicted_gib": plan.peak_bytes / GIB,
        "measured_gib": measured and measured / GIB,
        "ratio": measured and plan.peak_bytes / measured,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        "parts_gib": {name: size / GIB for name, size in plan.parts.items()},
        "host_gib": plan.host_bytes / GIB,
        "policy": plan.policy,
        "plan": plan.words,
        "predicted_extra_ms": plan.seconds * 1e3,
        "ms": seconds * 1e3,  # of steps launched in a row, as in training
        "steps": count,
        "tokens_per_s": work.batch * work.seq / seconds,
        "first_step_s": first - (turns.stopped(started, started + first) if turns is not None else 0),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "losses": losses,
        "grad_norm": norm,
    }


def _timed(step: Callable[[], torch.Tensor], count: int) -> tuple[float, list[float]]:
    """Seconds per step, and the losses; read at the end, because nobody waits for a step in training either."""
    started = time.perf_counter()
    losses = [step() for _ in range(count)]
    found = list(map(float, losses))  # waits for the last one
    return (time.perf_counter() - started) / max(1, count), found


def _norm(trained: list[nn.Parameter]) -> float:
    norms = [p.grad.float().norm() for p in trained if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


if __name__ == "__main__":
    serve(Budgeted, measure)
