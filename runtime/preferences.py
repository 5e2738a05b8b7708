"""Preference tuning: TRL's DPO and ORPO trainers on a compiled model, as sturdy as ours.

Losses, reference model and metrics are TRL's. What is compiled is the model's body, from the embeddings to the last
norm: where the arithmetic is. The policy and its reference (the same weights without their adapters) are a graph each.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import trl

from ..compiler.backend import compile_graph
from ..compiler.explain import Explanation, describe
from ..compiler.options import Options
from ..compiler.report import GraphReport
from .sturdy import Sturdy
from .trainer import CHECKPOINTING, leave_recomputation_to_the_planner

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")  # as far as ORPO goes, we know
    from trl.experimental.orpo import ORPOTrainer as _ORPOTrainer

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class _CompiledBody(_Base):
    """Mixin before one of TRL's trainers.

    Takes what that takes, by name, ``options`` for the backend, and ``compile=False`` to run eagerly.
    ``gradient_checkpointing`` is accepted and left to the memory planner.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        compile: bool = True,
        options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.options = Options.parse(options or {})
        self._reports: list[GraphReport] = []
        args = copy.copy(args)
        for name in CHECKPOINTING:
            if hasattr(args, name):
                setattr(args, name, False)
        args.logging_nan_inf_filter = False
        super().__init__(model=model, args=args, **others)
        leave_recomputation_to_the_planner(self.model)
        if compile:
            for each in (self.model, getattr(self, "ref_model", None)):
                if each is not None:
                    self._compile(each)

    def _compile(self, model: Any) -> None:
        def backend(graph: Any, inputs: Any) -> Any:
            return compile_graph(graph, inputs, self.options, observe=self._reports.append)

        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        whole.get_decoder().compile(backend=backend)

    @property
    def explanation(self) -> Explanation:
        """What the compiler has recognised in the graphs compiled so far."""
        return Explanation(describe(self.model), list(self._reports))


class DPOTrainer(Sturdy, _CompiledBody, trl.DPOTrainer):
    """TRL's ``DPOTrainer`` (Rafailov et al. 2023, arXiv:2305.18290): rows of ``prompt``, ``chosen``, ``rejected``."""


class ORPOTrainer(Sturdy, _CompiledBody, _ORPOTrainer):
    """TRL's ``ORPOTrainer`` (Hong et al. 2024, arXiv:2403.07691), which needs no reference."""
