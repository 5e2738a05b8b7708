"""Scaled dot-product attention, with the mask proven and grouped keys and values handed over as they are stored.

A mask goes into the operator as a flag, a window or documents where those were proven (:mod:`mask`), and as the tensor
that it is where they were not. ``repeat_kv``, which writes out every key head once per query head, is seen through
where key and value head ``h // n`` are shown to serve query head ``h``: that is the order in which the operator reads
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels.attention import attention
from ...kernels.capped_attention import capped_attention, document_starts
from ...kernels.masked_attention import masked_attention
from ...kernels.operator import Operator
from ...kernels.packed_attention import cu_seqlens, extents, packed_attention
from ...kernels.sink_attention import masked_sink_attention, packed_sink_attention, sink_attention
from ..rewrite import Call, Match, Miss, source_line, value
from . import outer_mask, softmax_attention
from .indexing import Shape, arguments, inside, integer, operand_of, shape_of
from .mask import Causal, Kept, Mask, prove
from .softmax_attention import Parts

aten = torch.ops.aten

_INDEX = sympy.symbols("batch head position channel", integer=True, nonnegative=True)


KEPT = "the mask is kept"
"""Stands in the variant of a match whose operator reads the mask as a tensor."""

_Proofs = dict[tuple[fx.Node, Shape], Mask | Kept]


class Attention:
    """Finds attention, PyTorch's or written out, under any mask.

    Args:
        right_padded: see :func:`~unsloth.passes.recognise.mask.prove`.
    """

    name = "attention"

    def __init__(self, *, right_padded: bool = False) -> None:
        self.right_padded = right_padded

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        proofs: _Proofs = {}  # layers share their masks
        written = {result.node: result for result in softmax_attention.find(graph)}
        for node in graph.nodes:
            if node.target is aten.scaled_dot_product_attention.default:
                yield self._library(node, proofs)
            elif isinstance(found := written.get(node), Miss):
                yield found
            elif found is not None:
                yield self._site(found, False, proofs)

    def _library(self, node: fx.Node, proofs: _Proofs) -> Match | Miss:
        """PyTorch's attention."""
        given = arguments(node)
        q, k, v = given["query"], given["key"], given["value"]
        if reason := _problem(q, k, v, given):
            return Miss(reason, node, source_line(node), 1)
        scale = value(q).shape[3] ** -0.5 if given["scale"] is None else given["scale"]
        parts = Parts(node, frozenset({node}), q, k, v, scale, given["attn_mask"], None, "")
        return self._site(parts, given["is_causal"], proofs)

    def _site(self, parts: Parts, causal: bool, proofs: _Proofs) -> Match | Miss:
        q, k, v, node = parts.q, parts.k, parts.v, parts.node
        mask: Mask | Kept = Mask(frozenset({Causal()} if causal else ()))
        if isinstance(parts.mask, Call):
            mask = Kept("it stands in the place of scores", node, source_line(node))
        elif parts.mask is not None:
            scores = (*value(q).shape[:3], value(k).shape[2])
            key = parts.mask, tuple(map(integer, scores))
            if key not in proofs:
                proofs[key] = prove(parts.mask, scores, right_padded=self.right_padded)
            mask = proofs[key]
        kept = f"{KEPT}: {mask.reason}" if isinstance(mask, Kept) else _mask_problem(mask, parts)
        if kept and parts.mask is None:
            return Miss(kept, node, source_line(node), 2)
        if parts.cap is not None and (reason := _cap_problem(mask, kept)):
            return Miss(reason, node, source_line(node), 2)
        k, v, inner = _stored(k, v, value(q).shape[1])
        if isinstance(mask, Kept) and (wide := _as_channels(parts, k)) is not None:
            args = *wide, v, False, parts.scale, None
            variant = ", ".join(filter(None, ("outer product in a channel", parts.variant)))
            return Match(attention, args, {node: 0}, parts.interior | inner, variant)
        if kept or isinstance(mask, Kept):
            target, args = _explicit(parts, k, v)
        else:
            target, args = _operator(mask, parts, k, v)
        variant = ", ".join(filter(None, (kept or str(mask), parts.sinks and "sinks", parts.variant)))
        return Match(target, args, {node: 0}, parts.interior | inner, variant, _cast_under_autocast(parts, args))


