"""A pattern is the formula it finds, matched backward from the node that computes it.

    x, weight, eps = capture("x"), capture("weight"), number("eps")
    xf     = cast(x)                                   # a conversion that may be absent
    normed = xf * rsqrt(mean(square(xf)) + eps)
    RMS_NORM = weight * cast(normed)

    found = match({"round, then scale": RMS_NORM}, node)      # Found(variant, captures, interior, casts) or Miss

``capture`` binds a value of the graph, and the same capture must be the same value wherever it stands. ``number``
binds a scalar. ``cast`` stands for a conversion between floating-point types that may be there or not. Sums and
products match their operands in either order. Everything else is a call of an ATen operator, whose admissible
spellings are listed where the function is defined.

Matching is a search: a pattern yields every consistent assignment, so operands may be tried in the other order. Every
dead end is noted, and the one that came furthest is the explanation of a failed match.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .rewrite import Miss, source_line, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """A consistent assignment.

    Attributes:
        variant: key of the pattern that matched.
        captures: what each ``capture`` and ``number`` is bound to.
        interior: every node the formula consumed, the anchor included, captures excluded.
        casts: the conversions that were there.
    """

    variant: str = ""
    captures: dict[str, Any] = field(default_factory=dict)
    interior: frozenset[fx.Node] = frozenset()
    casts: frozenset[fx.Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]


class _Search:
    """Remembers the dead end that came furthest."""

    def __init__(self) -> None:
        self.deepest: Miss | None = None

    def dead_end(self, reason: str, node: Any, found: Found, anchor: fx.Node) -> None:
        how_far = len(found.interior)
        if self.deepest is None or how_far > self.deepest.how_far:
            at = node if isinstance(node, fx.Node) else anchor
            self.deepest = Miss(reason, at, source_line(at) or source_line(anchor), how_far)


def match(patterns: Mapping[str, Pattern], node: fx.Node) -> Found | Miss:
    """Match a node against each pattern in turn.

    Returns:
        The first assignment found, or the miss that came furthest over all patterns.
    """
    search = _Search()
    for variant, pattern in patterns.items():
        for found in pattern.match(node, Found(variant), search, node):
            return found
    assert search.deepest is not None
    return search.deepest


class Pattern:
    """Something a value of the graph may be. Combine patterns with ``+ * -`` and the functions of this module."""

    def match(self, node: Any, found: Found, search: _Search, anchor: fx.Node) -> Iterator[Found]:
        """Yield every extension of ``found`` under which ``node`` is this pattern."""
        raise NotImplementedError

    def __add__(self, other: Pattern | float) -> Pattern:
        return _Call("a sum", SUMS, (self, _pattern(other)), commutes=True, check=_no_alpha)

    def __mul__(self, other: Pattern | float) -> Pattern:
        return _Call("a product", PRODUCTS, (self, _pattern(other)), commutes=True)

    def __truediv__(self, other: Pattern) -> Pattern:
        return _Call("a quotient", {aten.div.Tensor}, (self, other))

    def __neg__(self) -> Pattern:
        return _Call("a negation", {aten.neg.default}, (self,))

    __radd__, __rmul__ = __add__, __mul__


@dataclass(frozen=True)
class _Capture(Pattern):
    name: str

    def match(self, node: Any, found: Found, search: _Search, anchor: fx.Node) -> Iterator[Found]:
        if self.name in found.captures:
            if found.captures[self.name] is node:
                yield found
            else:
                search.dead_end(f"{self.name} is not the same value twice", node, found, anchor)
        elif isinstance(node, fx.Node) and isinstance(value(node), Tensor):
            yield replace(found, captures={**found.captures, self.name: node})
        else:
            search.dead_end(f"{self.name} is not a tensor", node, found, anchor)


@dataclass(frozen=True)
class _Number(Pattern):
    name: str
    literal: float | None = None

    def match(self, node: Any, found: Found, search: _Search, anchor: fx.Node) -> Iterator[Found]:
        if isinstance(value(node), Tensor) or value(node) is None:
            search.dead_end(f"{self.name} is not a number", node, found, anchor)
        elif self.literal is not None and (isinstance(node, fx.Node) or node != self.literal):
            search.dead_end(f"the number is {node}, not {self.literal:g}", node, found, anchor)
        elif self.literal is None and found.captures.get(self.name, node) != node:
            search.dead_end(f"{self.name} is not the same number twice", node, found, anchor)
        else:
            yield found if self.literal is not None else replace(found, captures={**found.captures, self.name: node})


@dataclass(frozen=True)
class _Cast(Pattern):
    inner: Pattern

    def match(self, node: Any, found: Found, search: _Search, anchor: fx.Node) -> Iterator[Found]:
        if isinstance(node, fx.Node) and is_cast(node):
            there = replace(found, interior=found.interior | {node}, casts=found.casts | {node})
            yield from self.inner.match(node.args[0], there, search, anchor)
        yield from self.inner.match(node, found, search, anchor)


@dataclass(frozen=True)
class _Either(Pattern):
    patterns: tuple[Pattern, ...]

    def match(self, node: Any, found: Found, search: _Search, anchor: fx.Node) -> Iterator[Found]:
        for pattern in self.patterns:
            yield from pattern.match(node, found, search, anchor)


Check = Callable[[fx.Node], str | None]


@dataclass(frozen=True)
class _Call(Pattern):
    """A call of one of ``targets`` whose leading arguments match; ``check`` gives the reason when the rest does not."""

    what: str
    targets: set[Any]
    arguments: tuple[Pattern, ...]
    commutes: bool = False
    check: Check = field(default=lambda node: None)

    def match(self, node: Any, found: Found, search: _Search, anchor: fx.Node) -> Iterator[Found]:
        if not isinstance(node, fx.Node) or node.target not in self.targets:
            search.dead_end(f"expected {self.what}, found {describe(node)}", node, found, anchor)
            return
        if reason := self.check(node):
            search.dead_end(reason, node, found, anchor)
            return
        operands = _operands(node)
        found = replace(found, interior=found.interior | {node})
        if len(operands) < len(self.arguments):
            search.dead_end(f"expected {self.what} of {len(self.arguments)} values", node, found, anchor)
            return
        given = operands[: len(self.arguments)]
        for order in itertools.permutations(given) if self.commutes else (given,):
            yield from _match_all(self.arguments, order, found, search, anchor)


def _match_all(
    patterns: tuple[Pattern, ...], nodes: tuple[Any, ...], found: Found, search: _Search, anchor: fx.Node
) -> Iterator[Found]:
    if not patterns:
        yield found
        return
    for extended in patterns[0].match(nodes[0], found, search, anchor):
        yield from _match_all(patterns[1:], nodes[1:], extended, search, anchor)


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """A call's leading arguments; the elements of a list of tensors count one by one."""
    first = node.args[0] if node.args else ()
    return tuple(first) if isinstance(first, (list, tuple)) else tuple(node.args)


