"""Attention within documents that lie one behind the other in the rows of a batch: no query sees another's keys.

out = softmax(q kT * scale over the keys of the query's own document) v; q, k, v, causal, scale and window as in
:mod:`attention`, with as many keys as queries. Where the documents are is computed once per step and shared by all
layers: `cu_seqlens` makes of documents [batch, length], numbers that change where a document begins, the offsets
[batch * length + 1] int32 of the documents in the rows laid end to end, as variable-length kernels want them
(FlashAttention, arXiv:2307.08691). Its size must not depend on the data, so what follows the last offset repeats it;
`extents`, how many documents there are and how long the longest is, [2] int64, lies on the CPU: the one wait for the
GPU of a step is there, and no layer waits.

Scores between documents are never computed, and no mask exists: FlashAttention-2 on CUDA; on the CPU PyTorch's flash
kernel, which is given the mask [batch, 1, length, length] and saves no scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import attention as plain
from . import attention_libraries as libraries
from .attention_libraries import Backend, choose_backend, hiding
from .operator import operator

# -- where the documents are -------------------------------------------------------------------------------------------


def _cu_seqlens(documents: Tensor) -> Tensor:
    begins = torch.diff(documents, prepend=documents[:, :1] - 1, dim=1) != 0
    tokens = documents.numel()
    offsets = torch.arange(tokens, device=documents.device)
    offsets = torch.where(begins.flatten(), offsets, tokens).sort().values
    return torch.cat([offsets, offsets.new_full((1,), tokens)]).int()


def _extents(cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff()
    return torch.stack([(lengths > 0).sum(), lengths.max().long()]).cpu()


def _documents_problem(documents: Tensor) -> str | None:
    if documents.dim() != 2 or documents.is_floating_point() or documents.dtype == torch.bool:
        return f"documents have to be integers [batch, length], not {documents.dtype} {tuple(documents.shape)}"
    return None


cu_seqlens = operator(
    "cu_seqlens(Tensor documents) -> (Tensor cu_seqlens)",
    reference=_cu_seqlens,
    fake=lambda documents: documents.new_empty(documents.numel() + 1, dtype=torch.int32),
    forward=_cu_seqlens,
    supports=_documents_problem,
    flops=lambda documents: 64 * documents.numel(),  # a sort: nothing to do twice
    devices=("cuda", "cpu"),
)

extents = operator(
    "extents(Tensor cu_seqlens) -> (Tensor extents)",
    reference=_extents,
    forward=_extents,
    supports=lambda cu_seqlens: None,
    flops=lambda cu_seqlens: 64 * cu_seqlens.numel(),
    devices=("cuda", "cpu"),
)


# -- attention ---------------------------------------------------------------------------------------------------------


def _visible(q: Tensor, k: Tensor, cu_seqlens: Tensor, causal: bool, window: int | None) -> Tensor:
    """[batch, 1, queries, keys]: which keys a query sees."""
    batch, _, length, _ = q.shape
    tokens = torch.arange(batch * length, device=q.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, tokens, right=True).view(batch, 1, length)
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    visible = plain.visible_keys(q, k, causal, window)
    return same if visible is None else same & visible


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    extents: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    return plain.formula(q, k, v, _visible(q, k, cu_seqlens, causal, window), scale)


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    extents: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    visible = _visible(q, k, cu_seqlens, causal, window)
    return plain.formula_backward(grad, q, k, v, out, lse, visible, scale, needs)


def _library(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Backend:
    backend = choose_backend(q, k, v, causal, window)
    return "flash" if backend == "cudnn" else backend


def _present(cu_seqlens: Tensor, extents: Tensor) -> tuple[Tensor, int]:
    """The offsets of the documents that there are, and the length of the longest."""
    documents, longest = extents.tolist()
    return cu_seqlens[: documents + 1], longest


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    extents: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    backend = _library(q, k, v, causal, window)
    if backend == "flash":
        offsets, longest = _present(cu_seqlens, extents)
        return libraries.packed_forward(q, k, v, offsets, longest, causal, scale, hiding(window, q))
    if backend == "cpu":
        mask = libraries.additive(_visible(q, k, cu_seqlens, causal, window), q)
        return libraries.forward(backend, q, k, v, causal, scale, None, mask)
    return _reference(q, k, v, cu_seqlens, extents, causal, scale, window)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    extents: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    backend = _library(q, k, v, causal, window)
    if backend == "flash":
        offsets, longest = _present(cu_seqlens, extents)
        window = hiding(window, q)
        return libraries.packed_backward(grad, q, k, v, out, lse, offsets, longest, causal, scale, window, needs)
    if backend == "cpu":
        mask = libraries.additive(_visible(q, k, cu_seqlens, causal, window), q)
        return libraries.backward(backend, grad, q, k, v, out, lse, causal, scale, None, mask, needs)
    return _reference_backward(grad, q, k, v, cu_seqlens, extents, out, lse, causal, scale, window, needs)


def _supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    extents: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> str | None:
    if reason := plain.supports(q, k, v, causal, scale, window):
        return reason
    if not statically_known_true(q.shape[2] == k.shape[2]):
        return f"documents with {q.shape[2]} queries and {k.shape[2]} keys"
    if not statically_known_true(cu_seqlens.shape[0] == q.shape[0] * q.shape[2] + 1):
        return f"{tuple(cu_seqlens.shape)} offsets are not those of {q.shape[0]} rows of {q.shape[2]}"
    return None


packed_attention = operator(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor extents, bool causal, float scale,"
    " int? window) -> (Tensor out, Tensor lse)",
    reference=_reference,
    reference_backward=_reference_backward,
    fake=plain.shapes,
    fake_backward=plain.gradient_shapes,
    forward=_forward,
    backward=_backward,
    saves="q k v cu_seqlens extents out lse",
    differentiable="q k v",
    gradients_of="out",
    supports=_supports,
    # As if every row were one document: how many there are is not known before the step.
    flops=lambda q, k, v, cu_seqlens, extents, causal, scale, window: plain.operations(q, k, v, causal, window),
    backward_flops=lambda q, k, v, cu_seqlens, extents, causal, scale, window: plain.backward_operations(
        q, k, v, causal, window
    ),
    devices=("cuda", "cpu"),
)
