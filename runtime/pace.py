"""How fast training goes: tokens per second, what is not training left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Pace:
    """Measures tokens per second between logs; steps that compile and evaluations are left out.

    Attributes:
        first_step_seconds: wall time of the first step, None before it.
    """

    def __init__(self) -> None:
        self.first_step_seconds: float | None = None
        self._started: float | None = None  # of the running stretch; None before the first step and while paused
        self._created = time.perf_counter()
        self._seconds = self._lap_seconds = 0.0
        self._finished: Any = None  # CUDA event: the device is done with the step before
        self._tokens: Any = 0
        self._lap_tokens: Any = 0

    def start(self) -> None:
        """Training begins."""
        self._created = time.perf_counter()

    def after_step(self, tokens: Tensor | int, compiling_since: float | None = None) -> None:
        """A step of so many real (not padding) tokens is done.

        Args:
            tokens: a number, or a tensor that is read when the rate is asked for.
            compiling_since: when the step began (``time.perf_counter()``), if a graph was compiled in it.
        """
        if self.first_step_seconds is None:
            _wait_for_device()
            self.first_step_seconds = time.perf_counter() - self._created
            self._started = time.perf_counter()
        elif compiling_since is not None and self._started is not None:
            _wait_for_device()
            self._started += self._since(compiling_since)
        else:
            self._tokens, self._lap_tokens = self._tokens + tokens, self._lap_tokens + tokens
        if torch.cuda.is_available():
            self._finished = torch.cuda.Event(enable_timing=True)
            self._finished.record()

    def _since(self, started: float) -> float:
        """Seconds since a step began to run, which may be later than the host began with it: the device is waited for
        by nobody, and works on the step before meanwhile."""
        if self._finished is None:
            return time.perf_counter() - started
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return min(self._finished.elapsed_time(now) / 1e3, time.perf_counter() - started)

    def lap(self) -> float | None:
        """Tokens per second since the last lap; None before the second step."""
        self._stop()
        rate = float(self._lap_tokens) / self._lap_seconds if self._lap_seconds and float(self._lap_tokens) else None
        self._lap_tokens, self._lap_seconds = 0, 0.0
        return rate

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole run; None before the second step."""
        self._stop()
        return float(self._tokens) / self._seconds if self._seconds and float(self._tokens) else None

    def _stop(self) -> None:
        """Close the running stretch and begin the next."""
        if self._started is not None:
            _wait_for_device()
            now = time.perf_counter()
            self._seconds, self._lap_seconds = (
                self._seconds + now - self._started,
                self._lap_seconds + now - self._started,
            )
            self._started = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        self._stop()
        was_running, self._started = self._started is not None, None
        try:
            yield
        finally:
            if was_running:
                self._started = time.perf_counter()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
