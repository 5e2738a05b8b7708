"""Which operators of a graph treat tokens apart, so that they can be run on a few tokens at a time.

It follows from what they compute, never from a name of the model: operators of ours declare it (``rows`` in
kernels/operator.py); of PyTorch's those do that are elementwise, products with a matrix that has no tokens, sums and
means over features, and whatever only arranges features. A product or a sum *over* tokens may be added up from its
parts. Each rule also says how the call reads where the token dimensions are one, [tokens, features].
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...kernels.operator import NAMESPACE, OPERATORS, Operator
from ..rewrite import is_random
from .joint import is_value, unpacks

aten, prims = torch.ops.aten, torch.ops.prims


class Kind(Enum):
    """What a value is to an operator that is run on a few tokens at a time."""

    ROWS = "rows"
    """[tokens, …] or [batch, length, …]: given and made piece by piece."""
    COLUMNS = "columns"
    """Transposed rows, [features, tokens]."""
    WHOLE = "whole"
    """All else, such as weights: given as it is."""
    SUM = "sum"
    """Over tokens: added up from the pieces. Nothing may be computed of it before that is done."""


class Count(Enum):
    """Stands in a call's arguments for the number of tokens that it is run on."""

    TOKENS = "tokens"


@dataclass(frozen=True)
class Ruled:
    """A call that treats tokens apart, as it reads for [tokens, …].

    Attributes:
        target, args, kwargs: of the call. Nodes stand for the values that they are in [tokens, …].
        kinds: of its results.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kinds: tuple[Kind, ...]


class Tokens:
    """The token dimensions of a step.

    Args:
        batch, length: sequences, and tokens in each; may be symbolic.
    """

    def __init__(self, batch: int | torch.SymInt, length: int | torch.SymInt) -> None:
        self.batch, self.length = _size(batch), _size(length)
        self.total = batch * length
        self.count = _size(self.total)

    def lead(self, shape: Sequence[Any]) -> int:
        """How many of the first dimensions are tokens: two, one for [batch · length, …], or none."""
        if len(shape) >= 2 and _size(shape[0]) == self.batch and _size(shape[1]) == self.length:
            return 2
        return int(len(shape) >= 1 and _size(shape[0]) == self.count)

    def features(self, shape: Sequence[Any]) -> tuple[int, ...] | None:
        """The other dimensions; None where there are no tokens, or where those are symbolic."""
        if not (lead := self.lead(shape)) or not all(isinstance(s, int) for s in shape[lead:]):
            return None
        return tuple(shape[lead:])

    def last(self, shape: Sequence[Any]) -> bool:
        """Whether it is a matrix [features, tokens]."""
        return len(shape) == 2 and _size(shape[1]) == self.count and isinstance(shape[0], int)


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


class Rules:
    """The kinds of a graph's values, and the calls that treat tokens apart.

    Args:
        tokens: the token dimensions.
        kinds: of values that are given, by name; the others' are found out.
    """

    def __init__(self, tokens: Tokens, kinds: Mapping[str, Kind] | None = None) -> None:
        self.tokens, self.given = tokens, dict(kinds or {})
        self.kind: dict[fx.Node, Kind | tuple[Kind, ...]] = {}
        self.ruled: dict[fx.Node, Ruled | str] = {}
        """By call: how it reads, or why it does not treat tokens apart."""

    def read(self, graph: fx.Graph) -> None:
        """Go through a graph in its order."""
        for node in graph.nodes:
            self.add(node)

    def add(self, node: fx.Node) -> None:
        if node.name in self.given:
            self.kind[node] = self.given[node.name]
        elif node.op != "call_function":
            self.kind[node] = self._input(node)
        elif node.target is operator.getitem:
            source, index = node.args
            of = self.kind[source]  # type: ignore[index]
            self.kind[node] = of[index] if isinstance(of, tuple) and index < len(of) else self._by_shape(node)  # type: ignore[index, operator]
        else:
            self.ruled[node] = found = self._ruled(node)
            value = node.meta.get("val")
            if isinstance(found, Ruled):
                self.kind[node] = found.kinds[0] if isinstance(value, Tensor) else found.kinds
            elif isinstance(value, (tuple, list)):
                self.kind[node] = tuple(self._of_shape(v) for v in value)
            else:
                self.kind[node] = self._by_shape(node)

    def of(self, node: fx.Node) -> Kind:
        found = self.kind[node]
        return found if isinstance(found, Kind) else Kind.WHOLE

    def _input(self, node: fx.Node) -> Kind:
        """Parameters have no tokens, whatever they measure."""
        if node.op != "placeholder" or not is_value(node) or node.meta["val"].dtype.is_floating_point:
            return Kind.WHOLE
        return self._by_shape(node)

    def _by_shape(self, node: fx.Node) -> Kind:
        return self._of_shape(node.meta.get("val"))

    def _of_shape(self, value: Any) -> Kind:
        if isinstance(value, Tensor) and self.tokens.features(value.shape) is not None:
            return Kind.ROWS
        return Kind.WHOLE

    # -- the rules -----------------------------------------------------------------------------------------------------

    def _ruled(self, node: fx.Node) -> Ruled | str:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return f"{target} is not known"
        if target._schema.is_mutable:
            return f"{target} overwrites its input"
        if is_random(node) or target in _RANDOM:
            return f"{target} is random"
        if (declared := _declared(target)) is not None and declared[1]:
            return self._declared(node, *declared)
        rule = _RULES.get(target.overloadpacket)
        if rule is not None and (found := rule(self, node)) is not None:
            return found
        tensors = [n for n in node.all_input_nodes if is_value(n)]
        if tensors and len(tensors) == len(node.all_input_nodes) and all(self.of(n) is Kind.WHOLE for n in tensors):
            known = target.namespace in ("aten", "prims") or unpacks(target)
            if known and all(self.tokens.lead(v.shape) == 0 for v in _results(node)):
                return Ruled(target, node.args, dict(node.kwargs), (Kind.WHOLE,) * len(_results(node)))
        if rule is None and torch.Tag.pointwise in target.tags and (found := _elementwise(self, node)) is not None:
            return found
        return f"{target} does not treat tokens apart"

    def _declared(self, node: fx.Node, names: Sequence[str], rows: set[str], results: Sequence[str]) -> Ruled | str:
        for name, given in zip(names, node.args, strict=False):
            if isinstance(given, fx.Node) and self.of(given) is not (Kind.ROWS if name in rows else Kind.WHOLE):
                return f"{name} of {node.target} is {self.of(given).value}"
        kinds = tuple(Kind.ROWS if name in rows else Kind.SUM for name in results)
        return Ruled(node.target, node.args, dict(node.kwargs), kinds)

    def lead(self, node: fx.Node) -> int:
        return self.tokens.lead(node.meta["val"].shape)

    def inner(self, node: fx.Node, dim: int) -> int | None:
        """Where a dimension of features is in [tokens, …]; None for one of tokens."""
        lead, dims = self.lead(node), node.meta["val"].dim()
        dim = dim % max(dims, 1)
        return None if dim < lead else dim - lead + 1

    def rows(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and is_value(node) and self.of(node) is Kind.ROWS

    def whole(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and is_value(node) and self.of(node) is Kind.WHOLE

    def result(self, node: fx.Node) -> tuple[int, ...] | None:
        """The features of a call's only result."""
        value = node.meta.get("val")
        return self.tokens.features(value.shape) if isinstance(value, Tensor) else None


