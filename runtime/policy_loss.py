"""Policy-gradient losses of GRPO and its relatives, from log-probabilities of the tokens that were sampled.

Per token, with log p of the policy that is trained, log q of the policy that sampled, and the advantage A of the
completion (how much better its reward was than its group's):

    r = exp(log p - log q)          per token, or exp of its mean over the completion (GSPO, arXiv:2507.18071)
    clipped   -min(min(r, δ) A, clip(r, 1 - ε_low, 1 + ε_high) A)      grpo, bnpo, dr_grpo, dapo, luspo
    cispo     -sg(min(r, ε_high)) A log p                               arXiv:2506.13585
    sapo      -4/τ σ(τ (r - 1)) A,  τ by the sign of A                  arXiv:2511.20347
    vespo     -sg(φ(w)) A log p,  φ(w) = exp(λ + k log w - λ w)         w of the whole completion, k and λ by A's sign

plus β (exp(d) - d - 1) with d = log p_reference - log p (Schulman's estimator of the KL divergence). The losses differ
further in what the sum over tokens is divided by: the completion's length and the number of completions (grpo,
arXiv:2402.03300; sapo), the tokens of the batch (bnpo), a constant (dr_grpo, arXiv:2503.20783), the number of
completions alone (luspo), or the tokens of the whole accumulated step (dapo, arXiv:2503.14476; cispo, vespo).

Definitions and names of settings are those of TRL 1.16, against which every one is tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
PER_STEP = ("cispo", "dapo", "vespo")
"""Losses that are sums, divided by the number of tokens in the whole accumulated step."""
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")

_LARGEST_LOG = 20.0
_SMALLEST_LOG = math.log(1e-8)


@dataclass(frozen=True)
class PolicyLoss:
    """Which loss, and its numbers; names and defaults are those of ``trl.GRPOConfig``.

    Attributes:
        max_completion_length: what dr_grpo divides by, beside the number of completions.
        entropy_bonus: whether the entropy is rewarded, and so has a gradient.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    off_policy_mask_threshold: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    max_completion_length: int = 256
    entropy_bonus: bool = False


class Sampled(NamedTuple):
    """What is known about a batch of completions before the policy is asked.

    Attributes:
        advantages: float32 [batch, 1] or [batch, tokens].
        mask: int64 [batch, tokens]: 1 where a token is trained on; not at padding, nor at what a tool has said.
        old: log-probabilities under the policy that sampled, float32 [batch, tokens]; None if that is the policy that
            is trained, as it is.
        reference: log-probabilities under the reference; None without a KL term.
        sampler: log-probabilities as the engine that sampled has reported them, which rounds otherwise; or None.
        correction: importance weight of the engine against ``old``, [batch, tokens] or [batch, 1]; or None.
    """

    advantages: Tensor
    mask: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    sampler: Tensor | None = None
    correction: Tensor | None = None


class PolicyOutput(NamedTuple):
    """A loss and what is logged beside it.

    Attributes:
        loss: 0-dimensional. A mean over the batch, or a sum over its tokens for ``PER_STEP``.
        bonus: mean entropy of the tokens that are trained on; with a gradient if it is rewarded.
        metrics: by TRL's names: sum over the trained tokens (or completions) and their number, float32 [2].
        per_completion: by TRL's names, of which the extremes are logged: float32 [batch], NaN for one without tokens.
    """

    loss: Tensor
    bonus: Tensor
    metrics: dict[str, Tensor]
    per_completion: dict[str, Tensor]


