"""Attention with sinks: each head has one more score, which takes weight from the keys and has no value.

out_i = sum_j exp(s_ij) v_j / (exp(sink) + sum_j exp(s_ij)), over the keys j that query i sees; Xiao et al. 2023,
arXiv:2309.17453; a learned number per head as in gpt-oss (arXiv:2508.10925). q, k, v, causal, scale, window as in
:mod:`attention`; sinks: [heads]. Returns out, like q, and lse, the logarithm of the denominator, sink included.

No library of PyTorch has sinks, and none is needed: the softmax without one, scaled by sigmoid(lse - sink), is the
softmax with it. Backward is the library's own: handed the denominator *with* the sink it computes the probabilities
with it, and everything else it needs is the product of out and its gradient, in which the sink has no part. It costs
one pass over out more than attention does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import attention as plain
from .attention_libraries import length_major_copy
from .operator import operator


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of plain attention, in which the sinks then take part."""
    sink = sinks.to(lse.dtype)[:, None]
    share = torch.sigmoid(lse - sink).unsqueeze(-1)
    return length_major_copy((out.to(lse.dtype) * share).to(out.dtype)), torch.logaddexp(lse, sink)


def _gradient_of_sinks(grad: Tensor, sinks: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """-p (grad · out), summed over all queries, where p is the sink's probability."""
    probability = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    product = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(probability * product).sum((0, 2)).to(sinks.dtype)


def _forward_by(attend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Forward on top of attention without sinks, by its formula or by a library."""

    def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        return _with_sinks(*attend(q, k, v, *how), sinks)

    return forward


def _backward_by(attend_backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Backward likewise."""

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, out: Tensor, lse: Tensor, *how: Any
    ) -> tuple[Tensor | None, ...]:
        *rest, needs = how
        gradients = attend_backward(grad, q, k, v, out, lse, *rest, needs[:3])
        return *gradients, _gradient_of_sinks(grad, sinks, out, lse) if needs[3] else None

    return backward


def _supports(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, causal: bool, scale: float, window: int | None
) -> str | None:
    if sinks.dim() != 1 or not statically_known_true(sinks.shape[0] == q.shape[1]):
        return f"sinks {tuple(sinks.shape)} are not one for each of {q.shape[1]} heads"
    return plain.supports(q, k, v, causal, scale, window)


sink_attention = operator(
    "sink_attention(Tensor q, Tensor k, Tensor v, Tensor sinks, bool causal, float scale, int? window)"
    " -> (Tensor out, Tensor lse)",
    reference=_forward_by(plain.reference),
    reference_backward=_backward_by(plain.reference_backward),
    forward=_forward_by(plain.forward),
    backward=_backward_by(plain.backward),
    saves="q k v sinks out lse",
    differentiable="q k v sinks",
    gradients_of="out",
    supports=_supports,
    flops=lambda q, k, v, sinks, causal, scale, window: plain.operations(q, k, v, causal, window),
    backward_flops=lambda q, k, v, sinks, causal, scale, window: plain.backward_operations(q, k, v, causal, window),
    devices=("cuda", "cpu"),
)