# -- the vocabulary --------------------------------------------------------------------------------------------------

SUMS = {aten.add.Tensor, aten.add.Scalar}
PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar}


def capture(name: str) -> Pattern:
    """Any tensor; the same one wherever the name stands again."""
    return _Capture(name)


def number(name: str) -> Pattern:
    """A scalar: a constant, or a symbolic number of the graph."""
    return _Number(name)


def cast(inner: Pattern) -> Pattern:
    """The value, or a conversion of it to another floating-point type."""
    return _Cast(inner)


def either(*patterns: Pattern) -> Pattern:
    """Whichever of several spellings is there."""
    return _Either(patterns)


def square(x: Pattern) -> Pattern:
    """x², as ``pow(x, 2)``, ``square(x)`` or ``x * x``."""
    power = _Call("a square", {aten.pow.Tensor_Scalar}, (x, _Number("exponent", 2)))
    return either(power, _Call("a square", {aten.square.default}, (x,)), x * x)


def rsqrt(x: Pattern) -> Pattern:
    """1 / √x, as ``rsqrt(x)`` or ``pow(x, -0.5)``."""
    power = _Call("an inverse root", {aten.pow.Tensor_Scalar}, (x, _Number("exponent", -0.5)))
    return either(_Call("an inverse root", {aten.rsqrt.default}, (x,)), power)


def sqrt(x: Pattern) -> Pattern:
    """√x."""
    return _Call("a root", {aten.sqrt.default}, (x,))


def mean(x: Pattern) -> Pattern:
    """The mean over the last dimension, which is kept."""
    return _Call("a mean", {aten.mean.dim}, (x,), check=_over_last_dimension)


