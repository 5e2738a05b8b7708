"""What happened to each graph on its way through the compiler: kept for `explain`, `verify` and warnings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..passes.runner import PassReport, Site
from .coverage import Coverage


@dataclass
class GraphReport:
    """One Dynamo graph's way through the compiler.

    Attributes:
        nodes: nodes of Dynamo's graph, and of ours after the passes.
        capture_seconds: time of the retrace.
        passes_seconds: time of the passes and of the check of their result.
        coverage: what of the graph the passes took; None when nobody observes.
        passes: a report per pass that ran.
        fallback: why (a part of) our pipeline was left out, or None.
        dropped_outputs: indices of outputs replaced by a placeholder because ``logits="drop"``.
        partitioner: the memory floor's object, whose ``last_plan`` is set once the backward has been planned.
    """

    nodes: tuple[int, int] = (0, 0)
    capture_seconds: float = 0.0
    passes_seconds: float = 0.0
    coverage: Coverage | None = None
    passes: list[PassReport] = field(default_factory=list)
    fallback: str | None = None
    dropped_outputs: tuple[int, ...] = ()
    partitioner: Any = None

    @property
    def rewritten(self) -> list[Site]:
        return [site for p in self.passes for site in p.rewritten]

    @property
    def missed(self) -> list[Site]:
        return [site for p in self.passes for site in p.missed]
