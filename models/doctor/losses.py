"""Rules over the loss and what it trains: accumulation, the head, tied weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..parts import unwrapped
from .attention import head_of
from .probe import takes_anything, tokens
from .rule import ERROR, WARNING, Evidence, rule
from .subject import Subject

_TRAINED = (11, 3)
"""Tokens that are trained on in the two micro-batches that the loss is asked about."""


def _batches() -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[1, : 12 - _TRAINED[1]] = -100
    return ids, labels


def _losses(model: Any) -> tuple[float, float, float]:
    """The loss of two rows at once; the sum of theirs, given the number of all trained tokens; the mean of theirs."""
    ids, labels = _batches()
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels, use_cache=False).loss
        rows = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1], "use_cache": False} for i in range(2)]
        parts = [model(**row, num_items_in_batch=torch.tensor(sum(_TRAINED))).loss for row in rows]
        means = [model(**row).loss for row in rows]
    return float(whole), float(sum(parts)), float(sum(means)) / 2


def _milder(subject: Subject) -> bool:
    """Whether the run's trainer computes the loss itself."""
    return subject.run is not None and subject.run.trainer == "unsloth"


@rule(
    "loss-per-micro-batch",
    ERROR,
    "code",
    remedy="divide the sum of the loss by num_items_in_batch where it is given; unsloth's SFTTrainer computes the loss "
    "itself, by all tokens of the accumulated batch",
)
def loss_per_micro_batch(subject: Subject) -> Iterator[Evidence]:
    """The model takes the number of trained tokens of the whole batch and does not divide by it: with gradient
    accumulation, tokens of short rows count more."""
    model = subject.probe.build()
    if not takes_anything(model) or getattr(model, "accepts_loss_kwargs", True) is False:
        return
    whole, parts, _ = _losses(model)
    if abs(parts / whole - 1) > 1e-3:
        text = (
            f"two micro-batches with {_TRAINED[0]} and {_TRAINED[1]} trained tokens: their losses add up to "
            f"{parts:.4g}, the loss of both at once is {whole:.4g}"
        )
        yield Evidence(text, WARNING if _milder(subject) else None)


@rule(
    "accumulation-scales-gradients",
    ERROR,
    "code",
    remedy="remove accepts_loss_kwargs = False from the class, or train with gradient_accumulation_steps: 1; unsloth's "
    "SFTTrainer is not affected",
)
def accumulation_scales_gradients(subject: Subject) -> Iterator[Evidence]:
    """The class says that it cannot be told the number of trained tokens: accepts_loss_kwargs is False, or forward has
    no place for it. transformers' trainer then divides each micro-batch's mean by the number of them, and one that
    passes the number all the same divides twice, so that gradients shrink with the accumulation steps.
    """
    model = subject.probe.build()
    named = getattr(model, "accepts_loss_kwargs", True) is False
    if not named and takes_anything(model):
        return
    why = "accepts_loss_kwargs is False" if named else "forward takes no further arguments"
    ids, labels = _batches()
    with torch.no_grad():
        both = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
        one = [float(model(input_ids=ids[i : i + 1], labels=labels[i : i + 1], use_cache=False).loss) for i in (0, 1)]
    text = (
        f"{subject.probe.name}: {why}; two micro-batches train on {sum(one) / 2:.4g}, both rows at once on {both:.4g}"
    )
    if named and takes_anything(model) and abs(_losses(model)[1] / both - 1) < 1e-3:
        text += ", and a loss that is divided by all tokens would be divided by 2 again"
    yield Evidence(text, WARNING if _milder(subject) else None)


@rule(
    "head-adapter-bypassed",
    WARNING,
    "code",
    remedy="leave lm_head out of target_modules (train it whole with modules_to_save, if at all), or take a loss that "
    "calls the head",
)
def head_adapter_bypassed(subject: Subject) -> Iterator[Evidence]:
    """The loss reads the head's weight and does not call the head: an adapter on it gets no gradient, and is saved as
    if it had been trained."""
    model = subject.probe.build()
    head = head_of(model)
    path = next((n for n, m in model.named_modules() if m is head), None) if isinstance(head, nn.Linear) else None
    if path is None:
        return
    if not _sees_head(model, path):
        adapted = subject.run.adapted if subject.run is not None else _adapted(subject.model)
        on_head = adapted is not None and any(name.rpartition(".")[2] == path.rpartition(".")[2] for name in adapted)
        yield Evidence(
            f"the loss of {subject.probe.name} does not change with what {path} returns"
            + (", which has an adapter" if on_head else ""),
            ERROR if on_head else None,
        )


def _sees_head(model: Any, path: str) -> bool:
    """Whether what the head returns reaches the loss, as an adapter's part of it would have to."""
    gate = torch.ones((), requires_grad=True)
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: output * gate)
    ids, labels = _batches()
    try:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(loss, gate, allow_unused=True)
    return gradient is not None and bool(gradient != 0)


def _adapted(model: Any) -> list[str] | None:
    """Names of the modules with adapters of a model in memory."""
    if model is None:
        return None
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


@rule(
    "tied-weights-broken",
    ERROR,
    "code config",
    remedy="name the head in the class's _tied_weights_keys; after replacing a weight call model.tie_weights()",
)
def tied_weights_broken(subject: Subject) -> Iterator[str]:
    """The configuration ties embedding and head, and the model holds two tensors: they drift apart in training, and one
    of them is lost when it is saved."""
    if not getattr(subject.text_config, "tie_word_embeddings", False):
        return
    models = {f"a new {subject.probe.name}": subject.probe.build()}
    if subject.model is not None:
        models["this model"] = unwrapped(subject.model)
    for words, model in models.items():
        embedding, head = model.get_input_embeddings(), head_of(model)
        weights = [getattr(getattr(m, "base_layer", m), "weight", None) for m in (embedding, head)]
        if all(isinstance(w, torch.Tensor) for w in weights) and weights[0] is not weights[1]:
            yield f"in {words} the head's weight is not the embedding's"
