"""View operators as index maps: element ``i`` of the result is element ``f(i)`` of the operand.

An index is a tuple of integer expressions, one per dimension. Following a value through its views this way answers
"which element is it?" for every spelling at once: ``repeat_kv`` by unsqueeze, expand and reshape and the same thing by
``repeat_interleave`` both read head ``h`` from head ``h // n``; repeating in the other order reads it from ``h % n``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..nodes import arguments as arguments
from ..nodes import value

aten = torch.ops.aten

Index = tuple[sympy.Expr, ...]
Shape = tuple[sympy.Expr, ...]
_Rule = Callable[[dict[str, Any], Shape, Shape, Index], "Index | None"]

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def operand_of(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """The operand of a view-like node, and which of its elements is the node's element ``index``.

    None when the node is no view, or rearranges elements in a way that has no expression here. The answer is right for
    every index inside the node's bounds.
    """
    if (rule := _RULES.get(node.target)) is None:
        return None
    given = arguments(node)
    operand = given["self"]
    shape = shape_of(operand)
    if (found := rule(given, shape, shape_of(node), index)) is None:
        return None
    return operand, inside(shape, found)


def shape_of(node: fx.Node) -> Shape:
    return tuple(integer(size) for size in value(node).shape)


def integer(number: Any) -> sympy.Expr:
    """An int, a symbolic int, or a node that stands for one, as an expression. Nothing is guarded on."""
    number = value(number)
    return number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)


def is_integer(number: Any) -> bool:
    return isinstance(value(number), (int, torch.SymInt)) and not isinstance(value(number), bool)


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two expressions are the same number whatever their symbols stand for."""
    return a == b or sympy.expand(a - b) == 0


def inside(shape: Shape, index: Index) -> Index:
    """The index, spelled 0 where a dimension has one element."""
    return tuple(ZERO if size == 1 else i for size, i in zip(shape, index, strict=True))


def align(index: Index, operand: Shape, result: Shape) -> Index | None:
    """Broadcasting: the index into an operand for an index into the result; None where sizes are not known to agree."""
    lead = len(result) - len(operand)
    if lead < 0:
        return None
    found = []
    for i, size, wanted in zip(index[lead:], operand, result[lead:], strict=True):
        if size == 1:
            found.append(ZERO)
        elif same(size, wanted):
            found.append(i)
        else:
            return None
    return tuple(found)


# -- one rule per operator ---------------------------------------------------------------------------------------------


def _unchanged(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index:
    return index


def _expand(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index | None:
    return align(index, operand, result)


def _unsqueeze(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index:
    dim = given["dim"] % len(result)
    return index[:dim] + index[dim + 1 :]


def _squeeze(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index | None:
    dims = given.get("dim", list(range(len(operand))))
    wanted = {d % len(operand) for d in (dims if isinstance(dims, Sequence) else [dims])}
    removed = {d for d in wanted if operand[d] == 1}
    if len(operand) - len(removed) != len(result):
        return None
    left = iter(index)
    return tuple(ZERO if d in removed else next(left) for d in range(len(operand)))


def _permute(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index:
    found = list(index)
    for i, dim in zip(index, given["dims"], strict=True):
        found[dim] = i
    return tuple(found)


def _transpose(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index:
    a, b = (given["dim0"], given["dim1"]) if "dim0" in given else (0, len(index) - 1)
    found = list(index)
    found[a], found[b] = index[b], index[a]
    return tuple(found)


def _select(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index | None:
    dim = given["dim"] % len(operand)
    if (at := _from_the_front(given["index"], operand[dim])) is None:
        return None
    return (*index[:dim], at, *index[dim:])


def _slice(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index | None:
    dim = given["dim"] % len(operand)
    start = _from_the_front(given["start"] or 0, operand[dim])
    if start is None:
        return None
    return (*index[:dim], start + integer(given.get("step", 1)) * index[dim], *index[dim + 1 :])


def _from_the_front(position: Any, size: sympy.Expr) -> sympy.Expr | None:
    """A position that may count from the end, clamped as slicing does; None where that depends on a symbolic size."""
    at = integer(position)
    if at.is_nonnegative:
        return at
    return sympy.Integer(max(at + size, 0)) if at.is_Integer and size.is_Integer else None


def _repeat(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index:
    lead = len(result) - len(operand)
    sizes = zip(index[lead:], operand, result[lead:], strict=True)
    return tuple(i if same(old, new) else sympy.Mod(i, old) for i, old, new in sizes)


def _repeat_interleave(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index | None:
    if given["dim"] is None:
        return None
    dim = given["dim"] % len(operand)
    return (*index[:dim], sympy.floor(index[dim] / integer(given["repeats"])), *index[dim + 1 :])


def _view(given: dict[str, Any], operand: Shape, result: Shape, index: Index) -> Index | None:
    """Row-major order is kept, so runs of dimensions with the same number of elements correspond."""
    if ZERO in operand:
        return None
    found: list[sympy.Expr] = [ZERO] * len(operand)
    old = [d for d, size in enumerate(operand) if size != 1]
    new = [d for d, size in enumerate(result) if size != 1]
    while old and new:
        run_old, run_new = [old.pop(0)], [new.pop(0)]
        while not same(size_old := _product(operand, run_old), size_new := _product(result, run_new)):
            if old and _divides(size_old, size_new):
                run_old.append(old.pop(0))
            elif new and _divides(size_new, size_old):
                run_new.append(new.pop(0))
            else:
                return None
        position = ZERO
        for d in run_new:
            position = position * result[d] + index[d]
        for d in reversed(run_old[1:]):
            found[d] = sympy.Mod(position, operand[d])
            position = sympy.floor(position / operand[d])
        found[run_old[0]] = position
    return None if old or new else tuple(found)


def _product(shape: Shape, dims: list[int]) -> sympy.Expr:
    return sympy.expand(math.prod((shape[d] for d in dims), start=ONE))


def _divides(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(sympy.cancel(b / a).is_integer)


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(
        (
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.lift_fresh_copy.default,
        ),
        _unchanged,
    ),
    **dict.fromkeys((aten.expand.default, aten.broadcast_to.default, aten.expand_as.default), _expand),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.permute.default: _permute,
    **dict.fromkeys((aten.transpose.int, aten.t.default), _transpose),
    aten.select.int: _select,
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), _slice),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.view_as.default,
        ),
        _view,
    ),
}