def _mask_problem(mask: Mask, parts: Parts) -> str | None:
    """Why no operator has this mask but one that is given it as a tensor."""
    queries, keys = value(parts.q).shape[2], value(parts.k).shape[2]
    if mask.window is not None and not mask.causal:
        return f"{mask} without causal: no kernel, {KEPT}"
    if mask.causal and not statically_known_true(queries == keys):
        return f"causal with {queries} queries and {keys} keys: aligned differently by kernels, {KEPT}"
    if mask.chunks and not statically_known_true(queries == keys):
        return f"{mask} with {queries} queries and {keys} keys, {KEPT}"
    batch = value(parts.q).shape[0]
    per_row = mask.documents is None or _has_batch(mask.documents, batch, 2)
    per_row = per_row and (not mask.chunks or (isinstance(parts.mask, fx.Node) and _has_batch(parts.mask, batch, 4)))
    if per_row or isinstance(batch, int):
        return None
    return f"{mask}: one row of documents for a batch of unknown size, {KEPT}"


def _as_channels(parts: Parts, k: fx.Node) -> tuple[Call, Call] | None:
    """q and k with the mask in channels of their own, where a kernel takes them so."""
    q = value(parts.q)
    if parts.sinks is not None or parts.cap is not None or (q.is_cuda and q.dtype == torch.float32):
        return None
    return outer_mask.widened(parts.q, k, parts.mask)


def _cap_problem(mask: Mask | Kept, kept: str | None) -> str | None:
    """Why no operator caps scores under this mask."""
    if kept or isinstance(mask, Kept):
        return f"the scores are capped by tanh, for which there is no kernel here: {kept}"
    return None if mask.causal else f"the scores are capped by tanh, for which there is no kernel: {mask}"


def _explicit(parts: Parts, k: fx.Node, v: fx.Node) -> tuple[Operator, tuple[Any, ...]]:
    """The operator that is given the mask as it is, and its arguments."""
    if parts.sinks is not None:
        return masked_sink_attention, (parts.q, k, v, parts.sinks, parts.mask, parts.scale)
    return masked_attention, (parts.q, k, v, parts.mask, parts.scale)


def _operator(mask: Mask, parts: Parts, k: fx.Node, v: fx.Node) -> tuple[Operator, tuple[Any, ...]]:
    """The operator that has this mask, and its arguments."""
    how = mask.causal, parts.scale, mask.window
    sinks = () if parts.sinks is None else (parts.sinks,)
    numbers = _pieces(mask, parts)
    if parts.cap is not None:
        starts = None if numbers is None else Call(document_starts, (numbers,), shared=True)
        return capped_attention, (parts.q, k, v, starts, parts.scale, mask.window, parts.cap)
    if numbers is None:
        return sink_attention if sinks else attention, (parts.q, k, v, *sinks, *how)
    offsets = Call(cu_seqlens, (numbers,), shared=True)  # for all layers
    where = offsets, Call(extents, (offsets,), shared=True)
    return packed_sink_attention if sinks else packed_attention, (parts.q, k, v, *sinks, *where, *how)


def _pieces(mask: Mask, parts: Parts) -> fx.Node | Call | None:
    """[batch, length]: numbers that are equal where tokens may see each other, and never decrease along a row.

    Those of documents and of chunks both never decrease, so their sum is equal where both are.
    """
    batch = value(parts.q).shape[0]
    pieces: fx.Node | Call | None = None
    if mask.documents is not None:
        pieces = mask.documents
        if not _has_batch(mask.documents, batch, 2):
            pieces = Call(aten.expand.default, (pieces, [batch, -1]), shared=True)
    for size in mask.chunks:
        assert isinstance(parts.mask, fx.Node)  # in which they were found
        chunks = Call(aten.floor_divide.default, (_positions(parts.mask, batch), size), shared=True)
        pieces = chunks if pieces is None else Call(aten.add.Tensor, (pieces, chunks), shared=True)
    return pieces


