"""Preference tuning: TRL's DPO and ORPO trainers on a compiled model, as sturdy as ours.

Losses, reference model and metrics are TRL's. What is compiled is the model's body, from the embeddings to the last
norm: where the arithmetic is. The policy and its reference (the same weights without their adapters) are a graph each.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import trl
from datasets import Dataset

from ..compiler.backend import compile_graph
from ..compiler.explain import Explanation, describe
from ..compiler.options import Options
from ..compiler.report import GraphReport
from ..kernels import offload
from ..models.parts import unwrapped
from .learning_rates import LearningRates
from .lengths import token_counts
from .neftune import Neftune
from .pace import Pace
from .reference import without_idle_copy
from .replan import Replanned
from .smaller_pairs import INSEPARABLE, SmallerPairs
from .sturdy import Sturdy
from .trainer import CHECKPOINTING, Truncated, leave_recomputation_to_the_planner

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")  # as far as ORPO goes, we know
    from trl.experimental.orpo import ORPOConfig
    from trl.experimental.orpo import ORPOTrainer as _ORPOTrainer

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class CompiledBody(Neftune, LearningRates, _Base):
    """Mixin before one of TRL's trainers.

    Takes what that takes, by name, ``options`` for the backend, ``compile=False`` to run eagerly, and learning rates as
    :class:`~unsloth.runtime.trainer.SFTTrainer` does. ``gradient_checkpointing`` is accepted and left to the memory
    planner.

    Attributes:
        pace: tokens (of both answers) per second and the time of the first step, compilation included.
        truncated: as the SFT trainer's, for "train" and "eval".
    """

    model: Any
    _batch: Sequence[Any]  # Sturdy's: the micro-batches of the running step
    _metrics: Any
    _stored_metrics: Any
    _total_train_tokens: Any

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        compile: bool = True,
        options: Mapping[str, Any] | None = None,
        embedding_learning_rate: float | None = None,
        loraplus_lr_ratio: float | None = None,
        **others: Any,
    ) -> None:
        self._rates = {"embedding": embedding_learning_rate, "loraplus_ratio": loraplus_lr_ratio}
        self.options = Options.parse(options or {})
        self._reports: list[GraphReport] = []
        self.truncated: dict[str, Truncated] = {}
        args = copy.copy(args)
        for name in CHECKPOINTING:
            if hasattr(args, name):
                setattr(args, name, False)
        args.logging_nan_inf_filter = False
        super().__init__(model=model, args=args, **others)
        leave_recomputation_to_the_planner(self.model)
        self.pace = Pace()
        self._smaller = SmallerPairs()
        self._done = 0  # micro-batches of this step
        self._planned: Replanned | None = None
        if compile:
            self._compile(self.model, trained=True)
            if (reference := getattr(self, "ref_model", None)) is not None:
                self._compile(reference, trained=False)

    def _compile(self, model: Any, *, trained: bool) -> None:
        whole = unwrapped(model)
        body = whole.get_decoder()
        if not trained:
            observe = self._reports.append
            body.compile(backend=lambda graph, inputs: compile_graph(graph, inputs, self.options, observe=observe))
            return
        # As Module.compile would, but so that it can be planned again.
        self._planned = Replanned(body._call_impl, self.options, self._reports, tokens=_tokens_given)
        body._compiled_call_impl = self._planned

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        started, graphs = time.perf_counter(), len(self._reports)
        step = super().training_step
        self._counted = getattr(self, "_total_train_tokens", 0)
        loss = self._smaller.run(
            lambda part, items: step(model, part, items),
            inputs,
            num_items_in_batch,
            self._sums(),
            self._start_again,
            self._spare,
            self._whole_because(),
        )
        self._done += 1
        self.pace.after_step(self._tokens_of(inputs), started if len(self._reports) > graphs else None)
        return loss

    def _tokens_of(self, inputs: Any) -> Any:
        """Real (not padding) tokens of a micro-batch that has been trained on."""
        return sum(value.sum() for name, value in inputs.items() if name.endswith("attention_mask"))

    def _spare(self) -> bool:
        """Whether a plan for less memory takes the place of the one that was too large."""
        offload.forget()
        return self._planned is not None and self.args.world_size == 1 and self._planned.for_less()

    def _whole_because(self) -> str:
        """Why micro-batches cannot be halved; empty where they can."""
        if self.args.world_size > 1:
            return "processes wait for each other's metrics in the middle of a step"
        for name in getattr(self, "loss_types", ()):  # DPO's
            if name in INSEPARABLE:
                return f"loss_type {name!r} is not the sum of its parts: {INSEPARABLE[name]}"
        return ""

    def _sums(self) -> dict[str, list[float]]:
        """TRL's metrics of training since the last log."""
        return (self._metrics if hasattr(self, "_metrics") else self._stored_metrics)["train"]

    def _start_again(self) -> Iterator[dict[str, Any]]:
        """Forget the gradient of a step that ran out of memory; its micro-batches before this one."""
        self.model.zero_grad()
        yield from self._batch[: self._done]
        self._total_train_tokens = self._counted  # theirs are in it already

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._done = 0
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if self._smaller.share == 1 else loss * self._smaller.share

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.pace.paused():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and "loss" in logs and (rate := self.pace.lap()) is not None:
            logs["tokens_per_second"] = round(rate, 1)
        super().log(logs, *args, **kwargs)

    @property
    def explanation(self) -> Explanation:
        """What the compiler has recognised in the graphs compiled so far."""
        return Explanation(describe(self.model), list(self._reports))


def _tokens_given(*arguments: Any, **named: Any) -> int:
    """Tokens of a batch that a model's body is given, as numbers or as embeddings, padding included."""
    given = next(named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None)
    return given.shape[0] * given.shape[1]


class DPOTrainer(Sturdy, CompiledBody, trl.DPOTrainer):
    """TRL's ``DPOTrainer`` (Rafailov et al. 2023, arXiv:2305.18290): rows of ``prompt``, ``chosen``, ``rejected``.

    The reference of a model with fresh adapters is the model without them. Adapters that have learnt something already
    are copied by TRL, and the copy is the reference.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        without_idle_copy(self.model)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        prepared: Any = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is not None and isinstance(dataset, Dataset):
            lengths = [token_counts(prepared, f"{name}_ids").to_numpy() for name in ("prompt", "chosen", "rejected")]
            longest = lengths[0] + np.maximum(lengths[1], lengths[2])
            gone = len(dataset) - len(prepared)
            self.truncated[dataset_name] = Truncated(int((longest > args.max_length).sum()) + gone, len(dataset), gone)
        return prepared


class ORPOTrainer(Sturdy, CompiledBody, _ORPOTrainer):
    """TRL's ``ORPOTrainer`` (Hong et al. 2024, arXiv:2403.07691), which needs no reference."""

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        chosen, rejected, *logits, likelihood = (output := super().concatenated_forward(model, batch))[:5]
        # A mean over tokens, among terms that are means over pairs: weighted by pairs, it shall count by tokens.
        by_tokens = self._smaller.token_share / self._smaller.share
        return chosen, rejected, *logits, likelihood * by_tokens, *output[5:]


TRAINERS = {"dpo": (DPOTrainer, trl.DPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}
"""By the name of the method: our trainer and TRL's configuration."""