def _results(node: fx.Node) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]


def _declared(target: torch._ops.OpOverload) -> tuple[list[str], set[str], list[str]] | None:
    """Names of the arguments of an operator of ours, those of its arguments and results that have rows, and the names
    of its results."""
    if target.namespace != NAMESPACE:
        return None
    if (op := OPERATORS.get(target._opname)) is not None:
        return list(op.inputs), set(op.rows), list(op.outputs)
    op = OPERATORS.get(target._opname.removesuffix("_backward"))
    return None if op is None else _of_backward(op)


def _of_backward(op: Operator) -> tuple[list[str], set[str], list[str]]:
    names = [*(f"grad_{name}" for name in op.gradients_of), *op.saves]
    results = [f"grad_of_{name}" for name in op.differentiable]
    rows = {f"{prefix}{name}" for name in op.rows for prefix in ("", "grad_", "grad_of_")}
    return names, rows if op.rows else set(), results


# -- PyTorch's operators -----------------------------------------------------------------------------------------------


def _one(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, kind: Kind = Kind.ROWS) -> Ruled:
    return Ruled(target, tuple(args), dict(kwargs or {}), (kind,))


def _elementwise(rules: Rules, node: fx.Node) -> Ruled | None:
    """Rows of as many dimensions as the result has, and what is repeated for all of them."""
    features, value = rules.result(node), node.meta["val"]
    if features is None:
        return None
    lead = rules.lead(node)
    for given in node.all_input_nodes:
        if rules.rows(given):
            shape = given.meta["val"].shape
            if len(shape) != value.dim() or rules.tokens.lead(shape) != lead:
                return None
        elif not rules.whole(given) or given.meta["val"].dim() > len(features):
            return None
    if not any(rules.rows(n) for n in node.all_input_nodes):
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "alpha", "rounding_mode", "approximate")}
    return _one(node.target, node.args, kwargs)


