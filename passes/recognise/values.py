"""Values that an element of a tensor may have, and what can be done to them.

A value is a formula (booleans), an integer expression, a float that every float format holds (see :func:`_exact`), or
a :class:`Choice` between two of them. Integers are int32 and int64 as mathematics has them: index arithmetic of real
sequence lengths does not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from ..rewrite import source_line, value
from .indexing import ONE, ZERO, integer, is_integer
from .predicate import And, Atom, Formula, Or, select

# softmax gives exactly 0 to a score this far below another, in every float format: exp(-65504 + 2 * 30000) = 0.
HIDDEN = torch.finfo(torch.float16).min
# Multiples of one half up to here are exact in every float format, bfloat16 with its 8 bits included.
_EXACT = 64
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Choice:
    """``yes`` where the condition holds, ``no`` elsewhere."""

    condition: Formula
    yes: Value
    no: Value


Value = Formula | sympy.Expr | float | Choice


class Unknown(Exception):
    """A value that has no expression: the reason, and the node at which the folding ended."""

    def __init__(self, reason: str, node: fx.Node, line: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node, self.source_line = reason, node, line or source_line(node)


def unknowns(found: Value) -> set[AppliedUndef]:
    """The unknown elements in a value."""
    match found:
        case Atom(expression):
            return expression.atoms(AppliedUndef)
        case And(parts) | Or(parts):
            return {u for part in parts for u in unknowns(part)}
        case Choice(condition, yes, no):
            return unknowns(condition) | unknowns(yes) | unknowns(no)
        case sympy.Expr():
            return found.atoms(AppliedUndef)
    return set()


def formula(found: Value) -> Formula:
    """The value of a boolean element, which is never a choice."""
    assert isinstance(found, Formula)
    return found


def spread(function: Callable[..., Value], *values: Value) -> Value:
    """A function of plain values, applied to every combination of the choices' branches."""
    choice = next((v for v in values if isinstance(v, Choice)), None)
    if choice is None:
        return function(*values)

    def branch(name: str) -> Value:
        fixed = (getattr(v, name) if isinstance(v, Choice) and v.condition == choice.condition else v for v in values)
        return spread(function, *fixed)

    return choose(choice.condition, branch("yes"), branch("no"))


def choose(condition: Formula, yes: Value, no: Value) -> Value:
    """``yes`` where the condition holds, ``no`` elsewhere, in its simplest form."""
    if isinstance(yes, Formula) and isinstance(no, Formula):
        return select(condition, yes, no)
    if isinstance(condition, bool):
        return yes if condition else no
    return no if yes == no or _equal_where(condition, yes, no) else Choice(condition, yes, no)


def _equal_where(condition: Formula, yes: Value, no: Value) -> bool:
    """Whether ``no`` is ``yes`` at the one place where the condition holds: where an index, i ≥ 0, has -i ≥ 0."""
    if not (isinstance(condition, Atom) and condition.relation == ">=" and isinstance(no, sympy.Expr)):
        return False
    index = -condition.expression
    return bool(index.is_Symbol and index.is_nonnegative and no.subs(index, 0) == yes)


def is_visible(found: Value, mask: fx.Node) -> Value:
    """Whether attention lets this element of a boolean or additive mask be seen."""
    if isinstance(found, Formula):
        return found
    if isinstance(found, float) and (found == 0.0 or found <= HIDDEN):
        return found == 0.0
    raise Unknown("adds something else than 0 or -inf to the scores", mask)


def subtract(a: Value, b: Value) -> Value:
    """a - b; but the difference of two numbers that hide a key depends on how they are rounded, so it is none."""
    return math.nan if isinstance(b, float) and b <= HIDDEN else a - b  # type: ignore[operator]


def number(given: Any, node: fx.Node) -> Value:
    """The value of a plain number, or of a node that stands for a size."""
    if isinstance(given, (bool, float)):
        return given
    if is_integer(given):
        return integer(given)
    raise Unknown(f"takes the number {given}", node)


def as_integer(found: Value, node: fx.Node) -> Value:
    if isinstance(found, Formula):
        return choose(found, ONE, ZERO)
    if isinstance(found, float):
        if not found.is_integer() or abs(found) > _EXACT:
            raise Unknown(f"makes an integer of {found}", node)
        return sympy.Integer(int(found))
    return found


def as_float(found: Value, node: fx.Node) -> Value:
    if isinstance(found, Formula):
        return choose(found, 1.0, 0.0)
    if isinstance(found, sympy.Expr):
        if not found.is_Integer:
            raise Unknown("makes floats of positions", node)
        found = float(found)
    return _exact(found, node)


def _exact(number: Any, node: fx.Node) -> float:
    """A float that is the same in every format: a multiple of one half up to 64, or one that hides a key."""
    if number < torch.finfo(value(node).dtype).min:
        return -math.inf
    if number <= HIDDEN or (abs(number) <= _EXACT and (2 * number).is_integer()):
        return number
    raise Unknown(f"computes with the number {number}", node)
