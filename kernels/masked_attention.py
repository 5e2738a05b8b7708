"""Attention under a mask that is a tensor, because nothing simpler says what it hides.

out = softmax(q kT * scale + mask) v; q, k, v and scale as in :mod:`attention`. mask: broadcasts to [batch, heads,
queries, keys]; boolean (True is visible) or in q's dtype and added to the scores, a learnt bias with a gradient of its
own included. A query that sees no key gets zeros, as in PyTorch's attention, and its gradients are zero. Returns out,
like q, and lse [batch, heads, queries] as there; that of a query that sees no key is any number at which its
probabilities exp(-inf - lse) are zero.

The scores are never stored, the mask is, once for all layers that share it. cuDNN on the devices where :mod:`attention`
takes it, elsewhere on CUDA the memory-efficient kernel (Rabe & Staats 2021, arXiv:2112.05682), as FlashAttention-2
takes no mask. That one has one key head per query head, so those are written out for the call, and only for it. On the
CPU PyTorch's flash kernel, or the formula where the mask wants a gradient. Hidden scores are computed too:
:mod:`attention` is up to twice as fast where the mask is known to be causal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import pad

from . import attention as plain
from . import attention_libraries as libraries
from .attention_libraries import exactly_contiguous, length_major, length_major_copy
from .operator import operator

aten = torch.ops.aten

_ROWS_OF_LSE = 32
"""The memory-efficient kernel's backward reads as many at a time."""
_HIDDEN = -1e30
"""Added to a score, leaves nothing of its probability; sums with it stay finite."""
_ALIGNED = 16
"""Elements to which it wants the rows of a mask aligned."""

# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = _wide(q) @ plain.per_query_head(k, q).transpose(-1, -2) * scale
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + _wide(mask)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, mask, scale)
    lse = torch.logsumexp(scores, dim=-1)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)  # no key is visible
    out = torch.exp(scores - lse.unsqueeze(-1)) @ plain.per_query_head(v, q)
    return length_major_copy(out.to(q.dtype)), lse.clone(memory_format=torch.contiguous_format)


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    probabilities = torch.exp(_scores(q, k, mask, scale) - lse.unsqueeze(-1))
    *gradients, of_scores = plain.gradients(grad, q, k, v, out, probabilities, scale, needs[:3])
    return *gradients, _summed(of_scores, mask) if needs[3] else None


def _gradient_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    return *plain.gradient_shapes(grad, q, k, v, *rest), mask.new_empty(mask.shape) if rest[-1][3] else None


def _summed(of_scores: Tensor, mask: Tensor) -> Tensor:
    """The gradient of what was broadcast to the scores."""
    lead = of_scores.dim() - mask.dim()
    repeated = [lead + d for d, size in enumerate(mask.shape) if isinstance(size, int) and size == 1]
    dims = [*range(lead), *repeated]
    total = of_scores.sum(dims, keepdim=True) if dims else of_scores
    return total.reshape(mask.shape).to(mask.dtype).clone(memory_format=torch.contiguous_format)


# -- by a library ------------------------------------------------------------------------------------------------------


def _has_library(q: Tensor, k: Tensor, v: Tensor) -> bool:
    empty = any(x.numel() == 0 for x in (q, k, v))
    return not empty and (q.device.type == "cpu" or _device_problem(q, v) is None)


def _four_dimensional(mask: Tensor, q: Tensor) -> Tensor:
    """The mask as one that is added, [1 or batch, 1 or heads, 1 or queries, 1 or keys]."""
    mask = libraries.additive(mask, q) if mask.dtype == torch.bool else mask
    return mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)


