"""A mask that is an outer product, as one more channel of the heads: no matrix of queries × keys exists.

Towers that cut an image into tiles hide padding from padding, by adding c · u wᵀ to the scores, where u and w count how
often a position is padding, and c is as good as -∞. Since q kᵀ + c · u wᵀ = [q, -s u] [k, s w]ᵀ for s² = -c, that is
plain attention with heads one channel wider. s is chosen as large as q's dtype holds a square of, in place of √-c: u
and w are whole numbers (shown from the graph), so that either sum is the score itself or as good as ±∞.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..nodes import is_tensor
from ..rewrite import Call, value
from .values import INTEGERS

aten = torch.ops.aten

_NEVER = -1e4
"""What is added to a score, at most, for its key to be hidden."""
_STEP = {torch.float16: 2.0**15}
_LARGEST = 2.0**60
"""s; its square times a scale is finite in float32, in which scores are summed."""
_ALIGNED = 8
"""Channels come in so many at a time."""
_SAME_NUMBERS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.expand.default, aten.repeat.default, aten.slice.Tensor, aten.select.int, aten.permute.default, aten.t.default,
    aten.transpose.int, aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype,
    aten.to.dtype_layout, aten.alias.default, aten.detach.default,
    aten.lift_fresh_copy.default,
}  # fmt: skip
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor, aten.mul.Tensor, aten.neg.default}


def widened(q: fx.Node, k: fx.Node, mask: Any) -> tuple[Call, Call] | None:
    """q and k with the channels that add the mask to their products; None where it is no such outer product.

    Args:
        q: [batch, heads, queries, width]; k likewise, with its own heads and keys.
        mask: what is added to the scores.
    """
    found = _factors(mask)
    if found is None or value(q).dtype != value(mask).dtype:
        return None
    u, w = found
    step = _STEP.get(value(q).dtype, _LARGEST)
    parts = ((q, u, -step), (k, w, step))
    if any(not _fits(x, column) for x, column, _ in parts):
        return None
    wide_q, wide_k = (Call(aten.cat.default, ([x, _channels(x, column, by)], -1)) for x, column, by in parts)
    return wide_q, wide_k


def _factors(mask: Any) -> tuple[fx.Node | Call, fx.Node | Call] | None:
    """u and w as columns, [batch, positions, 1], of a mask [batch, 1, queries, keys]."""
    if not (isinstance(mask, fx.Node) and mask.target is aten.unsqueeze.default and mask.args[1] in (1, -3)):
        return None
    product = mask.args[0]
    if not (isinstance(product, fx.Node) and product.target is aten.mul.Tensor):
        return None
    outer, by = product.args[:2]
    if not isinstance(by, (int, float)) or by > _NEVER or not isinstance(outer, fx.Node):
        return None
    if outer.target not in (aten.matmul.default, aten.bmm.default):
        return None
    u, w = outer.args
    if not (isinstance(u, fx.Node) and isinstance(w, fx.Node) and _is_column(u, 2) and _is_column(w, 1)):
        return None
    if not (_is_whole(u) and _is_whole(w)):
        return None
    return u, Call(aten.transpose.int, (w, 1, 2), shared=True)


def _is_column(x: fx.Node, thin: int) -> bool:
    """Whether a node is [batch, positions, 1], or what has its one along another dimension."""
    return is_tensor(x) and value(x).dim() == 3 and statically_known_true(value(x).shape[thin] == 1)


def _is_whole(x: Any, depth: int = 32) -> bool:
    """Whether all of a tensor's elements are whole numbers, for all inputs of the graph."""
    if isinstance(x, (bool, int)) or (isinstance(x, float) and x.is_integer()):
        return True
    if not isinstance(x, fx.Node) or depth == 0:
        return False
    if is_tensor(x) and value(x).dtype in (torch.bool, *INTEGERS):
        return True
    if x.op == "get_attr":  # a number that the tracer has put aside
        found = getattr(x.graph.owning_module, str(x.target), None)
        return type(found) is torch.Tensor and found.dim() == 0 and float(found).is_integer()
    if x.target in _SAME_NUMBERS:
        return _is_whole(x.args[0], depth - 1)
    if x.target in (aten.full.default, aten.full_like.default):
        return _is_whole(x.args[1])
    if x.target in (aten.zeros.default, aten.ones.default, aten.zeros_like.default, aten.ones_like.default):
        return True
    if x.target in (aten.fill.Scalar, aten.fill.Tensor, aten.copy.default):
        return _is_whole(x.args[1], depth - 1)
    if x.target in (aten.slice_scatter.default, aten.select_scatter.default):
        return all(_is_whole(part, depth - 1) for part in x.args[:2])
    if x.target in _SUMS and not x.kwargs:
        return all(_is_whole(part, depth - 1) for part in x.args)
    return False


def _fits(x: fx.Node, column: fx.Node | Call) -> bool:
    """Whether a column has a row of its own for each of x's, and x's heads are as wide as the libraries take them."""
    width = value(x).shape[3]
    if not isinstance(width, int) or width % _ALIGNED or not isinstance(value(x).shape[1], int):
        return False
    source = column if isinstance(column, fx.Node) else column.args[0]
    batch, *positions = value(source).shape
    length = next((size for size in positions if not statically_known_true(size == 1)), 1)
    return statically_known_true(batch == value(x).shape[0]) and statically_known_true(length == value(x).shape[2])


def _channels(x: fx.Node, column: fx.Node | Call, by: float) -> Call:
    """[batch, heads, positions, 8]: a column times a number, and zeros; layers share them."""
    scaled = Call(aten.mul.Tensor, (column, by), shared=True)
    padded = Call(aten.constant_pad_nd.default, (scaled, [0, _ALIGNED - 1]), shared=True)
    lifted = Call(aten.unsqueeze.default, (padded, 1), shared=True)
    return Call(aten.expand.default, (lifted, [-1, value(x).shape[1], -1, -1]), shared=True)
