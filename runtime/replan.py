"""A compiled step that is planned again: for less memory when memory was short, for more tokens than it was made for.

A plan is a prediction. Where it was wrong, or somebody else has taken memory since, the next one is made for less, and
so keeps less, recomputes more and leaves more in host memory, with the same numbers. Only when no plan is smaller do
micro-batches have to be (:mod:`.smaller`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..compiler.options import Options
from ..compiler.report import GraphReport
from ..compiler.run import compiled
from ..passes.memory.partition import Partitioner
from ..passes.memory.plan import Plan
from ..passes.memory.words import gib

logger = logging.getLogger(__name__)

REPLANS = 3
"""So often a run plans again for either reason. Each costs a compilation."""
LESS = 0.9
"""Of what was planned for, or of what there is, what the next plan may have."""


class Replanned:
    """A function that runs a model, compiled, and compiled anew for another plan.

    Args:
        function: what is compiled.
        options: of the backend.
        reports: gets an entry per graph.
        tokens: of the function's arguments: tokens in the batch, padding included.
        changed: called when a new plan is about to be made, for what depends on the old one.

    Attributes:
        options: with the budget of the newest plan.
        replans: how often memory was short.
        grown: how often a batch was too large for the plan.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: Options,
        reports: list[GraphReport],
        *,
        tokens: Callable[..., int],
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        self.function, self.options, self.reports = function, options, reports
        self.tokens, self.changed = tokens, changed
        self.replans = self.grown = 0
        self._made: list[tuple[int, GraphReport]] = []  # the graphs that run now, by the tokens of their first batch
        self._run = compiled(function, options, reports)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        tokens = self.tokens(*arguments, **named)
        limit = self.limit if torch.is_grad_enabled() else 0  # without gradients nothing was planned
        if limit and tokens > limit and self.grown < REPLANS and not self._is_made_for(tokens):
            self.grown += 1
            logger.warning(
                "a batch of %s tokens is more than the memory plan was made for, which holds up to %s: planned again",
                *(f"{tokens:,}", f"{limit:,}"),
            )
            self._again(self.options)
        before = len(self.reports)
        try:
            return self._run(*arguments, **named)
        finally:
            self._made += [(tokens, report) for report in self.reports[before:]]

    @property
    def limit(self) -> int:
        """Tokens up to which some graph for many sizes is known to be within its budget; 0 where there is no such
        limit.

        A graph may count other tokens than its batch, those of the completions alone, say: its plan tells by how much
        the batch may grow.
        """
        return max((first * plan.limit // plan.tokens for first, _, plan in self._plans() if plan.limit), default=0)

    def _is_made_for(self, tokens: int) -> bool:
        """Whether there is a graph for just this size."""
        return any(not plan.limit and first == tokens for first, _, plan in self._plans())

    def _plans(self) -> list[tuple[int, Partitioner, Plan]]:
        """Those of the graphs that run now, with the tokens of their first batch; a graph out of a cache of an earlier
        process brings none."""
        partitioners = [(tokens, report.partitioner) for tokens, report in self._made if report.partitioner is not None]
        return [(tokens, p, p.last_plan) for tokens, p in partitioners if p.last_plan is not None]

    def for_less(self) -> bool:
        """Plan again because memory was short; called when what the failed step held is free.

        Returns:
            False where no smaller plan is to be had: the newest is the smallest, or there were enough already.
        """
        if self.replans >= REPLANS or not self._made:
            return False
        there, plans = _within_reach(), self._plans()
        planned = max((plan.peak_bytes for _, _, plan in plans), default=None)
        floor = max((partitioner.last_floor for _, partitioner, _ in plans), default=0)
        known = [size for size in (there, planned) if size]
        if not known:
            return False
        budget = max(floor, int(LESS ** (1 if plans else 1 + self.replans) * min(known)))
        if planned is not None and budget >= planned:
            return False
        self.replans += 1
        logger.warning(
            "out of memory under a plan for %s: planned again for %s, with the same numbers (%d of at most %d times)",
            *("what was free" if planned is None else gib(planned), gib(budget), self.replans, REPLANS),
        )
        self._again(replace(self.options, memory_budget=budget))
        return True

    def _again(self, options: Options) -> None:
        self.changed()
        self.options, self._made = options, []
        torch._dynamo.reset()  # or the code that is there would go on running
        self._run = compiled(self.function, options, self.reports)


def _within_reach() -> int | None:
    """Bytes that this process has on the device or could have; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