def _for_cpu(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return _four_dimensional(mask, q).expand(-1, -1, q.shape[2], k.shape[2])


def _for_cuda(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """[batch, heads, queries, keys] that begins each row at an aligned address."""
    mask = _four_dimensional(mask, q).expand(-1, -1, -1, k.shape[2])
    mask = pad(mask, (0, -k.shape[2] % _ALIGNED))[..., : k.shape[2]]
    return mask.expand(*q.shape[:3], k.shape[2])


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Whether cuDNN's kernel runs: more than twice as fast where there is one."""
    if q.device.type != "cuda" or q.shape[-1] != v.shape[-1] or libraries.dtype_or_width_problem(q, v) is not None:
        return False
    return libraries.cudnn_is_best(q, k, v)


def _for_cudnn(mask: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as one that is added [batch, 1 or heads, queries, keys], and which queries see no key.

    -inf becomes a number that hides as well: what cuDNN makes of a query all of whose scores are -inf is not
    documented. Of equal numbers the softmax is finite, and its result is put to zero as the contract has it.
    """
    mask = _four_dimensional(mask, q)
    blind = (mask == float("-inf")).all(-1, keepdim=True)
    bias = mask.clamp(min=_HIDDEN).expand(-1, -1, q.shape[2], k.shape[2]).contiguous()
    return bias.expand(q.shape[0], -1, -1, -1), blind


def _heads_of_one_size(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the memory-efficient kernel wants them: as many of keys and values as of queries."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
    return libraries.readable(q), libraries.readable(k), libraries.readable(v)


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not _has_library(q, k, v):
        return _reference(q, k, v, mask, scale)
    if q.device.type == "cpu":
        return libraries.forward("cpu", q, k, v, False, scale, None, _for_cpu(mask, q, k))
    if _by_cudnn(q, k, v, mask):
        bias, blind = _for_cudnn(mask, q, k)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *map(libraries.readable, (q, k, v)), bias, True, 0.0, False, False, scale=scale
        )
        return length_major(out.masked_fill(blind, 0.0)), exactly_contiguous(lse.reshape(q.shape[:3]))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *_heads_of_one_size(q, k, v), _for_cuda(mask, q, k), True, scale=scale
    )
    return length_major(out), exactly_contiguous(lse[..., : q.shape[2]])


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    if not _has_library(q, k, v) or (q.device.type == "cpu" and needs[3]):
        return _reference_backward(grad, q, k, v, mask, out, lse, scale, needs)
    if q.device.type == "cpu":
        of_inputs = needs[:3]
        added = _for_cpu(mask, q, k)
        return *libraries.backward("cpu", grad, q, k, v, out, lse, False, scale, None, added, of_inputs), None
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the random state of dropout
    if _by_cudnn(q, k, v, mask) and not needs[3]:
        (bias, blind), unused = _for_cudnn(mask, q, k), unused.view(1)
        found = aten._scaled_dot_product_cudnn_attention_backward(
            length_major(grad.masked_fill(blind, 0.0)), *map(libraries.readable, (q, k, v)), length_major(out),
            exactly_contiguous(lse).unsqueeze(-1), unused, unused, bias, None, None, q.shape[2], k.shape[2], 0.0,
            False, scale=scale,
        )  # fmt: skip
        return *(length_major(g) if need else None for g, need in zip(found, needs, strict=False)), None
    padded = pad(lse, (0, -q.shape[2] % _ROWS_OF_LSE), value=float("inf"))
    *gradients, of_mask = aten._scaled_dot_product_efficient_attention_backward(
        length_major(grad), *_heads_of_one_size(q, k, v), _for_cuda(mask, q, k), length_major(out), padded,
        unused, unused, 0.0, needs, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (
        length_major(plain.sum_groups(g, x)) if need else None
        for g, x, need in zip(gradients, (q, k, v), needs, strict=False)
    )
    return dq, dk, dv, _summed(of_mask, mask) if needs[3] else None


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> str | None:
    if any(x.dim() != 4 for x in (q, k, v)):
        return "q, k and v have to be [batch, heads, length, width]"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    return plain.shape_problem(q, k, v, False) or _mask_problem(q, k, mask) or _device_problem(q, v)


def _mask_problem(q: Tensor, k: Tensor, mask: Tensor) -> str | None:
    if mask.dtype not in (torch.bool, q.dtype):
        return f"the mask is {mask.dtype}, q {q.dtype}"
    scores = (*q.shape[:3], k.shape[2])
    if mask.dim() > 4:
        return f"the mask has {mask.dim()} dimensions"
    for size, wanted in zip(reversed(mask.shape), reversed(scores), strict=False):
        if not (isinstance(size, int) and size == 1) and not statically_known_true(size == wanted):
            return f"the mask {tuple(mask.shape)} is not known to broadcast to the scores {scores}"
    return None


def _device_problem(q: Tensor, v: Tensor) -> str | None:
    if q.device.type == "cuda":
        return _cuda_problem(q, v)
    return plain.library_problem(q, v)


def _cuda_problem(q: Tensor, v: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the memory-efficient kernel does not compute in {str(q.dtype).removeprefix('torch.')}"
    if any(not isinstance(x.shape[3], int) or x.shape[3] % 8 for x in (q, v)):
        return f"the heads of q and v are {q.shape[3]} and {v.shape[3]} wide, the kernel takes multiples of 8"
    return libraries.memory_efficient_problem(q)


def _operations(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Any:
    return plain.operations(q, k, v, False, None)


def _backward_operations(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Any:
    return plain.backward_operations(q, k, v, False, None)


masked_attention = operator(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> (Tensor out, Tensor lse)",
    reference=_reference,
    reference_backward=_reference_backward,
    fake=plain.shapes,
    fake_backward=_gradient_shapes,
    forward=_forward,
    backward=_backward,
    saves="q k v mask out lse",
    differentiable="q k v mask",
    gradients_of="out",
    supports=_supports,
    flops=_operations,
    backward_flops=_backward_operations,
    devices=("cuda", "cpu"),
)
