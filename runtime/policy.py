"""A policy's log-probabilities of given completions, and a step of its loss: the functions that a trainer compiles.

Written in plain torch. The backend finds head, temperature, loss and entropy in them and never holds the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.parts import unwrapped
from .causal_lm import IGNORED
from .policy_loss import PolicyLoss, PolicyOutput, Sampled, policy_loss


class Scores(NamedTuple):
    """What a policy says about completions.

    Attributes:
        log_p: float32 [batch, tokens], in nats; 0 where a token is not scored.
        entropy: of each prediction, float32 [batch, tokens]; likewise.
        balance: load-balancing loss of a mixture of experts, or None.
    """

    log_p: Tensor
    entropy: Tensor
    balance: Tensor | None


class Head(NamedTuple):
    """How completions are scored.

    Attributes:
        temperature: logits are divided by it, as they were when completions were sampled.
        keeps: whether the model takes ``logits_to_keep``, and computes no others.
        balance: whether the load-balancing loss is wanted.
    """

    temperature: float = 1.0
    keeps: bool = True
    balance: bool = False


def keeps_logits(model: nn.Module) -> bool:
    """Whether a causal language model, adapted or not, takes ``logits_to_keep``."""
    whole = unwrapped(model)
    return "logits_to_keep" in inspect.signature(type(whole).forward).parameters


def score(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor, head: Head, entropy: bool = False) -> Scores:
    """Score completions.

    Args:
        model: a causal language model; called as ``model(**inputs)``.
        inputs: ``input_ids`` [batch, seq] that end with the completions, and what else the model takes.
        targets: int64 [batch, tokens], the completions' tokens; ``-100`` is not scored.
        head: how.
        entropy: whether the entropy has a gradient as well.
    """
    tokens = targets.shape[1]
    extra = {"logits_to_keep": tokens + 1} if head.keeps else {}
    if head.balance:
        extra["output_router_logits"] = True
    output = model(**inputs, **extra, use_cache=False)
    logits = output.logits[:, :-1] if head.keeps else output.logits[:, -tokens - 1 : -1]
    logits = logits.float()
    if head.temperature != 1.0:
        logits = logits / head.temperature
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    with nullcontext() if entropy else torch.no_grad():
        log_p = torch.log_softmax(logits, dim=-1)
        spread = -(log_p.exp() * log_p).sum(-1)
    scored = targets != IGNORED
    return Scores(
        -losses.view(targets.shape),
        torch.where(scored, spread, 0.0),
        output.aux_loss if head.balance else None,
    )


class PolicyStep(NamedTuple):
    """A loss, what is logged beside it, and the load-balancing loss, if there is one."""

    output: PolicyOutput
    balance: Tensor | None


def policy_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor,
    head: Head,
    sampled: Sampled,
    settings: PolicyLoss,
) -> PolicyStep:
    """Score completions and compute the loss: trunk, head and loss in one graph. Arguments as of the functions."""
    scores = score(model, inputs, targets, head, settings.entropy_bonus)
    return PolicyStep(policy_loss(scores.log_p, scores.entropy, sampled, settings), scores.balance)