def policy_loss(log_p: Tensor, entropy: Tensor, sampled: Sampled, settings: PolicyLoss) -> PolicyOutput:
    """The loss of a batch of completions.

    Args:
        log_p: log-probabilities of the sampled tokens, float32 [batch, tokens].
        entropy: of each prediction, in nats, likewise.
        sampled: what they are compared with.
        settings: which loss.

    Raises:
        ValueError: for a loss, or a level of importance sampling, that is not known.
    """
    mask, advantages = sampled.mask, sampled.advantages
    log_ratio = log_p - (log_p.detach() if sampled.old is None else sampled.old)
    ratio = torch.exp(_at_level(log_ratio, mask, settings.importance_sampling_level))
    metrics: dict[str, Tensor] = {}
    per_completion: dict[str, Tensor] = {}

    kl = None
    if settings.beta and sampled.reference is not None:
        difference = sampled.reference - log_p
        kl = torch.exp(difference) - difference - 1
        kl = kl * ratio if settings.use_bias_correction_kl else kl
        metrics["kl"] = _sum_and_count(kl, mask)
    metrics["entropy"] = _sum_and_count(entropy, mask)

    if settings.loss_type in CLIPPED:
        clipped = torch.clamp(ratio, 1 - settings.epsilon_low, 1 + settings.epsilon_high)
        ratio = ratio if settings.delta is None else torch.clamp(ratio, max=settings.delta)
        loss = -torch.min(ratio * advantages, clipped * advantages)
        low = (ratio < 1 - settings.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + settings.epsilon_high) & (advantages > 0)
        for name, region in (("low", low), ("high", high), ("region", low | high)):
            metrics[f"clip_ratio/{name}_mean"] = _sum_and_count(region.float(), mask)
        per_completion["clip_ratio/low_min"] = _completion_means(low.float(), mask)
        per_completion["clip_ratio/high_max"] = _completion_means(high.float(), mask)
    elif settings.loss_type == "cispo":
        loss = -torch.clamp(ratio, max=settings.epsilon_high).detach() * advantages * log_p
        region = (ratio > settings.epsilon_high) & (advantages > 0)
        metrics["cispo_clip_ratio"] = _sum_and_count(region.float(), mask)
    elif settings.loss_type == "sapo":
        steepness = torch.where(advantages > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
        loss = -torch.sigmoid(steepness * (ratio - 1)) * 4 / steepness * advantages
    elif settings.loss_type == "vespo":
        weight = _vespo_weight(log_ratio.detach(), sampled, settings)
        loss = -weight * advantages * log_p
        metrics["vespo/phi_seq_mean"] = _sum_and_count(weight, mask)
    else:
        raise ValueError(f"loss_type {settings.loss_type!r} is not known; it is one of {', '.join(LOSSES)}")

    if settings.off_policy_mask_threshold is not None:
        loss = loss * _near_policy(log_p.detach(), sampled, settings.off_policy_mask_threshold)
    if sampled.correction is not None and settings.loss_type != "vespo":
        loss = loss * sampled.correction
    if kl is not None:
        loss = loss + settings.beta * kl
    bonus = (entropy * mask).sum() / mask.sum().clamp(min=1)
    return PolicyOutput(_reduced(loss, mask, settings), bonus, metrics, per_completion)


def _at_level(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """Per token [batch, tokens], or the mean of each completion [batch, 1]."""
    if level == "token":
        return log_ratio
    if level == "sequence":
        return (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    raise ValueError(f"importance_sampling_level {level!r} is not known; it is 'token' or 'sequence'")


def _reduced(loss: Tensor, mask: Tensor, settings: PolicyLoss) -> Tensor:
    """One number of losses per token, or per completion (which then counts for each of its tokens)."""
    masked = loss * mask
    if settings.loss_type in PER_STEP:
        return masked.sum()
    if settings.loss_type == "bnpo":
        return masked.sum() / mask.sum().clamp(min=1)
    if settings.loss_type == "dr_grpo":
        return masked.sum() / (loss.shape[0] * settings.max_completion_length)
    of_completions = masked.sum(-1)
    if settings.loss_type != "luspo":
        of_completions = of_completions / mask.sum(-1).clamp(min=1)
    return of_completions.mean()


def _near_policy(log_p: Tensor, sampled: Sampled, threshold: float) -> Tensor:
    """[batch, 1]: 0 for bad completions that the policy has moved away from (DeepSeek-V3.2, arXiv:2512.02556)."""
    sampler = sampled.sampler if sampled.sampler is not None else sampled.old
    drift = torch.zeros_like(log_p) if sampler is None else torch.nan_to_num(sampler - log_p, nan=0.0)
    mean = (drift * sampled.mask).sum(-1, keepdim=True) / sampled.mask.sum(-1, keepdim=True).clamp(min=1)
    return ((sampled.advantages >= 0) | (mean <= threshold)).to(log_p.dtype)


def _vespo_weight(log_ratio: Tensor, sampled: Sampled, settings: PolicyLoss) -> Tensor:
    """φ(w) of the importance weight w of each whole completion, [batch, 1]."""
    bounded = log_ratio.clamp(-_LARGEST_LOG, _LARGEST_LOG) * sampled.mask
    log_w = bounded.sum(-1, keepdim=True)
    if sampled.correction is not None:
        log_w = log_w + sampled.correction.log().clamp(_SMALLEST_LOG, _LARGEST_LOG).sum(-1, keepdim=True)
    log_w = log_w.clamp(_SMALLEST_LOG, _LARGEST_LOG)
    good = sampled.advantages >= 0
    k = torch.where(good, settings.vespo_k_pos, settings.vespo_k_neg)
    rate = torch.where(good, settings.vespo_lambda_pos, settings.vespo_lambda_neg).clamp(min=1e-4)
    return torch.exp(rate + k * log_w - rate * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


# -- metrics -----------------------------------------------------------------------------------------------------------


def _sum_and_count(x: Tensor, mask: Tensor) -> Tensor:
    x = x.detach()
    if x.shape[1] == 1:  # one value per completion
        return torch.stack([x.sum().float(), x.new_full((), x.shape[0], dtype=torch.float32)])
    return torch.stack([(x * mask).sum().float(), mask.sum().float()])


def _completion_means(x: Tensor, mask: Tensor) -> Tensor:
    return x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1)


def settings_of(trainer: Any) -> PolicyLoss | None:
    """The loss that a trainer of TRL's was configured for; None if it has parts that are not known here."""
    args = trainer.args
    if args.loss_type not in LOSSES or args.top_entropy_quantile < 1.0:
        return None
    names = ("loss_type", "importance_sampling_level", "delta", "beta", "use_bias_correction_kl")
    names += ("off_policy_mask_threshold", "sapo_temperature_pos", "sapo_temperature_neg", "max_completion_length")
    names += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    return PolicyLoss(
        **{name: getattr(args, name) for name in names},
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        entropy_bonus=args.entropy_coef != 0.0 or args.use_adaptive_entropy,
    )
