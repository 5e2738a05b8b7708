"""Supervised fine-tuning: TRL's trainer, whose training step is one compiled graph.

Data, collators, schedules, callbacks and checkpoints are TRL's and transformers'. Ours is the step: forward, loss and
its metrics go through the backend as one graph, which TRL's own loss head and its gradient-checkpointing hooks would
break into pieces.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow.compute
import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..compiler.explain import Explanation, describe
from ..compiler.options import Options
from ..compiler.report import GraphReport
from ..compiler.run import compiled, guards_of, sizes_in_graph
from ..kernels import offload
from ..models.adapters import is_checkpointing
from ..models.parts import unwrapped
from .causal_lm import StepOutput, causal_lm_step
from .image_shapes import ImageShapes
from .learning_rates import LearningRates
from .lengths import WithoutIdleMask, one_length, token_counts
from .memory_trace import MemoryTrace
from .neftune import Neftune
from .pace import Pace
from .recorded import Guards, Recorder
from .replan import Replanned
from .smaller import SmallerBatches
from .sturdy import Sturdy

logger = logging.getLogger(__name__)

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Two names of one setting."""

_REQUIRE_GRAD_HOOKS = {"make_inputs_require_grads", "make_inputs_require_grad"}


class Truncated(NamedTuple):
    """What ``max_length`` did to a data set.

    Attributes:
        rows: longer ones, which are cut off (or split, by the packing strategy of that name).
        of: all rows.
        dropped: those of which nothing is left to train on.
    """

    rows: int
    of: int
    dropped: int


