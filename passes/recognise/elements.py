"""The value of one element of a tensor, as an expression of its index: the folding that :mod:`mask` proves with.

One rule per operator says what its element ``index`` is, by asking for elements of its operands. Whatever has no rule
is an unknown element: the function ``node(i, j, ...)`` of its indices.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from ..rewrite import is_tensor, source_line, value
from .indexing import ONE, ZERO, Index, align, arguments, integer, is_integer, operand_of, shape_of
from .predicate import Atom, Domain, Formula, conjunction, disjunction, negation
from .values import (
    INTEGERS,
    Unknown,
    Value,
    as_float,
    as_integer,
    choose,
    formula,
    is_visible,
    number,
    spread,
    subtract,
    unknowns,
)

aten = torch.ops.aten

# Deeper than any mask is built; a sum that runs through a whole model is none.
_DEPTH = 64


class Elements:
    """Values of elements of a graph's tensors, over given index variables.

    Args:
        sizes: the index variables, and the size of the dimension that each runs over.
    """

    def __init__(self, sizes: dict[sympy.Symbol, sympy.Expr]) -> None:
        self.domain = Domain(sizes)
        self._known: dict[tuple[fx.Node, Index], Value | Unknown] = {}
        self._origins: dict[str, Unknown] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._path: list[fx.Node] = []

    def visible(self, mask: fx.Node, index: Index) -> Formula:
        """Where scaled dot-product attention lets a query see a key, for a boolean or an additive mask."""
        return formula(spread(lambda v: is_visible(v, mask), self.at(mask, index)))

    def origin(self, element: AppliedUndef) -> Unknown:
        """Why an element is unknown."""
        return self._origins[str(element.func)]

    def node_of(self, element: AppliedUndef) -> fx.Node:
        """The node of whose tensor it is an element."""
        return self._nodes[str(element.func)]

    def at(self, node: fx.Node, index: Index) -> Value:
        """The value of ``node[index]``.

        Raises:
            Unknown: for floats that are no constants; unknown integers and booleans are elements instead.
        """
        key = (node, index)
        if key not in self._known:
            self._path.append(node)
            try:
                self._known[key] = self._fold(node, index)
            except Unknown as unknown:
                self._known[key] = self._unknown_element(node, index, unknown)
            finally:
                self._path.pop()
        known = self._known[key]
        if isinstance(known, Unknown):
            raise known
        return known

    def _fold(self, node: fx.Node, index: Index) -> Value:
        if node.op == "placeholder":
            lines = (source_line(reader) for reader in reversed(self._path[:-1]))
            raise Unknown(f"depends on the input {input_name(node)}", node, next(filter(None, lines), None))
        if node.op == "get_attr":
            return _literal(node)
        if len(self._path) > _DEPTH:
            raise Unknown("is built in too many steps", node)
        if (source := operand_of(node, index)) is not None:
            return self.at(*source)
        if (rule := _RULES.get(node.target)) is None:
            raise Unknown(f"unknown operation {node.target}", node)
        return self.converted(rule(self, node, index), node)

    def _unknown_element(self, node: fx.Node, index: Index, unknown: Unknown) -> Value | Unknown:
        dtype = value(node).dtype if is_tensor(node) else None
        if dtype not in (torch.bool, *INTEGERS):
            return unknown
        self._origins.setdefault(node.name, unknown)
        self._nodes[node.name] = node
        element = sympy.Function(node.name, integer=True)(*index)
        return Atom(element, "!=") if dtype == torch.bool else element

    # -- operands ------------------------------------------------------------------------------------------------------

    def operand(self, operand: Any, node: fx.Node, index: Index) -> Value:
        """The element of an operand that broadcasting puts at ``node[index]``; plain numbers stand for themselves."""
        if not is_tensor(operand):
            return number(operand, node)
        if (found := align(index, shape_of(operand), shape_of(node))) is None:
            raise Unknown(f"the sizes of {operand.name} and {node.name} are not known to be equal", node)
        return self.at(operand, found)

    def converted(self, found: Value, node: fx.Node) -> Value:
        """A value in the dtype of a node."""
        dtype = value(node).dtype
        if dtype == torch.bool:
            return spread(self._truth, found)
        if dtype in INTEGERS:
            return spread(lambda v: as_integer(v, node), found)
        if dtype.is_floating_point:
            return spread(lambda v: as_float(v, node), found)
        raise Unknown(f"computes in {dtype}", node)

    def _truth(self, found: Value) -> Value:
        if isinstance(found, sympy.Expr):
            return negation(self.domain.is_zero(found))
        return found != 0.0 if isinstance(found, float) else found

    def scanned(self, node: fx.Node, index: Index, dim: int) -> Value:
        """The value that all elements along a dimension have; Unknown where they differ."""
        along = sympy.Symbol(f"along_{dim}_of_{node.name}", integer=True, nonnegative=True)
        self.domain.sizes[along] = shape_of(node)[dim]
        found = self.at(node, (*index[:dim], along, *index[dim + 1 :]))
        if isinstance(found, (bool, float)) or (isinstance(found, sympy.Expr) and not found.has(along)):
            return found
        raise next((self.origin(u) for u in sorted(unknowns(found), key=str)), Unknown("the summands differ", node))


def _literal(node: fx.Node) -> Value:
    """A number that the tracer has put aside as a tensor of no dimensions."""
    if str(node.target).startswith("_tensor_constant") and (owner := node.graph.owning_module) is not None:
        tensor = getattr(owner, str(node.target))
        if type(tensor) is torch.Tensor and tensor.dim() == 0:
            return number(tensor.item(), node)
    raise Unknown(f"reads the tensor {node.target}", node)


def input_name(node: fx.Node) -> str:
    """A graph input as its caller called it: ``L_kwargs_attention_mask_`` is attention_mask."""
    return re.sub(r"^[Ll]_(kwargs_|args_)?", "", str(node.target)).strip("_")


# -- one rule per operator ---------------------------------------------------------------------------------------------

_Rule = Callable[[Elements, fx.Node, Index], Value]
_RULES: dict[Any, _Rule] = {}


def _rule(*targets: Any) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    start, step = given.get("start", 0), given.get("step", 1)
    if value(node).dtype not in INTEGERS or not (is_integer(start) and is_integer(step)):
        raise Unknown("counts in fractions", node)
    return integer(start) + integer(step) * index[0]


@_rule(aten.ones.default, aten.new_ones.default, aten.ones_like.default)
def _ones(elements: Elements, node: fx.Node, index: Index) -> Value:
    return ONE


@_rule(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _zeros(elements: Elements, node: fx.Node, index: Index) -> Value:
    return ZERO


@_rule(aten.full.default, aten.new_full.default, aten.full_like.default, aten.scalar_tensor.default)
def _full(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    return number(given["s"] if "s" in given else given["fill_value"], node)


@_rule(aten.fill.Scalar, aten.fill.Tensor)
def _fill(elements: Elements, node: fx.Node, index: Index) -> Value:
    return elements.operand(arguments(node)["value"], node, index)


@_rule(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.detach.default)
def _copy(elements: Elements, node: fx.Node, index: Index) -> Value:
    return elements.operand(arguments(node)["self"], node, index)


@_rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    return _either(elements, node, index, given["condition"], given["self"], given["other"])


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    return _either(elements, node, index, given["mask"], given["value"], given["self"])


def _either(elements: Elements, node: fx.Node, index: Index, condition: Any, yes: Any, no: Any) -> Value:
    holds = formula(elements.operand(condition, node, index))
    if isinstance(holds, bool):
        return elements.operand(yes if holds else no, node, index)
    branches = (elements.converted(elements.operand(branch, node, index), node) for branch in (yes, no))
    return choose(holds, *branches)


@_rule(aten.tril.default, aten.triu.default)
def _triangle(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    below = index[-2] - index[-1] + integer(given["diagonal"])
    inside = elements.domain.at_least_zero(below if node.target is aten.tril.default else -below)
    return choose(inside, elements.at(given["self"], index), elements.converted(False, node))


@_rule(aten.index.Tensor)
def _index(elements: Elements, node: fx.Node, index: Index) -> Value:
    """Advanced indexing: the tensors broadcast, and stand where the first of them was, or in front if apart."""
    given = arguments(node)
    operand, tensors = given["self"], given["indices"]
    dims = [d for d, t in enumerate(tensors) if t is not None]
    rank = max(value(tensors[d]).dim() for d in dims)
    at = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    spread, left = index[at : at + rank], iter(index[:at] + index[at + rank :])
    found: list[sympy.Expr] = []
    for d in range(value(operand).dim()):
        if d not in dims:
            found.append(next(left))
            continue
        inner = align(spread, shape_of(tensors[d]), shape_of(node)[at : at + rank])
        position = None if inner is None else elements.at(tensors[d], inner)
        # A negative position would count from the end.
        if not isinstance(position, sympy.Expr) or elements.domain.at_least_zero(position) is not True:
            raise Unknown("is read at positions that are not known to be from the front", node)
        found.append(position)
    return elements.at(operand, tuple(found))


@_rule(aten.cat.default)
def _cat(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    return _joined(elements, given["tensors"], given["dim"] % len(index), index)


def _joined(elements: Elements, tensors: Sequence[fx.Node], dim: int, index: Index) -> Value:
    first, *others = tensors
    if len(shape_of(first)) != len(index):
        raise Unknown("joins tensors of different rank", first)
    if not others:
        return elements.at(first, index)
    size = shape_of(first)[dim]
    inside = elements.domain.at_least_zero(size - 1 - index[dim])
    if inside is True:
        return elements.at(first, index)
    rest = _joined(elements, others, dim, (*index[:dim], index[dim] - size, *index[dim + 1 :]))
    return rest if inside is False else choose(inside, elements.at(first, index), rest)


@_rule(aten.diff.default)
def _diff(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    if given["n"] != 1 or value(node).dtype not in INTEGERS:
        raise Unknown(f"unknown operation {node.target} of this order or dtype", node)
    tensors = [t for t in (given["prepend"], given["self"], given["append"]) if t is not None]
    dim = given["dim"] % len(index)
    following = (*index[:dim], index[dim] + 1, *index[dim + 1 :])
    pair = (elements.converted(_joined(elements, tensors, dim, i), node) for i in (following, index))
    return spread(subtract, *pair)


@_rule(aten.cumsum.default)
def _cumsum(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    if value(node).dtype not in INTEGERS:
        raise Unknown("sums fractions", node)
    dim = given["dim"] % len(index)
    summand = elements.converted(elements.scanned(given["self"], index, dim), node)
    return spread(lambda v: v * (index[dim] + 1), summand)


_ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    aten.add.Tensor: operator.add,
    aten.add.Scalar: operator.add,
    aten.sub.Tensor: subtract,
    aten.sub.Scalar: subtract,
    aten.rsub.Tensor: lambda a, b: subtract(b, a),
    aten.rsub.Scalar: lambda a, b: subtract(b, a),
    aten.mul.Tensor: operator.mul,
    aten.mul.Scalar: operator.mul,
}


@_rule(*_ARITHMETIC)
def _arithmetic(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    if given.get("alpha", 1) != 1 or value(node).dtype == torch.bool:
        raise Unknown(f"unknown operation {node.target} with a factor or of booleans", node)
    operands = (elements.converted(elements.operand(given[name], node, index), node) for name in ("self", "other"))
    return spread(_ARITHMETIC[node.target], *operands)


@_rule(aten.floor_divide.default, aten.floor_divide.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def _floor_divide(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    if given.get("rounding_mode", "floor") != "floor" or value(node).dtype not in INTEGERS:
        raise Unknown(f"unknown operation {node.target} of this rounding or dtype", node)
    operands = (elements.converted(elements.operand(given[name], node, index), node) for name in ("self", "other"))

    def divide(a: Value, b: Value) -> Value:
        if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Integer) and b > 0):
            raise Unknown(f"divides by {b}", node)
        inside = elements.domain.at_least_zero(a) is True and elements.domain.at_least_zero(b - 1 - a) is True
        return ZERO if inside else sympy.floor(a / b)

    return spread(divide, *operands)


@_rule(aten.neg.default)
def _neg(elements: Elements, node: fx.Node, index: Index) -> Value:
    return spread(lambda v: -v, elements.converted(elements.operand(node.args[0], node, index), node))


_ORDER: dict[str, Callable[[Domain, sympy.Expr], Formula]] = {
    "ge": lambda domain, difference: domain.at_least_zero(difference),
    "gt": lambda domain, difference: domain.at_least_zero(difference - 1),
    "le": lambda domain, difference: domain.at_least_zero(-difference),
    "lt": lambda domain, difference: domain.at_least_zero(-difference - 1),
    "eq": lambda domain, difference: domain.is_zero(difference),
    "ne": lambda domain, difference: negation(domain.is_zero(difference)),
}


@_rule(*(getattr(getattr(aten, name), kind) for name in _ORDER for kind in ("Tensor", "Scalar")))
def _comparison(elements: Elements, node: fx.Node, index: Index) -> Value:
    given = arguments(node)
    name = node.target._opname  # type: ignore[union-attr]

    def compare(a: Value, b: Value) -> Value:
        assert isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)
        return _ORDER[name](elements.domain, a - b)

    operands = (elements.operand(given[operand], node, index) for operand in ("self", "other"))
    return spread(compare, *(spread(lambda v: as_integer(v, node), operand) for operand in operands))


_CONNECTIVES: dict[Any, Callable[[list[Formula]], Formula]] = {
    **dict.fromkeys((aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default), conjunction),
    **dict.fromkeys((aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default), disjunction),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), lambda formulas: negation(formulas[0])),
}


@_rule(*_CONNECTIVES)
def _connective(elements: Elements, node: fx.Node, index: Index) -> Value:
    if value(node).dtype != torch.bool:
        raise Unknown(f"unknown operation {node.target} of integers", node)
    operands = (elements.converted(elements.operand(a, node, index), node) for a in node.args)
    return _CONNECTIVES[node.target]([formula(o) for o in operands])
