"""Attention with sinks: each head has one more score, which takes weight from the keys and has no value.

out_i = sum_j exp(s_ij) v_j / (exp(sink) + sum_j exp(s_ij)), over the keys j that query i sees; Xiao et al. 2023,
arXiv:2309.17453; a learned number per head as in gpt-oss (arXiv:2508.10925). sinks: [heads]; everything else as in
:mod:`attention`, :mod:`packed_attention` and :mod:`masked_attention`, on each of which there is an operator with sinks.
Returns out, like q, and lse, the logarithm of the denominator, sink included.

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

from .attention import attention
from .attention_libraries import length_major_copy
from .masked_attention import masked_attention
from .operator import Operator, operator
from .packed_attention import packed_attention


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


def _with_sinks_on(plain: Operator, schema: str) -> Operator:
    """The operator that is ``plain`` with sinks, which come behind v among its arguments."""

    def forward_by(attend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
            return _with_sinks(*attend(q, k, v, *how), sinks)

        return forward

    def backward_by(attend_backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
        def backward(
            grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *how: Any
        ) -> tuple[Tensor | None, ...]:
            *rest, needs = how
            out, lse = rest[saved - 2 : saved]
            gradients = attend_backward(grad, q, k, v, *rest, [*needs[:3], *needs[4:]])
            of_sinks = _gradient_of_sinks(grad, sinks, out, lse) if needs[3] else None
            return *gradients[:3], of_sinks, *gradients[3:]

        return backward

    def supports(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *how: Any) -> str | None:
        if sinks.dim() != 1 or not statically_known_true(sinks.shape[0] == q.shape[1]):
            return f"sinks {tuple(sinks.shape)} are not one for each of {q.shape[1]} heads"
        return plain.supports(q, k, v, *how)

    def with_sinks(names: tuple[str, ...]) -> str:
        return " ".join((*names[:3], "sinks", *names[3:]))

    saved = len(plain.saves) - 3
    return operator(
        schema,
        reference=forward_by(plain.reference),
        reference_backward=backward_by(plain.reference_backward),
        forward=forward_by(plain.forward),
        backward=backward_by(plain.backward),
        saves=with_sinks(plain.saves),
        differentiable=with_sinks(plain.differentiable),
        gradients_of="out",
        supports=supports,
        flops=lambda q, k, v, sinks, *how: plain.flops(q, k, v, *how),
        backward_flops=lambda q, k, v, sinks, *how: plain.backward_flops(q, k, v, *how),
        devices=plain.devices,
    )


sink_attention = _with_sinks_on(
    attention,
    "sink_attention(Tensor q, Tensor k, Tensor v, Tensor sinks, bool causal, float scale, int? window)"
    " -> (Tensor out, Tensor lse)",
)

packed_sink_attention = _with_sinks_on(
    packed_attention,
    "packed_sink_attention(Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor cu_seqlens, Tensor extents, bool causal,"
    " float scale, int? window) -> (Tensor out, Tensor lse)",
)

masked_sink_attention = _with_sinks_on(
    masked_attention,
    "masked_sink_attention(Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor mask, float scale)"
    " -> (Tensor out, Tensor lse)",
)
