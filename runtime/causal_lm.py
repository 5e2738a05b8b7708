"""The training step of a causal language model: what the trainer compiles.

Written in plain torch. The backend finds linear + cross-entropy in it and never holds the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""The label of a token that is not trained on or scored, as in transformers."""


class StepOutput(NamedTuple):
    """What one compiled step returns. All are 0-dimensional; the sums run over the tokens that are trained on.

    Attributes:
        loss: mean cross-entropy, float32; the only one with a gradient.
        entropy: sum of the predictions' entropies in nats, float32.
        correct: number of tokens that the model ranks first, int64.
        tokens: number of tokens that are trained on, int64.
    """

    loss: Tensor
    entropy: Tensor
    correct: Tensor
    tokens: Tensor


def causal_lm_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    num_items: Tensor | None = None,
    balance_weight: float = 0.0,
) -> StepOutput:
    """One forward pass with its loss and metrics: the function that the trainer compiles.

    Args:
        model: a causal language model; called as ``model(**inputs)``.
        inputs: what the collator made, without labels.
        labels: int64 [batch, seq], not shifted; ``-100`` is ignored.
        num_items: the loss's divisor, the number of trained tokens in the whole accumulated batch; None takes those of
            this batch.
        balance_weight: weight of the load-balancing loss that a mixture of experts returns.
    """
    output = model(**inputs)
    logits = output.logits
    targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
    total = F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED, reduction="sum"
    )
    with torch.no_grad():
        trained = targets != IGNORED
        tokens = trained.sum()
        log_p = torch.log_softmax(logits.float(), dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        correct = (logits.argmax(-1) == targets) & trained
    # A batch without trained tokens has loss zero, not 0/0.
    loss = total / (tokens if num_items is None else num_items).clamp(min=1)
    if balance_weight:
        loss = loss + balance_weight * output.aux_loss
    return StepOutput(loss, torch.where(trained, entropy, 0.0).sum(), correct.sum(), tokens)
