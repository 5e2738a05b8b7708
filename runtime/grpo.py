"""Training with rewards: TRL's GRPO trainer, whose policy step is one compiled graph.

Prompts, tools, reward functions, advantages, callbacks and schedules are TRL's. Ours is the step: trunk, head,
log-probabilities and loss go through the backend as one graph that never holds the logits, without asking the device
for a number; the reference, and the policy before an update, are a forward pass of the same kind. Completions come from
``_generate_single_turn``, ours or TRL's, and whatever replaces that feeds the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor, nn
from torch.nn import functional as F

from ..compiler.run import compiled, sizes_in_graph
from ..models.parts import unwrapped
from .causal_lm import IGNORED
from .image_shapes import ImageShapes
from .images import ImageRules
from .packed_policy import Packed, pack, packed_policy_step, sharing, unlike
from .policy import Head, PolicyStep, keeps_logits, policy_step, score
from .policy_batch import KNOWN, MEDIA, mark_lengths, media_of, trimmed, without_idle_columns
from .policy_completions import Completions
from .policy_loss import PER_STEP, Sampled, settings_of
from .policy_metrics import PolicyMetrics
from .preferences import CompiledBody
from .prompt_images import check_images, refuse_images, undecoded
from .prompts import check_prompts, context_of
from .reference import without_idle_copy
from .replan import Replanned
from .rewards import ON_ERROR, checked
from .rollouts import load_rollout, save_rollout
from .standing import Progress
from .sturdy import Sturdy
from .trainer import outside_of_ddp

logger = logging.getLogger(__name__)

_IN_A_ROW = "in a row a prompt stands once, and its pixels belong to as many completions as it has"


class GRPOTrainer(PolicyMetrics, Completions, Sturdy, CompiledBody, trl.GRPOTrainer):
    """TRL's ``GRPOTrainer`` (Shao et al. 2024, arXiv:2402.03300) with the compiled policy step.

    Takes everything that TRL's does, ``options`` for the backend, ``compile=False`` to run the same step eagerly, and
    learning rates as :class:`~unsloth.runtime.trainer.SFTTrainer` does. ``gradient_checkpointing`` is accepted and left
    to the memory planner. With fresh adapters the reference is the model without them; with ``beta=0`` there is none.
    Log-probabilities of the policy that sampled are computed only where updates come between. Losses with
    ``top_entropy_quantile`` and losses that are not in :data:`~unsloth.runtime.policy_loss.LOSSES` are TRL's own, on
    compiled log-probabilities.

    Rows may have images, in a column ``images`` or ``image`` or in their messages. They are opened as the collator
    opens them before TRL sees them, and pixels go along with each micro-batch.

    Args:
        reward_errors: "raise" stops at a reward function that raises, or returns NaN or no number, and at a completion
            that all of them judge with None; "skip" warns and leaves such completions out.
        shared_prompts: make one row of a micro-batch's completions, without padding, in which a prompt stands once for
            all that complete it, where the model allows it; False pads them to each other.
        fast_rollouts: make completions by :func:`~unsloth.runtime.generation.engine.complete`, where the model and the
            settings allow it; False leaves them to ``generate``. TRL's ``use_vllm`` goes before.
        image_rules: what is done with images; none are fetched from URLs, or converted, if they do not say so.

    Raises:
        DataError: for a prompt that fills the model's context, and for an image that is missing or no image, naming the
            row; for images and a model or a ``processing_class`` of texts alone.
        RewardError: from training, naming the reward function and the completion.
    """

    args: trl.GRPOConfig
    _buffered_inputs: Any
    _last_world_entropy: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *,
        compile: bool = True,
        options: Mapping[str, Any] | None = None,
        reward_errors: str = "raise",
        shared_prompts: bool = True,
        fast_rollouts: bool = True,
        image_rules: ImageRules = ImageRules(),  # noqa: B008  it is frozen
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        if reward_errors not in ON_ERROR:
            raise ValueError(
                f"reward_errors cannot be {reward_errors!r}; it is one of {', '.join(map(repr, ON_ERROR))}"
            )
        if args is None:
            path = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = trl.GRPOConfig(f"{path.rsplit('/', 1)[-1]}-GRPO")
        self.reward_errors = reward_errors
        self._compiles, self._rules = compile, image_rules
        data = {"train_dataset": undecoded(train_dataset), "eval_dataset": undecoded(eval_dataset)}
        refuse_images(data["train_dataset"], model, processing_class)
        more = {**data, "processing_class": processing_class, **others}
        super().__init__(model, args=args, reward_funcs=reward_funcs, compile=False, options=options, **more)
        refuse_images(self.train_dataset, self.model, self.processing_class)
        without_idle_copy(self.model)
        self.reward_funcs = [
            function if isinstance(function, nn.Module) else checked(function, name, reward_errors)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self._step_of: Any = policy_step
        self._evaluation: Any = policy_step
        self._step_of_row: Any = packed_policy_step
        self._score: Any = score
        if compile:
            self._step_of_row = Replanned(packed_policy_step, self.options, self._reports, tokens=_tokens_given)
            self._step_of = Replanned(policy_step, self.options, self._reports, tokens=_tokens_given)
            self._score = compiled(score, self.options, self._reports)
            # A few forward passes do not repay Inductor's minutes.
            self._evaluation = compiled(policy_step, replace(self.options, lowering="eager"), self._reports)
        self._head = Head(self.temperature, keeps_logits(self.accelerator.unwrap_model(self.model)))
        self._loss = settings_of(self)
        if self._loss is None:
            logger.warning("this loss is TRL's, on compiled log-probabilities: only those of policy_loss are compiled")
        self._buffer: Any = None  # the micro-batches of a generation, without idle padding
        self._generation: int | None = None  # which one the buffer holds
        self._trained: Any = 0  # tokens of the micro-batch that was trained on last
        self._context = context_of(self.model)
        self._left_to = self._engine_instead(fast_rollouts)
        # How many tokens an image has is part of a graph then, and not a graph for each size.
        models: list[Any] = [self.model, self.ref_model] if self._is_vlm and compile else []
        looking = [m for m in models if m is not None]
        self._shapes = {id(m): ImageShapes(unwrapped(m)) for m in looking}
        self._probed, self._pads = False, self._padded_because(shared_prompts)
        self._told_of_images = False
        check_prompts(self, self.train_dataset, self._context)
        check_images(self.train_dataset, self.processing_class, image_rules, self.row_name)
        check_images(self.eval_dataset, self.processing_class, image_rules, self._name_to_evaluate)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        generation, kept = (
            self._step // ((self.args.steps_per_generation or 1) * self.num_iterations),
            self._buffered_inputs,
        )
        if self.model.training and kept is not None and kept is self._buffer and self._generation == generation:
            return kept[self._step % len(kept)]  # which a step that is done again needs, and TRL would generate anew
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            self._smaller.settle(self._sums())  # generated once, and logged once
        if not KNOWN.issuperset(inputs):
            return inputs
        if not self.model.training:
            return trimmed(inputs)
        if self._buffered_inputs is not self._buffer:
            self._buffer = self._buffered_inputs = [trimmed(part) for part in self._buffered_inputs]
        self._generation = generation
        return self._buffer[self._step % len(self._buffer)]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _note_start(self) -> None:
        super()._note_start()
        self._at_start_of_step = self._buffered_inputs  # a step that is stopped in its middle begins anew

    def _fill(self, staged: Path, folder: Path) -> None:
        super()._fill(staged, folder)
        if not self.args.save_only_model:
            batches = self._at_start_of_step if self._in_step else self._buffered_inputs
            controller = {"entropy_coef": self.entropy_coef, "last_world_entropy": self._last_world_entropy}
            save_rollout(staged / self._rollout_name, batches, controller)

    @property
    def _rollout_name(self) -> str:
        return f"rollout_{self.args.process_index}.safetensors"

    def _read_progress(self, checkpoint: Path) -> Progress:
        self._rollout = checkpoint / self._rollout_name
        return super()._read_progress(checkpoint)

    def _begin(self) -> None:
        super()._begin()
        self._generation = None
        self._step, self._buffered_inputs = self.state.global_step * self.args.gradient_accumulation_steps, None
        if self._resumed is not None and self._rollout.is_file():
            self._buffered_inputs, controller = load_rollout(self._rollout, self.args.device)
            self.entropy_coef = controller.get("entropy_coef", self.entropy_coef)
            self._last_world_entropy = controller.get("last_world_entropy", self._last_world_entropy)
        self._buffer = self._at_start_of_step = self._buffered_inputs

    # -- the step ------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **media: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As TRL's, compiled; whoever asks with gradients may differentiate the entropy as well."""
        if any(value is not None and name not in MEDIA for name, value in media.items()):
            rest = (input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss)
            return super()._get_per_token_logps_and_entropies(model, *rest, **media)
        head = self._head._replace(balance=compute_aux_loss)
        parts, size = [], batch_size or len(input_ids)
        for first in range(0, len(input_ids), size):
            rows = slice(first, first + size)
            inputs, targets = without_idle_columns(
                input_ids[rows], attention_mask[rows], logits_to_keep, media_of(media, rows)
            )
            with self.accelerator.autocast():
                graded = compute_entropy and torch.is_grad_enabled()
                found = self._run(self._score, model, inputs, targets, head, graded)
            missing = (0, logits_to_keep - targets.shape[1])
            parts.append(found._replace(log_p=F.pad(found.log_p, missing), entropy=F.pad(found.entropy, missing)))
        log_p, entropy = (torch.cat([part[i] for part in parts]) for i in range(2))
        balance = torch.stack([part.balance for part in parts]).mean() if compute_aux_loss else None
        return log_p, entropy if compute_entropy else None, balance

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._trained = inputs["completion_mask"].sum() + inputs["prompt_mask"].sum()
        if self._loss is None or not KNOWN.issuperset(inputs):
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        step = self._policy_step(model, inputs)
        output, accumulated = step.output, self.current_gradient_accumulation_steps if mode == "train" else 1
        if self.loss_type in PER_STEP:  # what they are divided by was counted over the whole generation
            items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            share = accumulated / (self.args.steps_per_generation or 1) if mode == "train" else 1.0
            policy = loss = output.loss / (items * share)
        else:
            policy, loss = output.loss, output.loss / accumulated
        if self._entropy_bonus_enabled:
            loss = loss - self._entropy_weight() * output.bonus / accumulated
            self._metrics[mode]["policy_loss"].append(self._everywhere(policy.detach().reshape(1)).nanmean())
            self._follow_entropy(output.metrics["entropy"], mode)
        if step.balance is not None:
            loss = loss + self.router_aux_loss_coef * step.balance / accumulated
            self._metrics[mode]["aux_loss"].append(self._everywhere(step.balance.detach().reshape(1)).mean())
        self._note(output.metrics, output.per_completion, mode)
        return loss

    def _policy_step(self, model: Any, inputs: Mapping[str, Any]) -> PolicyStep:
        whole, targets, *others = self._arguments(inputs)
        if (packed := self._row_of(inputs)) is not None:
            self._planned = self._step_of_row if isinstance(self._step_of_row, Replanned) else None
            with sharing(self.accelerator.unwrap_model(self.model)):
                return outside_of_ddp(self._step_of_row, model, packed, *others)
        run = self._step_of if self.model.training else self._evaluation
        self._planned = self._step_of if isinstance(self._step_of, Replanned) else None
        return self._run(run, model, whole, targets, *others)

    def _run(self, run: Any, model: Any, inputs: dict[str, Any], *others: Any) -> Any:
        """A function of the model and its inputs, of any sizes of images."""
        shapes = self._shapes.get(id(self.accelerator.unwrap_model(model)))
        if shapes is None:
            return outside_of_ddp(run, model, inputs, *others)
        with sizes_in_graph():
            return outside_of_ddp(run, model, shapes(inputs), *others)

    def _padded_because(self, shared_prompts: bool) -> str | None:
        """Why completions are padded to each other before the model has been asked, or None."""
        if not shared_prompts:
            return "nobody wants it"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "weights are spread over processes"
        return "tokens of a repeated prompt count in the load-balancing loss" if self.aux_loss_enabled else None

    def _row_of(self, inputs: Mapping[str, Any]) -> Packed | None:
        """A micro-batch as one row, where it has several completions and the model allows it."""
        if not self.model.training or self._pads is not None or len(inputs["prompt_ids"]) < 2:
            return None
        if not MEDIA.isdisjoint(inputs):
            if not self._told_of_images:
                self._told_of_images = True
                logger.warning("completions of prompts with images are padded to each other, because %s", _IN_A_ROW)
            return None
        if not self._probed:
            self._probed, self._pads = True, unlike(self.accelerator.unwrap_model(self.model))
            if self._pads is not None:
                logger.warning("completions are padded to each other in a micro-batch, because %s", self._pads)
                return None
        packed = pack(inputs)
        if packed is not None:
            mark_lengths(*packed)
        return packed

    def _arguments(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Of :func:`policy_step`, for a micro-batch."""
        given = {**inputs, "advantages": _column(inputs["advantages"])}
        whole = {
            "input_ids": torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1),
            "attention_mask": torch.cat([given["prompt_mask"], given["completion_mask"]], dim=1),
        }
        completed = given["completion_mask"]
        if len(completed) == 1:  # nothing is padded once idle columns are gone
            del whole["attention_mask"]
        assert self._loss is not None
        sampled = Sampled(
            given["advantages"],
            completed * given["tool_mask"] if "tool_mask" in given else completed,
            given.get("old_per_token_logps"),
            given.get("ref_per_token_logps"),
            given.get("sampling_per_token_logps") if self._loss.off_policy_mask_threshold is not None else None,
            given.get("importance_sampling_ratio"),
        )
        targets = given["completion_ids"].masked_fill(completed == 0, IGNORED)
        media = media_of(inputs)
        mark_lengths(*whole.values(), targets, *sampled)
        return {**media, **whole}, targets, self._head._replace(balance=self.aux_loss_enabled), sampled, self._loss

    def _tokens_of(self, inputs: Any) -> Any:
        return self._trained

    def _whole_because(self) -> str:
        return "completions were generated, and are counted, for micro-batches of this size"

    def _spare(self) -> bool:
        """Plan again where the step's earlier micro-batches can be done again, with the completions that they had."""
        generated = (self.args.steps_per_generation or 1) * self.num_iterations
        held = self._done == 0 or generated % self.args.gradient_accumulation_steps == 0
        held = held and self._buffered_inputs is self._buffer
        return held and not self.use_adaptive_entropy and super()._spare()

    def _start_again(self) -> Iterator[Any]:
        here = self._step
        for number, batch in enumerate(super()._start_again()):
            self._step = here - self._done + number
            yield batch
        self._step = here


def _tokens_given(model: Any, inputs: Packed | Mapping[str, Tensor], *others: Any) -> int:
    return (inputs.row[0] if isinstance(inputs, Packed) else inputs["input_ids"]).numel()


def _column(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