class SFTTrainer(Sturdy, Neftune, LearningRates, trl.SFTTrainer):
    """TRL's ``SFTTrainer`` with the compiled step.

    Takes everything that TRL's does, and ``options`` for the backend (see
    :class:`~unsloth.compiler.options.Options`; logits are dropped unless they say otherwise). ``compile=False`` runs
    the same step eagerly. ``gradient_checkpointing`` is accepted and left to the memory planner,
    which recomputes when keeping does not fit. ``embedding_learning_rate`` and ``loraplus_lr_ratio`` are those of
    :func:`~unsloth.runtime.learning_rates.set_learning_rates`. Losses other than TRL's default (``loss_type="dft"``,
    label smoothing, ``compute_loss_func``) run as TRL runs them, not compiled.
    ``cuda_graphs``: record steps whose batches have one shape, and replay them (one process, one CUDA device).

    Attributes:
        truncated: by data set, "train" or "eval" or its name: what ``max_length`` cut off.
        pace: tokens per second and the time of the first step, compilation included.
        memory_trace: follows the memory of one step, if set before training.
    """

    memory_trace: MemoryTrace | None = None

    args: trl.SFTConfig
    model: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        compile: bool = True,
        options: Mapping[str, Any] | None = None,
        embedding_learning_rate: float | None = None,
        loraplus_lr_ratio: float | None = None,
        cuda_graphs: bool = True,
        **others: Any,
    ) -> None:
        self._rates = {"embedding": embedding_learning_rate, "loraplus_ratio": loraplus_lr_ratio}
        self.options = Options.parse({"logits": "drop", **(options or {})})
        given = "padding" in (options or {})
        args = trl.SFTConfig() if args is None else copy.copy(args)
        for name in CHECKPOINTING:
            if hasattr(args, name):
                setattr(args, name, False)
        args.accelerator_config = copy.copy(args.accelerator_config)
        args.accelerator_config.non_blocking = args.dataloader_pin_memory  # else each batch waits for the last step
        args.logging_nan_inf_filter = False  # it waits for the device at every batch, and logs what the loss was not
        self.truncated: dict[str, Truncated] = {}
        super().__init__(model=model, args=args, **others)
        leave_recomputation_to_the_planner(self.model)
        self.pace = Pace()
        self._smaller = SmallerBatches()
        self._recorder = Recorder(self.model, enabled=cuda_graphs and compile and self._runs_on_one_gpu())
        self._breaks = _graph_breaks()
        self._done, self._share = 0, 1.0  # micro-batches of this step, and how much of one its running part is
        self._seen: list[tuple[StepOutput, Any]] = []  # parts of a micro-batch, with their real (not padding) tokens
        self._reports: list[GraphReport] = []
        if not given and type(self.data_collator) is DataCollatorForLanguageModeling:
            self.options = replace(self.options, padding="right")  # it pads there, with labels that are ignored
        self._step: Callable[..., StepOutput] = causal_lm_step
        self._evaluation: Callable[..., StepOutput] = causal_lm_step
        if compile:
            self._step = Replanned(
                causal_lm_step,
                self.options,
                self._reports,
                tokens=lambda model, inputs, labels, *_: labels.numel(),
                changed=self._recorder.forget,
            )
            # Recognised as well, so that no logits are held; but a few forward passes do not repay Inductor's minutes.
            without_inductor = replace(self.options, lowering="eager")
            self._evaluation = compiled(causal_lm_step, without_inductor, self._reports)
        if self.args.packing and self.args.packing_strategy == "wrapped":
            logger.warning("packing_strategy='wrapped' lets documents attend to each other; 'bfd' keeps them apart")
        # How many tokens an image has is part of the graph then, and not a graph for each size.
        of_images = isinstance(self.processing_class, ProcessorMixin)
        self._shapes = ImageShapes(unwrapped(self.model)) if of_images else None
        self._lengths_vary = not one_length(self.train_dataset)
        if self.args.pad_to_multiple_of is None and (
            not self._lengths_vary or self.args.per_device_train_batch_size == 1
        ):  # elsewhere a batch without padding is a chance, not worth a graph of its own
            self.data_collator = WithoutIdleMask(self.data_collator)
        self._plain_loss = (
            self.args.loss_type == "nll" and self.compute_loss_func is None and self.label_smoother is None
        )
        if not self._plain_loss:
            logger.warning("this loss is not compiled: only the default loss (nll without label smoothing) is")

    @property
    def explanation(self) -> Explanation:
        """What the compiler has recognised in the graphs compiled so far."""
        return Explanation(describe(self.model), list(self._reports))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """In two passes: tokens first, so that it is known how many rows are too long; then they are cut and packed."""
        rest = (processing_class, args, packing, formatting_func, dataset_name)
        if args.max_length is None or not isinstance(dataset, Dataset) or self._is_vision_dataset:
            return super()._prepare_dataset(dataset, *rest)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        tokens: Any = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        prepared: Any = super()._prepare_dataset(tokens, *rest)
        compute: Any = pyarrow.compute
        long = compute.sum(compute.greater(token_counts(tokens, "input_ids"), args.max_length)).as_py() or 0
        dropped = 0 if packing else len(tokens) - len(prepared)
        self.truncated[dataset_name] = Truncated(long, len(tokens), dropped)
        return prepared

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self._plain_loss or return_outputs or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        rest: dict[str, Any] = {name: value for name, value in inputs.items() if name != "labels"}
        rest["use_cache"] = False
        divisor = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=labels.device)
        weight = 0.0
        if self.aux_loss_enabled:
            rest["output_router_logits"] = True
            steps = 1 if divisor is None else self.current_gradient_accumulation_steps
            # It is a mean per micro-batch, or part of one, and has no other divisor.
            weight = self.router_aux_loss_coef * self._share / steps
        if self._lengths_vary:
            for value in (*rest.values(), labels):
                if isinstance(value, Tensor) and value.dim() == 2:
                    torch._dynamo.maybe_mark_dynamic(value, [0, 1])
        if self._shapes is not None:
            rest = self._shapes(rest)
        run = self._step if self.model.training else self._evaluation
        if self._recorder.recording:
            arguments: dict[str, Any] = {"model": model, "inputs": rest, "labels": labels, "num_items": divisor}
            self._arguments = {**arguments, "balance_weight": weight}
        with sizes_in_graph() if self._shapes is not None else nullcontext():
            step = outside_of_ddp(run, model, rest, labels, divisor, weight)
        if self.memory_trace is not None:
            self.memory_trace.turn()
        loss = step.loss
        if self.args.average_tokens_across_devices and divisor is not None:
            loss = loss * self.accelerator.num_processes
        mask = rest.get("attention_mask")
        self._seen.append((step, mask.sum() if mask is not None else rest["input_ids"].numel()))
        if not self.model.training:
            self._record()
        return loss

    def _record(self) -> Tensor | int:
        """Note the metrics as tensors: reading them here would make every step wait for the device.

        Returns:
            the number of real (not padding) tokens.
        """
        if not self._seen:
            return 0
        mode = "train" if self.model.training else "eval"
        steps = [step for step, _ in self._seen]
        entropy, correct, trained = (torch.stack([step[i] for step in steps]).sum() for i in (1, 2, 3))
        self._metrics[mode]["entropy"].append(entropy / trained.clamp(min=1))
        self._metrics[mode]["mean_token_accuracy"].append(correct / trained.clamp(min=1))
        tokens = sum(tokens for _, tokens in self._seen)
        if mode == "train":
            self._total_train_tokens = self._total_train_tokens + tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._seen.clear()
        return tokens

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        started, graphs = time.perf_counter(), len(self._reports)
        step = super().training_step
        # How the pixels of a batch belong to its rows is the model's own affair: neither cut nor recorded.
        images = any(name.startswith(("pixel", "image")) for name in inputs)
        if self._plain_loss and not images and self._smaller.can_run(model, lambda: self.accelerator.sync_gradients):

            def run(part: dict[str, Any], items: Any, share: float) -> Tensor:
                self._share = share
                if self.memory_trace is None:
                    return self._recorded(step, model, part, items)
                return self.memory_trace.run(lambda: self._recorded(step, model, part, items), self._reports)

            loss = self._smaller.run(run, inputs, num_items_in_batch, self._start_again, self._spare)
        else:
            loss = step(model, inputs, num_items_in_batch)
        self._done += 1
        self.pace.after_step(self._record(), started if len(self._reports) > graphs else None)
        return loss

    def _recorded(self, step: Callable[..., Tensor], model: Any, part: dict[str, Any], items: Any) -> Tensor:
        """A micro-batch, or part of one, by the recorder. What it adds to the metrics is an output like the loss."""
        if "position_ids" in part:  # of packed documents: attention asks the device how long the longest is
            return step(model, part, items)
        if not model.training:  # the step would do it, and the guards of a recording ask for it
            model.train()
        accumulated = self.current_gradient_accumulation_steps

        def forward_backward(inputs: dict[str, Any]) -> tuple[Any, ...]:
            divisor = inputs.pop("num_items_in_batch")
            loss = step(model, inputs, divisor)
            output, tokens = self._seen.pop()
            return loss, *(value.detach() for value in output), tokens

        loss, *output, tokens = self._recorder.run(
            forward_backward,
            {**self._prepare_inputs(part), "num_items_in_batch": items},
            self._guards,
            (self._share, accumulated),
            alone=accumulated == 1 and self._smaller.parts == 1,
        )
        self._seen.append((StepOutput(*output), tokens))
        return loss

    def _guards(self) -> Guards | None:
        """Those of the step that has just run, if it is one graph: the rest of one in pieces has guards of its own."""
        return guards_of(causal_lm_step, self._arguments) if _graph_breaks() == self._breaks else None

    def _runs_on_one_gpu(self) -> bool:
        scaled = getattr(self.accelerator, "scaler", None) is not None  # looks at each gradient on the host
        return self.args.device.type == "cuda" and self.args.world_size == 1 and self.args.n_gpu == 1 and not scaled

    def _spare(self) -> bool:
        """What memory can be had for the sake of speed alone: that of recordings, then by another plan."""
        offload.forget()
        if self._recorder.stop("memory was short"):
            return True
        return isinstance(self._step, Replanned) and self._step.for_less()

    def _start_again(self) -> Iterator[dict[str, Any]]:
        """Forget the gradient of a step that ran out of memory; its micro-batches before this one."""
        self.model.zero_grad()
        self._seen.clear()
        yield from self._batch[: self._done]
        self._seen.clear()  # they are in the metrics already

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._done = 0
        return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._recorder.forget()  # its memory serves evaluation; steps after it are recorded again
        with self.pace.paused():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for metrics in self._metrics.values():
            for name, values in metrics.items():
                metrics[name] = [float(v) for v in values]
        if self.model.training and "loss" in logs and (rate := self.pace.lap()) is not None:
            logs["tokens_per_second"] = round(rate, 1)
        super().log(logs, start_time)


def outside_of_ddp(run: Any, model: Any, *arguments: Any) -> Any:
    """Run a step on the model that DDP wraps, between what DDP does before and after a forward pass.

    Inside of the graph its Python would break it, and ``DDPOptimizer`` would cut it at every bucket. Gradients are
    reduced by the hooks on the parameters, which do not ask where the forward pass ran.

    Args:
        run: called with the model and ``arguments``; returns a named tuple.
    """
    if not isinstance(model, DistributedDataParallel):
        return run(model, *arguments)
    arguments, _ = model._pre_forward(*arguments)
    result = run(model.module, *arguments)
    output: Any = model._post_forward(tuple(result))
    return type(result)(*output)


def leave_recomputation_to_the_planner(model: Any) -> None:
    """Undo what gradient checkpointing does to a model; its hook on the embedding would break the graph."""
    for module in model.modules():
        # By name: transformers, PEFT and TRL each add the hook, and transformers only remembers the last one.
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _REQUIRE_GRAD_HOOKS:
                del module._forward_hooks[key]
        if isinstance(module, PreTrainedModel) and is_checkpointing(module):
            module.gradient_checkpointing_disable()
            logger.info("gradient checkpointing is left to the memory planner; memory_budget bounds the peak")


def _graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())
