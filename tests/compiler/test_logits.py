"""`logits="drop"` finds the loss's own logits, and what stands in for them explains itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from tests.tracing import trace
from unsloth.compiler.logits import DroppedLogits, DroppedLogitsError, find_logits


def causal_lm(x, w, labels):
    logits = linear(x, w)
    shifted = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    return cross_entropy(shifted, labels[:, 1:].reshape(-1)), logits


def arguments():
    return torch.randn(2, 5, 4), torch.randn(7, 4, requires_grad=True), torch.randint(0, 7, (2, 5))


def test_finds_the_logits_of_the_loss() -> None:
    assert find_logits(trace(causal_lm, *arguments())) == (1,)


def test_other_outputs_stay() -> None:
    def function(x, w, labels):
        loss, logits = causal_lm(x, w, labels)
        return loss, logits * 2, x.relu()

    assert find_logits(trace(function, *arguments())) == ()


def test_without_a_loss_among_the_outputs_logits_stay() -> None:
    def function(x, w, labels):
        loss, logits = causal_lm(x, w, labels)
        return logits + loss, logits

    assert find_logits(trace(function, *arguments())) == ()


def test_reading_dropped_logits_raises() -> None:
    logits = DroppedLogits((2, 5, 7), torch.bfloat16, torch.device("cpu"))
    assert logits.shape == (2, 5, 7) and logits.dtype == torch.bfloat16 and "DroppedLogits" in repr(logits)
    logits.detach()
    for use in (lambda: logits + 1, lambda: logits.argmax(-1), lambda: logits[0], lambda: logits.float()):
        with pytest.raises(DroppedLogitsError, match=r'options=\{"logits": "keep"\}'):
            use()
