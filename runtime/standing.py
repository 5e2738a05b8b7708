"""Where a run stands: its place in the data, its sums, its random numbers. What the next step and the next log need."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Progress:
    """Where a run is, beyond what transformers keeps: everything that the next step and the next log depend on.

    Attributes:
        epoch: passes over the data that are complete.
        updates: optimiser steps in this pass.
        losses: sum of the steps' losses since the last log.
        logged_at: the step of the last log.
        tokens: trained on in the whole run, as TRL counts them.
        flos: floating-point operations in the whole run, as transformers counts them.
        metrics: TRL's, since the last log: one value a micro-batch.
        settings: of ``MUST_AGREE``.
    """

    epoch: int = 0
    updates: int = 0
    losses: Any = 0.0
    logged_at: int = 0
    tokens: Any = 0
    flos: float = 0.0
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For JSON: numbers in place of tensors, which nobody reads before. float32 comes back exactly."""
        metrics = {name: [float(value) for value in values] for name, values in self.metrics.items()}
        return {**vars(self), "losses": float(self.losses), "tokens": int(self.tokens), "metrics": metrics}


def random_state() -> dict[str, Any]:
    """Where the generators of Python, NumPy and PyTorch (this process's GPU included) stand; asks no device."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.random.set_rng_state(state["cuda"])


@contextmanager
def random_numbers(state: dict[str, Any] | None) -> Iterator[None]:
    """Have the generators stand where ``state`` says for a while."""
    if state is None:
        yield
        return
    now = random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)