def _arranged(rules: Rules, node: fx.Node) -> Ruled | None:
    """The same rows in another shape."""
    x, features = node.args[0], rules.result(node)
    if features is None or not rules.rows(x):
        return None
    return _one(aten.reshape.default, (x, [Count.TOKENS, *features]))


def _expanded(rules: Rules, node: fx.Node) -> Ruled | None:
    x, features = node.args[0], rules.result(node)
    if features is None or not rules.rows(x) or rules.lead(x) != rules.lead(node):  # type: ignore[arg-type]
        return None
    if x.meta["val"].dim() != node.meta["val"].dim():  # type: ignore[union-attr]
        return None
    return _one(aten.expand.default, (x, [Count.TOKENS, *features]))


def _transposed(rules: Rules, node: fx.Node) -> Ruled | None:
    """A matrix to columns and back; otherwise features among themselves."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or not is_value(x):
        return None
    dims = x.meta["val"].dim()
    if node.target is aten.t.default:
        order = [1, 0][:dims]
    elif node.target is aten.transpose.int:
        order = list(range(dims))
        a, b = (int(d) % dims for d in node.args[1:3])  # type: ignore[call-overload]
        order[a], order[b] = order[b], order[a]
    else:
        order = [int(d) % dims for d in node.args[1]]  # type: ignore[union-attr]
    if order == [1, 0] and rules.of(x) is Kind.COLUMNS:
        return _one(node.target, node.args)
    if order == [1, 0] and rules.rows(x) and rules.lead(x) == 1:
        return _one(node.target, node.args, kind=Kind.COLUMNS)
    lead = rules.lead(x)
    if not rules.rows(x) or order[:lead] != list(range(lead)) or rules.result(node) is None:
        return None
    return _one(aten.permute.default, (x, [0, *(d - lead + 1 for d in order[lead:])]))


def _product(rules: Rules, node: fx.Node) -> Ruled | None:
    bias = node.args[0] if len(node.args) == 3 else None
    a, b = node.args[-2:]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    told = bias is None or rules.rows(bias) or (rules.whole(bias) and bias.meta["val"].dim() == 1)  # type: ignore[union-attr]
    if told and rules.rows(a) and rules.whole(b) and rules.lead(a) == 1 and a.meta["val"].dim() == 2:
        return _one(node.target, node.args, node.kwargs)
    if bias is None and rules.of(a) is Kind.COLUMNS and rules.rows(b) and rules.lead(b) == 1:
        return _one(node.target, node.args, node.kwargs, Kind.SUM)
    return None


def _reduced(rules: Rules, node: fx.Node) -> Ruled | None:
    """Over features; a sum over tokens too."""
    x, *others = node.args
    if not rules.rows(x):
        return None
    assert isinstance(x, fx.Node)
    given = others[0] if others else None
    dims = [given] if isinstance(given, int) else list(given or range(x.meta["val"].dim()))  # type: ignore[call-overload]
    keep = bool(others[1]) if len(others) > 1 else False
    inner = [rules.inner(x, d) for d in dims]
    lead, over = rules.lead(x), [d for d in inner if d is not None]
    dtype = {k: v for k, v in node.kwargs.items() if k == "dtype"}
    if len(over) == len(inner):
        return _one(node.target, (x, over, keep), dtype)
    tokens = len(inner) - len(over)
    if node.target is aten.sum.dim_IntList and tokens == lead and (lead == 1 or not keep):
        return _one(node.target, (x, [0, *over], keep), dtype, Kind.SUM)
    return None


def _along(place: int) -> Callable[[Rules, fx.Node], Ruled | None]:
    """An operator along one dimension, of features: its argument at that place."""

    def rule(rules: Rules, node: fx.Node) -> Ruled | None:
        first, default = node.args[0], 0
        tensors = first if isinstance(first, (list, tuple)) else [first]
        if not all(map(rules.rows, tensors)) or len({rules.lead(n) for n in tensors}) != 1:  # type: ignore[arg-type]
            return None
        if any(isinstance(a, fx.Node) for a in pytree.tree_leaves(node.args[1:]) if not rules.rows(a)):
            return None  # a symbolic number
        args = list(node.args)
        dim = args[place] if len(args) > place else node.kwargs.get("dim", default)
        if (inner := rules.inner(tensors[0], int(dim))) is None:  # type: ignore[arg-type]
            return None
        args = [*args[:place], *([None] * (place - len(args))), inner, *args[place + 1 :]]
        kinds = (Kind.ROWS,) * len(_results(node))
        return Ruled(node.target, tuple(args), {k: v for k, v in node.kwargs.items() if k != "dim"}, kinds)

    return rule


def _slice_backward(rules: Rules, node: fx.Node) -> Ruled | None:
    x, _, dim, *others = node.args
    features = rules.result(node)
    if features is None or not rules.rows(x) or (inner := rules.inner(node, int(dim))) is None:  # type: ignore[arg-type]
        return None
    return _one(node.target, (x, [Count.TOKENS, *features], inner, *others))


def _full(rules: Rules, node: fx.Node) -> Ruled | None:
    if (features := rules.result(node)) is None:
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "device")}
    return _one(node.target, ([Count.TOKENS, *features], *node.args[1:]), kwargs)


_ELEMENTWISE = (aten._to_copy, aten.clone, prims.convert_element_type, aten.where, aten.detach, aten.alias)
_ELEMENTWISE += (aten.zeros_like, aten.ones_like, aten.full_like)
_ARRANGED = (aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze)

_RULES: dict[Any, Callable[[Rules, fx.Node], Ruled | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_ARRANGED, _arranged),
    aten.expand: _expanded,
    **dict.fromkeys((aten.t, aten.transpose, aten.permute), _transposed),
    **dict.fromkeys((aten.mm, aten.addmm), _product),
    **dict.fromkeys((aten.sum, aten.mean, aten.amax, aten.amin), _reduced),
    **dict.fromkeys((aten.slice, aten._softmax, aten.select, aten.cat), _along(1)),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.slice_scatter), _along(2)),
    aten.slice_backward: _slice_backward,
    aten.full: _full,
}
_RANDOM = {prims.inductor_seeds.default, prims.inductor_random.default, prims.inductor_randint.default}
