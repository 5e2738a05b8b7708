"""Causal attention whose scores are capped: out = softmax(cap tanh(q kT scale / cap)) v over the visible keys.

The cap is Gemma 2's (arXiv:2408.00118); online softmax: Milakov & Gimpelshein 2018, arXiv:1805.02867; blocks and
backward: Dao 2023, arXiv:2307.08691. q, k, v, scale and window as in :mod:`attention`, always causal, with as many keys
as queries; cap: positive, in units of scaled scores. starts: None, or [batch, length] int32, the first key that each
query sees, which never decreases along a row: that of its document, from :data:`document_starts`. Returns out, like q,
and lse, the logarithm of the softmax's denominator, [batch, heads, queries], natural, float32 (float64 in float64).

No library of PyTorch caps scores, so this is a kernel of ours: scores exist by tiles only, forward and backward, and
blocks of keys that no query of a tile sees are not visited. Written out, eager keeps four matrices of scores per layer
for backward, at 8 heads and 8192 tokens in bf16 4.3 GB. Backward makes dq by blocks of queries, dk and dv by blocks of
keys: nothing is added by atomics, and the result is the same each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import attention as plain
from .attention_libraries import length_major_copy
from .capped_attention_triton import forward_kernel, keys_kernel, queries_kernel
from .operator import next_power_of_two, operator
from .reasons import dtype_is, small_card

MOST_HEADS = 65535
"""Of a batch: a program takes one, in the second dimension of the grid."""
WIDEST = 256
"""Of a head: four tiles of it are in shared memory at a time."""

# -- where the documents are -------------------------------------------------------------------------------------------


def _document_starts(documents: Tensor) -> Tensor:
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.diff(documents, prepend=documents[:, :1] - 1, dim=1) != 0
    return torch.where(begins, index, 0).cummax(1).values.int()


def _documents_problem(documents: Tensor) -> str | None:
    if documents.dim() != 2 or documents.is_floating_point() or documents.dtype == torch.bool:
        return f"documents have to be integers [batch, length], not {documents.dtype} {tuple(documents.shape)}"
    return None


document_starts = operator(
    "document_starts(Tensor documents) -> (Tensor starts)",
    reference=_document_starts,
    forward=_document_starts,
    supports=_documents_problem,
    flops=lambda documents: 8 * documents.numel(),
    devices=("cuda", "cpu"),
)

# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _visible(q: Tensor, k: Tensor, starts: Tensor | None, window: int | None) -> Tensor:
    """[queries, keys] or [batch, 1, queries, keys]."""
    visible = plain.visible_keys(q, k, True, window)
    assert visible is not None
    if starts is None:
        return visible
    return visible & (torch.arange(k.shape[2], device=k.device) >= starts[:, None, :, None])


def _capped(q: Tensor, k: Tensor, scale: float, cap: float) -> Tensor:
    """tanh of the scores: what the cap is multiplied with."""
    return torch.tanh(_wide(q) @ plain.per_query_head(k, q).transpose(-1, -2) * (scale / cap))


def _reference(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float, window: int | None, cap: float
) -> tuple[Tensor, Tensor]:
    scores = _capped(q, k, scale, cap) * cap
    scores = scores.masked_fill(~_visible(q, k, starts, window), float("-inf"))
    out = torch.softmax(scores, dim=-1) @ plain.per_query_head(v, q)
    lse = torch.logsumexp(scores, dim=-1)
    return length_major_copy(out.to(q.dtype)), lse.clone(memory_format=torch.contiguous_format)


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    cap: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    tanh = _capped(q, k, scale, cap)
    probabilities = torch.exp(tanh * cap - lse.unsqueeze(-1)).masked_fill(~_visible(q, k, starts, window), 0.0)
    *_, dv, of_scores = plain.gradients(grad, q, k, v, out, probabilities, scale, [False, False, needs[2]])
    of_products = of_scores * (1 - tanh * tanh) * scale
    dq = of_products @ plain.per_query_head(k, q) if needs[0] else None
    dk = plain.sum_groups(of_products.transpose(-1, -2) @ _wide(q), k) if needs[1] else None
    return *(None if g is None else length_major_copy(g.to(q.dtype)) for g in (dq, dk)), dv


# -- launch ------------------------------------------------------------------------------------------------------------


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _tiles(q: Tensor, v: Tensor, starts: Tensor | None, window: int | None, backward: bool) -> dict[str, Any]:
    width, channels = q.shape[3], v.shape[3]
    block, v_block = (max(16, next_power_of_two(size)) for size in (width, channels))
    narrow = max(block, v_block) <= 64 and q.element_size() == 2
    wide = max(block, v_block) > 128 or q.element_size() > 2
    queries, keys = (64, 64) if narrow or not (backward or wide) else (64, 32) if not wide or not backward else (32, 32)
    return {
        "WIDTH": width, "CHANNELS": channels, "BLOCK": block, "V_BLOCK": v_block, "QUERIES": queries, "KEYS": keys,
        "WINDOW": window is not None, "DOCUMENTS": starts is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4 if narrow else 8, "num_stages": 1 if wide else 2,
    }  # fmt: skip


def _like(x: Tensor) -> Tensor:
    """A fresh tensor of x's shape in [batch, length, heads, width] memory order."""
    batch, heads, length, width = x.shape
    return torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float, window: int | None, cap: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    if q.numel() == 0 or v.numel() == 0 or q.dtype == torch.float64:
        return _reference(q, k, v, starts, scale, window, cap)
    q, k, v = map(_readable, (q, k, v))
    out = torch.empty(batch, length, heads, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    tiles = _tiles(q, v, starts, window, backward=False)
    launch: Any = forward_kernel[triton.cdiv(length, tiles["QUERIES"]), batch * heads]
    launch(
        q, k, v, q if starts is None else starts.contiguous(), out, lse, length, heads, heads // k.shape[1],
        *_strides(q, k, v), scale, window or 0, cap, **tiles,
    )  # fmt: skip
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    cap: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    batch, heads, length, _ = q.shape
    if q.numel() == 0 or v.numel() == 0 or q.dtype == torch.float64:
        return _reference_backward(grad, q, k, v, starts, out, lse, scale, window, cap, needs)
    grad, q, k, v = map(_readable, (grad, q, k, v))
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    tiles = _tiles(q, v, starts, window, backward=True)
    read = grad, q, k, v, q if starts is None else starts.contiguous(), lse.contiguous(), delta
    sizes = length, heads, heads // k.shape[1], *_strides(grad, q, k, v), scale, window or 0, cap
    dq, dk, dv = (_like(x) for x in (q, k, v))
    if needs[0]:
        launch: Any = queries_kernel[triton.cdiv(length, tiles["QUERIES"]), batch * heads]
        launch(*read, dq, *sizes, **tiles)
    if needs[1] or needs[2]:
        launch = keys_kernel[triton.cdiv(length, tiles["KEYS"]), batch * k.shape[1]]
        launch(*read, dk, dv, *sizes, **tiles)
    return tuple(g if need else None for g, need in zip((dq, dk, dv), needs, strict=True))


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float, window: int | None, cap: float
) -> str | None:
    if any(x.dim() != 4 for x in (q, k, v)):
        return "q, k and v have to be [batch, heads, length, width]"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    if reason := plain.shape_problem(q, k, v, True) or dtype_is(q, *_DTYPES[q.device.type == "cuda"]):
        return reason
    if any(not isinstance(x.shape[3], int) or x.shape[3] > WIDEST for x in (q, v)):
        return f"the heads of q and v are {q.shape[3]} and {v.shape[3]} wide, the kernel takes at most {WIDEST}"
    if reason := small_card(q):
        return reason
    if cap <= 0 or (window is not None and window < 1):
        return f"cap {cap} and window {window} have to be positive"
    if all(isinstance(size, int) for size in q.shape[:2]) and q.shape[0] * q.shape[1] > MOST_HEADS:
        return f"{q.shape[0]} x {q.shape[1]} heads are more than the {MOST_HEADS} that a grid's second dimension has"
    if starts is not None and not statically_known_true(starts.shape[0] == q.shape[0]):
        return f"starts {tuple(starts.shape)} are not those of {q.shape[0]} rows"
    return None


_HALVES = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {True: _HALVES, False: (*_HALVES, torch.float64)}

capped_attention = operator(
    "capped_attention(Tensor q, Tensor k, Tensor v, Tensor? starts, float scale, int? window, float cap)"
    " -> (Tensor out, Tensor lse)",
    reference=_reference,
    reference_backward=_reference_backward,
    forward=_forward,
    backward=_backward,
    saves="q k v starts out lse",
    differentiable="q k v",
    gradients_of="out",
    supports=_supports,
    flops=lambda q, k, v, starts, scale, window, cap: plain.operations(q, k, v, True, window),
    backward_flops=lambda q, k, v, starts, scale, window, cap: plain.backward_operations(q, k, v, True, window),
)
