"""Formulas over index variables: what is true of an element, whatever the sizes are.

A formula is True, False, an :class:`Atom` (an integer expression compared with zero), or a conjunction or disjunction
of formulas. Negation is pushed into the atoms, which it maps to atoms, so there is no node for it. An index variable
runs over ``0 .. size - 1`` of its dimension; sizes may be symbolic. Atoms that hold everywhere (or nowhere) in that
range are decided when they are made, by bounds that are linear in the variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import sympy

Relation = Literal[">=", "==", "!="]


@dataclass(frozen=True)
class Atom:
    """``expression relation 0``."""

    expression: sympy.Expr
    relation: Relation

    def __str__(self) -> str:
        return f"{self.expression} {_SIGNS[self.relation]} 0"


@dataclass(frozen=True)
class And:
    parts: frozenset[Formula]

    def __str__(self) -> str:
        return " ∧ ".join(sorted(f"({p})" if isinstance(p, Or) else str(p) for p in self.parts))


@dataclass(frozen=True)
class Or:
    parts: frozenset[Formula]

    def __str__(self) -> str:
        return " ∨ ".join(sorted(f"({p})" if isinstance(p, And) else str(p) for p in self.parts))


Formula = bool | Atom | And | Or

_SIGNS = {">=": "≥", "==": "=", "!=": "≠"}
_OPPOSITE: dict[Relation, Relation] = {"==": "!=", "!=": "=="}


class Domain:
    """The index variables and the sizes of their dimensions."""

    def __init__(self, sizes: dict[sympy.Symbol, sympy.Expr]) -> None:
        self.sizes = dict(sizes)

    def at_least_zero(self, expression: sympy.Expr) -> Formula:
        """``expression ≥ 0``, decided where bounds decide it."""
        expression = sympy.expand(expression)
        if self._never_negative(expression):
            return True
        if self._never_negative(-expression - 1):
            return False
        return Atom(expression, ">=")

    def is_zero(self, expression: sympy.Expr) -> Formula:
        """``expression = 0``, decided where bounds decide it."""
        expression = sympy.expand(expression)
        if expression == 0:
            return True
        if self._never_negative(expression - 1) or self._never_negative(-expression - 1):
            return False
        if expression.could_extract_minus_sign():  # one spelling for e = 0 and -e = 0
            expression = -expression
        return Atom(expression, "==")

    def _never_negative(self, expression: sympy.Expr) -> bool:
        """Whether the minimum over all variables, found at a corner of their box, is surely not negative."""
        minimum = expression
        for variable, size in self.sizes.items():
            factor = expression.coeff(variable, 1)
            if not isinstance(factor, sympy.Integer):
                return False
            minimum -= factor * (variable - (size - 1 if factor < 0 else 0))
        minimum = sympy.expand(minimum)
        return not minimum.has(*self.sizes) and _never_negative(minimum)


def _never_negative(expression: sympy.Expr) -> bool:
    """Whether an expression of sizes is ≥ 0 for all of them: with size = 1 + n, no term of it is negative."""
    positive = {s: sympy.Dummy(integer=True, nonnegative=True) + 1 for s in expression.free_symbols if s.is_positive}
    terms = sympy.expand(expression.xreplace(positive)).as_coefficients_dict()
    return all(factor.is_nonnegative and term.is_nonnegative for term, factor in terms.items())


def negation(formula: Formula) -> Formula:
    match formula:
        case bool():
            return not formula
        case Atom(expression, ">="):
            return Atom(sympy.expand(-expression - 1), ">=")
        case Atom(expression, relation):
            return Atom(expression, _OPPOSITE[relation])
        case And(parts):
            return disjunction(negation(p) for p in parts)
        case Or(parts):
            return conjunction(negation(p) for p in parts)


def conjunction(formulas: Iterable[Formula]) -> Formula:
    parts: set[Formula] = set()
    for formula in formulas:
        if formula is False:
            return False
        parts |= formula.parts if isinstance(formula, And) else set() if formula is True else {formula}
    if any(negation(p) in parts for p in parts):
        return False
    parts = _one_of_each(parts, min)
    return next(iter(parts), True) if len(parts) < 2 else And(frozenset(parts))


def disjunction(formulas: Iterable[Formula]) -> Formula:
    parts: set[Formula] = set()
    for formula in formulas:
        if formula is True:
            return True
        parts |= formula.parts if isinstance(formula, Or) else set() if formula is False else {formula}
    if any(negation(p) in parts for p in parts):
        return True
    parts = _one_of_each(parts, max)
    return next(iter(parts), False) if len(parts) < 2 else Or(frozenset(parts))


def select(condition: Formula, yes: Formula, no: Formula) -> Formula:
    """``yes`` where the condition holds, ``no`` elsewhere."""
    if yes == no:
        return yes
    if yes is True or no is False:
        return disjunction([condition, no]) if yes is True else conjunction([condition, yes])
    if yes is False or no is True:
        return conjunction([negation(condition), no]) if yes is False else disjunction([negation(condition), yes])
    return disjunction([conjunction([condition, yes]), conjunction([negation(condition), no])])


def _one_of_each(parts: set[Formula], pick: Callable[[list[sympy.Expr]], sympy.Expr]) -> set[Formula]:
    """Of inequalities that differ only in their constant one says it all: e + 1 ≥ 0 follows from e ≥ 0."""
    constants: dict[sympy.Expr, list[sympy.Expr]] = {}
    others: set[Formula] = set()
    for part in parts:
        if isinstance(part, Atom) and part.relation == ">=":
            constant, rest = part.expression.as_coeff_Add()
            constants.setdefault(rest, []).append(constant)
        else:
            others.add(part)
    return others | {Atom(rest + pick(found), ">=") for rest, found in constants.items()}
