"""The functions that formulas are written with, each with the spellings that graphs have for it."""

from __future__ import annotations

from typing import Any

from torch import fx

from .pattern import Pattern, aten, describe, function
from .rewrite import value
from .soundness import same_sizes


def cat(*parts: Pattern) -> Pattern:
    """Parts side by side along the last dimension."""
    return _cat(parts)


def stack(*parts: Pattern) -> Pattern:
    """Parts stacked along a new last dimension."""
    return _stack(parts)


def pairs(x: Pattern) -> Pattern:
    """[..., n, 2]: the last dimension's neighbours, two by two."""
    return _pairs(x)


def merged(x: Pattern) -> Pattern:
    """The last two dimensions in one."""
    return _merged(x)


def doubled(x: Pattern) -> Pattern:
    """Each value of the last dimension twice in a row."""
    return _repeat_interleave(x, 2) | merged(stack(x, x))


def square(x: Pattern) -> Pattern:
    """x², as ``pow(x, 2)``, ``square(x)`` or ``x * x``."""
    return x**2 | _square(x) | x * x


def rsqrt(x: Pattern) -> Pattern:
    """1 / √x, as ``rsqrt(x)`` or ``pow(x, -0.5)``."""
    return _rsqrt(x) | x**-0.5


def silu(x: Pattern) -> Pattern:
    """x · sigmoid(x), as ``silu(x)`` or written out."""
    return _silu(x) | x * sigmoid(x)


def _over_last(node: fx.Node, rest: dict[str, Any]) -> str | None:
    if list(rest["dim"] or ()) not in ([-1], [value(node.args[0]).dim() - 1]):
        return f"the {describe(node)} is not over the last dimension alone"
    if rest["dtype"] is not None:
        return f"the {describe(node)} changes the dtype"
    return None if rest["keepdim"] else f"the {describe(node)} does not keep its dimension"


def _along_last(node: fx.Node, rest: dict[str, Any]) -> str | None:
    along = rest["dim"] in (-1, value(node).dim() - 1)
    return None if along else f"the {describe(node)} is not along the last dimension"


def _splits_into_pairs(node: fx.Node, rest: dict[str, Any]) -> str | None:
    old, new = value(node.args[0]).shape, value(node).shape
    return None if same_sizes(new[:-1], (*old[:-1], old[-1] // 2)) else f"the {describe(node)} does not make pairs"


def _merges_last_two(node: fx.Node, rest: dict[str, Any]) -> str | None:
    old, new = value(node.args[0]).shape, value(node).shape
    if len(old) == len(new) + 1 and same_sizes(old[:-2], new[:-1]):
        return None
    return f"the {describe(node)} does not merge the last two dimensions"


def _any_shape(node: fx.Node, rest: dict[str, Any]) -> None:
    return None


sqrt = function("sqrt", aten.sqrt.default)
tanh = function("tanh", aten.tanh.default)
sigmoid = function("sigmoid", aten.sigmoid.default)
gelu = function("gelu", aten.gelu.default)
mean = function("mean", aten.mean.dim, check=_over_last)
sum_of = function("sum", aten.sum.dim_IntList, check=_over_last)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
view = function("view", *_VIEWS, check=_any_shape)
_pairs = function("view", *_VIEWS, check=_splits_into_pairs)
_merged = function("view", *_VIEWS, check=_merges_last_two)
_repeat_interleave = function("repeat_interleave", aten.repeat_interleave.self_int, check=_along_last)
unsqueeze = function("unsqueeze", aten.unsqueeze.default)
_square = function("square", aten.square.default)
_rsqrt = function("rsqrt", aten.rsqrt.default)
_silu = function("silu", aten.silu.default)
_cat = function("cat", aten.cat.default, check=_along_last)
_stack = function("stack", aten.stack.default, check=_along_last)