def _positions(mask: fx.Node, batch: int | torch.SymInt) -> Call:
    """[batch, length] of a mask [..., length, length]: only its shape is read, and layers share it, and so these."""
    row = Call(aten.select.int, (mask, -2, 0), shared=True)
    if not _has_batch(mask, batch, 4):
        for _ in range(value(mask).dim() - 2):
            row = Call(aten.select.int, (row, 0, 0), shared=True)
        row = Call(aten.expand.default, (row, [batch, -1]), shared=True)
    else:
        row = Call(aten.select.int, (row, 1, 0), shared=True)
    ones = Call(aten.ones_like.default, (row,), {"dtype": torch.int64}, shared=True)
    return Call(aten.sub.Tensor, (Call(aten.cumsum.default, (ones, -1), shared=True), 1), shared=True)


def _has_batch(x: fx.Node, batch: int | torch.SymInt, dims: int) -> bool:
    """Whether documents (of 2 dimensions) or a mask (of 4) are known to have a part of their own for each row."""
    return value(x).dim() == dims and statically_known_true(value(x).shape[0] == batch)


def _cast_under_autocast(parts: Parts, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Which arguments autocast converts: those of matrix products, and what PyTorch's attention adds to the scores."""
    added = isinstance(parts.mask, fx.Node) and not parts.variant and value(parts.mask).is_floating_point()
    return (0, 1, 2, *(i for i, argument in enumerate(args) if added and argument is parts.mask))


def _problem(q: fx.Node, k: fx.Node, v: fx.Node, given: dict[str, Any]) -> str | None:
    """Why this attention is none of ours, whatever its mask."""
    if given["dropout_p"] != 0.0:
        return f"attention weights are dropped with probability {given['dropout_p']}"
    shapes = [value(x).shape for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        return "q, k and v are not [batch, heads, length, width]"
    if not isinstance(shapes[0][3] if given["scale"] is None else given["scale"], (int, float)):
        return "the scale is not known when compiling"
    heads = [shape[1] for shape in shapes]
    one_for_all = all(statically_known_true(h == 1) for h in heads[1:])  # broadcast over the query heads
    if not (given["enable_gqa"] or one_for_all) and not all(statically_known_true(h == heads[0]) for h in heads):
        return f"{heads[0]} query, {heads[1]} key and {heads[2]} value heads without enable_gqa"
    return None


def _stored(k: fx.Node, v: fx.Node, heads: int | torch.SymInt) -> tuple[fx.Node, fx.Node, set[fx.Node]]:
    """k and v before they were repeated for each query head, and the nodes that only did that."""
    (stored_k, k_path), (stored_v, v_path) = _unrepeated(k, heads), _unrepeated(v, heads)
    if not statically_known_true(value(stored_k).shape[1] == value(stored_v).shape[1]):
        return k, v, set()
    inner: set[fx.Node] = set()
    for path in (k_path, v_path):
        for node in path:
            if len(node.users) > 1:
                break
            inner.add(node)
    return stored_k, stored_v, inner


def _unrepeated(x: fx.Node, heads: int | torch.SymInt) -> tuple[fx.Node, list[fx.Node]]:
    """The tensor whose head ``h // n`` is head ``h`` of x, and the views from x up to it; x itself if there is none."""
    batch, head, position, channel = inside(shape_of(x), _INDEX)
    node, index, path = x, (batch, head, position, channel), []
    found = x, []
    while (source := operand_of(node, index)) is not None:
        path.append(node)
        node, index = source
        repeats = _repeats(node, x, heads)
        if repeats and index == inside(shape_of(node), (batch, sympy.floor(head / repeats), position, channel)):
            found = node, list(path)  # and further up: there may be views that change nothing
    return found


def _repeats(stored: fx.Node, x: fx.Node, heads: int | torch.SymInt) -> int | None:
    """How often each head would be repeated to make x of a tensor, if that is all that tells their shapes apart."""
    old, new = value(stored).shape, value(x).shape
    if len(old) != 4 or not isinstance(heads, int) or not isinstance(old[1], int) or old[1] in (0, heads):
        return None
    if heads % old[1]:
        return None
    alike = all(statically_known_true(old[d] == new[d]) for d in (0, 2, 3))
    return heads // old[1] if alike else None