def silu(x: Pattern) -> Pattern:
    """x · sigmoid(x), as ``silu(x)`` or written out."""
    written_out = x * _Call("a sigmoid", {aten.sigmoid.default}, (x,))
    return either(_Call("a SiLU", {aten.silu.default}, (x,)), written_out)


def gelu(x: Pattern, approximate: str) -> Pattern:
    """The Gaussian error linear unit, ``approximate`` being "none" or "tanh"."""

    def check(node: fx.Node) -> str | None:
        spelt = node.kwargs.get("approximate", "none")
        return None if spelt == approximate else f"the GELU is approximate={spelt!r}, not {approximate!r}"

    return _Call("a GELU", {aten.gelu.default}, (x,), check=check)


def concatenate(*parts: Pattern) -> Pattern:
    """Parts laid side by side along the last dimension."""
    return _Call("a concatenation", {aten.cat.default}, parts, check=_along_last_dimension)


def first_half(x: Pattern) -> Pattern:
    """``x[..., : d // 2]`` where d is the size of the last dimension."""
    return _Half(x, 0)


def second_half(x: Pattern) -> Pattern:
    """``x[..., d // 2 :]``."""
    return _Half(x, 1)


@dataclass(frozen=True)
class _Half(Pattern):
    inner: Pattern
    which: int

    def match(self, node: Any, found: Found, search: _Search, anchor: fx.Node) -> Iterator[Found]:
        whole, consumed = _half_of(node, self.which)
        if whole is None:
            name = ("first", "second")[self.which]
            reason = f"expected the {name} half of the last dimension, found {describe(node)}"
            search.dead_end(reason, node, found, anchor)
            return
        yield from self.inner.match(whole, replace(found, interior=found.interior | consumed), search, anchor)


def _half_of(node: Any, which: int) -> tuple[fx.Node | None, frozenset[fx.Node]]:
    """The value that ``node`` is a half of, through a slice or a split in two, and the nodes that did it."""
    if not isinstance(node, fx.Node):
        return None, frozenset()
    if node.target is operator.getitem and node.args[1] == which:
        split = node.args[0]
        if isinstance(split, fx.Node) and split.target in (aten.split.Tensor, aten.chunk.default):
            whole, parts = split.args[0], value(split)
            sizes = [p.shape[-1] for p in parts]
            dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
            if len(sizes) == 2 and sizes[0] == sizes[1] and dim in (-1, value(whole).dim() - 1):
                return whole, frozenset({node, split})
    if node.target is aten.slice.Tensor:
        whole, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        width = value(whole).shape[-1]
        if isinstance(width, int) and width % 2 == 0 and dim in (-1, value(whole).dim() - 1) and step == 1:
            stop = width if end is None else end
            bounds = (start or 0, min(stop, width) if isinstance(stop, int) else None)
            if bounds == ((0, width // 2), (width // 2, width))[which]:
                return whole, frozenset({node})
    return None, frozenset()


def is_cast(node: fx.Node) -> bool:
    """Whether a node only converts between floating-point types."""
    if node.target is not aten._to_copy.default or set(node.kwargs) - {"dtype"}:
        return False
    return value(node).dtype.is_floating_point and value(node.args[0]).dtype.is_floating_point


def describe(node: Any) -> str:
    """What a value is, in words for a user."""
    if not isinstance(node, fx.Node):
        return str(node)
    if node.op == "placeholder":
        return "an input of the graph"
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def _pattern(value: Pattern | float) -> Pattern:
    return value if isinstance(value, Pattern) else _Number("literal", value)


def _no_alpha(node: fx.Node) -> str | None:
    return None if node.kwargs.get("alpha", 1) == 1 else "the sum has a factor alpha"


def _over_last_dimension(node: fx.Node) -> str | None:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    last = value(node.args[0]).dim() - 1
    if list(dims or []) not in ([-1], [last]):
        return "the mean is not over the last dimension alone"
    if node.kwargs.get("dtype") is not None:
        return "the mean changes the dtype"
    return None if keepdim else "the mean does not keep its dimension"


def _along_last_dimension(node: fx.Node) -> str | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return None if dim in (-1, value(node).dim() - 1) else "the concatenation is not along the last dimension"
