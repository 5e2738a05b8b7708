"""A pattern is the formula it finds, matched backward from the node that computes its result.

    x, weight, eps = capture("x"), capture("weight"), number("eps")
    xf     = widened(x)                                # x itself, or x converted without loss
    normed = xf * rsqrt(mean(square(xf)) + eps)
    RMS_NORM = weight * cast(normed)                   # a conversion that may be absent

    match({"round, then scale": RMS_NORM}, node)       # Found(variant, captures, interior, casts) or Miss

A ``capture`` is any tensor, and the same one wherever its name stands again; with a second argument it names what a
part of the formula computed. A ``number`` is a scalar; literals are themselves. ``+ - * / **``, unary minus and slices
of the last dimension (``x[half:]``) mean what they say, sums and products in either order; ``a | b`` is either
spelling, so ``p | view(p)`` is p behind a view that may be absent. ``cast`` and ``widened`` are conversions that may be
there or not; which of them were is in ``Found.casts``. ``pattern.where(check)`` asks for more than structure, such as
a dtype. Each further operator is one ``function(...)``; those in use are in ``vocabulary.py``. Values may have any
number of users.

Matching is a search: a pattern yields every consistent assignment, so each choice can be taken back. The larger operand
goes first, which fails fast and comes far before it fails; every dead end is noted, and the one that came furthest
explains why a formula did not fit.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import arguments as arguments
from .nodes import describe as describe
from .rewrite import Miss, source_line, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """A consistent assignment.

    Attributes:
        variant: key of the pattern that matched.
        captures: what each ``capture`` and ``number`` is bound to.
        interior: every node the formula consumed, the anchor included, captures excluded.
        casts: those of them that only convert, with the dtype they convert to.
    """

    variant: str = ""
    captures: Mapping[str, Any] = field(default_factory=dict)
    interior: frozenset[fx.Node] = frozenset()

    @property
    def casts(self) -> dict[fx.Node, torch.dtype]:
        return {node: value(node).dtype for node in self.interior if is_cast(node)}

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]

    def through(self, *nodes: fx.Node) -> Found:
        return replace(self, interior=self.interior.union(nodes))

    def bind(self, name: str, to: Any) -> Found:
        return replace(self, captures={**self.captures, name: to})


class Attempt:
    """One node tried against patterns; remembers the dead end that came furthest."""

    def __init__(self, anchor: fx.Node) -> None:
        self.anchor = anchor
        self.reason, self.node, self.consumed, self.fitted = "", anchor, frozenset[fx.Node](), False

    def first(self, patterns: Mapping[str, Pattern]) -> Found | None:
        target = self.anchor.target
        fitting = ((v, p) for v, p in patterns.items() if p.roots is None or target in p.roots)
        matches = (p.match(self.anchor, Found(variant), self) for variant, p in fitting)
        return next(itertools.chain.from_iterable(matches), None)

    def dead_end(self, reason: str, node: Any, found: Found, fitted: bool = False) -> Iterator[Found]:
        """Note where a path ended; ``fitted`` when all of the formula was there but its ``where`` said no."""
        if not self.reason or (fitted, len(found.interior)) > (self.fitted, len(self.consumed)):
            at = node if isinstance(node, fx.Node) else self.anchor
            self.reason, self.node, self.consumed, self.fitted = reason, at, found.interior, fitted
        return iter(())

    def miss(self) -> Miss:
        line = source_line(self.node) or source_line(self.anchor)
        return Miss(self.reason, self.node, line, len(self.consumed))


def match(patterns: Mapping[str, Pattern], node: fx.Node) -> Found | Miss:
    """The first pattern and assignment that fit a node, or the miss that came furthest."""
    attempt = Attempt(node)
    return attempt.first(patterns) or attempt.miss()


# -- the language ------------------------------------------------------------------------------------------------------


class Pattern:
    """Something a value of the graph may be."""

    size = 0  # number of calls: the larger operand is matched first
    roots: frozenset[Any] | None = None  # targets of the nodes that it may be, or None for any

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        """Yield every extension of ``found`` under which ``node`` is this pattern."""
        raise NotImplementedError

    def where(self, check: Callable[[fx.Node, Found], str | None]) -> Pattern:
        """This pattern if ``check(node, found)`` is None; otherwise it is the reason why not."""
        return _Where(self, check)

    def __or__(self, other: Pattern) -> Pattern:
        return _Either(self, other)

    def __add__(self, other: Operand) -> Pattern:
        return add(self, other)

    def __sub__(self, other: Operand) -> Pattern:
        return sub(self, other)

    def __mul__(self, other: Operand) -> Pattern:
        return mul(self, other)

    def __truediv__(self, other: Operand) -> Pattern:
        return div(self, other)

    def __pow__(self, other: Operand) -> Pattern:
        return power(self, other)

    def __neg__(self) -> Pattern:
        return neg(self)

    def __getitem__(self, part: slice) -> Pattern:
        return _Slice(self, part)

    __radd__, __rmul__ = __add__, __mul__


Operand = Pattern | float | str | Sequence[Pattern]
Check = Callable[[fx.Node, dict[str, Any]], str | None]


class _Capture(Pattern):
    def __init__(self, name: str, inner: Pattern | None) -> None:
        self.name, self.inner, self.size = name, inner, inner.size if inner else 0
        self.roots = inner.roots if inner else None

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if not isinstance(node, fx.Node) or not isinstance(value(node), Tensor):
            return attempt.dead_end(f"{self.name} is not a tensor", node, found)
        if found.captures.get(self.name, node) is not node:
            return attempt.dead_end(f"{self.name} is not the same value twice", node, found)
        found = found.bind(self.name, node)
        return self.inner.match(node, found, attempt) if self.inner else iter((found,))


class _Number(Pattern):
    def __init__(self, name: str) -> None:
        self.name = name

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if not isinstance(value(node), (int, float, torch.SymInt, torch.SymFloat)):
            return attempt.dead_end(f"{self.name} is not a number", node, found)
        if found.captures.get(self.name, node) != node:
            return attempt.dead_end(f"{self.name} is not the same number twice", node, found)
        return iter((found.bind(self.name, node),))


class _Literal(Pattern):
    def __init__(self, literal: float | str) -> None:
        self.literal = literal

    def fits(self, node: Any) -> bool:
        if isinstance(node, (int, float)) and isinstance(self.literal, (int, float)):
            return math.isclose(node, self.literal, rel_tol=1e-6)
        return isinstance(node, str) and node == self.literal

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if self.fits(node):
            return iter((found,))
        return attempt.dead_end(f"expected {self.literal}, found {describe(node)}", node, found)


class _Cast(Pattern):
    def __init__(self, inner: Pattern, lossless: bool) -> None:
        self.inner, self.lossless, self.size = inner, lossless, inner.size
        self.roots = None if inner.roots is None else inner.roots | _CASTS

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if isinstance(node, fx.Node) and is_cast(node):
            to, source = value(node).dtype, value(node.args[0]).dtype
            if not self.lossless or torch.promote_types(to, source) == to:
                yield from self.inner.match(node.args[0], found.through(node), attempt)
        yield from self.inner.match(node, found, attempt)


class _Either(Pattern):
    def __init__(self, *spellings: Pattern) -> None:
        self.spellings, self.size = spellings, max(s.size for s in spellings)
        self.roots = any_of(spellings)

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        return itertools.chain.from_iterable(s.match(node, found, attempt) for s in self.spellings)


class _Where(Pattern):
    def __init__(self, inner: Pattern, check: Callable[[fx.Node, Found], str | None]) -> None:
        self.inner, self.check, self.size, self.roots = inner, check, inner.size, inner.roots

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        for extended in self.inner.match(node, found, attempt):
            if reason := self.check(node, extended):
                attempt.dead_end(reason, node, extended, fitted=True)
            else:
                yield extended


class _Parts(Pattern):
    """A list of tensors, as ``cat`` takes it."""

    def __init__(self, parts: Sequence[Pattern]) -> None:
        self.parts, self.size = tuple(parts), sum(p.size for p in parts)

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if not isinstance(node, (list, tuple)) or len(node) != len(self.parts):
            return attempt.dead_end(f"expected {len(self.parts)} parts", node, found)
        return _match_all(tuple(zip(self.parts, node, strict=True)), found, attempt)


class _Call(Pattern):
    def __init__(
        self, name: str, targets: frozenset[Any], operands: Sequence[Operand], commutes: bool, check: Check
    ) -> None:
        self.name, self.targets, self.commutes, self.check = name, targets, commutes, check
        self.roots = targets
        self.operands = tuple(_pattern(o) for o in operands)
        self.size = 1 + sum(o.size for o in self.operands)

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if not isinstance(node, fx.Node) or node.target not in self.targets:
            return attempt.dead_end(f"expected {self.name}, found {describe(node)}", node, found)
        rest = arguments(node)
        leading = {name: rest.pop(name) for name in list(rest)[: len(self.operands)]}
        if reason := self.check(node, rest) or self._wrong_constant(node, leading):
            return attempt.dead_end(reason, node, found.through(node))
        values = tuple(leading.values())
        orders = itertools.permutations(values) if self.commutes else (values,)
        pairs = (tuple(zip(self.operands, order, strict=True)) for order in orders)
        found = found.through(node)
        return itertools.chain.from_iterable(_match_all(p, found, attempt) for p in pairs)

    def _wrong_constant(self, node: fx.Node, leading: Mapping[str, Any]) -> str | None:
        for operand, (name, given) in zip(self.operands, leading.items(), strict=True):
            if not self.commutes and isinstance(operand, _Literal) and not operand.fits(given):
                return f"{describe(node)} has {name}={given}, not {operand.literal}"
        return None


def _match_all(pairs: Sequence[tuple[Pattern, Any]], found: Found, attempt: Attempt) -> Iterator[Found]:
    if not pairs:
        yield found
        return
    (pattern, node), *rest = sorted(pairs, key=lambda pair: -pair[0].size)
    for extended in pattern.match(node, found, attempt):
        yield from _match_all(rest, extended, attempt)


class _Slice(Pattern):
    """A part of the last dimension; a slice and one piece of a split are the same thing."""

    def __init__(self, inner: Pattern, part: slice) -> None:
        bounds = (
            0 if part.start is None else part.start,
            "end" if part.stop is None else part.stop,
            part.step or 1,
        )
        self.bounds = tuple(_pattern(b) for b in bounds)
        self.inner, self.size = inner, 1 + inner.size

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if (part := part_of_last_dimension(node)) is None:
            return attempt.dead_end(f"expected a part of the last dimension, found {describe(node)}", node, found)
        whole, *bounds = part
        nodes = (node, node.args[0]) if node.target is operator.getitem else (node,)
        pairs = ((self.inner, whole), *zip(self.bounds, bounds, strict=True))
        return _match_all(pairs, found.through(*nodes), attempt)


def any_of(patterns: Iterable[Pattern]) -> frozenset[Any] | None:
    """The targets of the nodes that one of the patterns may be, or None for any."""
    roots = frozenset[Any]()
    for pattern in patterns:
        if pattern.roots is None:
            return None
        roots |= pattern.roots
    return roots


def _pattern(operand: Operand) -> Pattern:
    if isinstance(operand, (list, tuple)):
        return _Parts(operand)
    return operand if isinstance(operand, Pattern) else _Literal(operand)  # type: ignore[arg-type]


def part_of_last_dimension(node: Any) -> tuple[fx.Node, Any, Any, Any] | None:
    """``(whole, start, stop, step)`` if a node is a slice of the last dimension; ``stop`` may be "end"."""
    if not isinstance(node, fx.Node):
        return None
    split = node.args[0] if node.target is operator.getitem else node
    if not isinstance(split, fx.Node) or split.target not in (_SPLITS if split is not node else {aten.slice.Tensor}):
        return None
    given = arguments(split)
    whole = given["self"]
    width = value(whole).shape[-1]
    if given["dim"] not in (-1, value(whole).dim() - 1) or not isinstance(width, int):
        return None
    if split is node:
        start, stop, step = given["start"] or 0, given["end"], given["step"]
    else:
        sizes: list[int] = [piece.shape[-1] for piece in value(split)]
        index: Any = node.args[1]
        start, step = sum(sizes[:index]), 1
        stop = start + sizes[index]
    start, stop = (b + width if isinstance(b, int) and b < 0 else b for b in (start, stop))
    ends = stop is None or (isinstance(stop, int) and stop >= width)
    return whole, start, "end" if ends else stop, step


# -- the words -------------------------------------------------------------------------------------------------------


def capture(name: str, inner: Pattern | None = None) -> Pattern:
    """Any tensor, or the value of ``inner``; the same one wherever the name stands again."""
    return _Capture(name, inner)


def number(name: str) -> Pattern:
    """A scalar: a constant, or a symbolic number of the graph."""
    return _Number(name)


def cast(inner: Pattern) -> Pattern:
    """The value, or its conversion to another floating-point type."""
    return _Cast(inner, lossless=False)


def widened(inner: Pattern) -> Pattern:
    """The value, or its conversion to a floating-point type that holds it exactly."""
    return _Cast(inner, lossless=True)


def function(name: str, *targets: Any, commutes: bool = False, check: Check | None = None) -> Callable[..., Pattern]:
    """A new word: calls of ``targets`` whose first arguments match the operands.

    ``check(node, rest)`` is given the remaining arguments by name and returns None or a reason; by default all of them
    must have their schema's default value.
    """

    def call(*operands: Operand) -> Pattern:
        return _Call(name, frozenset(targets), operands, commutes, check or _defaults)

    return call


def is_cast(node: fx.Node) -> bool:
    """Whether a node only converts between floating-point types."""
    if node.target not in _CASTS:
        return False
    old, new = value(node.args[0]), value(node)
    return old.dtype.is_floating_point and new.dtype.is_floating_point and old.device == new.device


def _defaults(node: fx.Node, rest: dict[str, Any]) -> str | None:
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
    odd = [f"{name}={given}" for name, given in rest.items() if given != defaults[name]]
    return f"{describe(node)} has {', '.join(odd)}" if odd else None


_CASTS = frozenset(
    (aten._to_copy.default, aten.type_as.default, aten.to.dtype, torch.ops.prims.convert_element_type.default)
)
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}

add = function("add", aten.add.Tensor, aten.add.Scalar, commutes=True)
sub = function("sub", aten.sub.Tensor, aten.sub.Scalar)
mul = function("mul", aten.mul.Tensor, aten.mul.Scalar, commutes=True)
div = function("div", aten.div.Tensor, aten.div.Scalar)
power = function("pow", aten.pow.Tensor_Scalar)
neg = function("neg", aten.neg.default)
