"""Documents that are packed into the rows of a batch, as a mask finds them: from positions that start again.

Two things are proven. Where the numbers of two tokens are equal they are of one piece, because the numbers never
decrease. And where the numbers count the places at which a position is not one more than the position before it, the
positions in a document are as far apart as the tokens are: a mask over positions is one over indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from ..rewrite import value
from .elements import Elements
from .indexing import ONE, ZERO, arguments, inside, shape_of
from .predicate import Atom, Formula
from .values import Unknown

aten = torch.ops.aten

BATCH, QUERY, KEY = sympy.symbols("batch query key", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Documents:
    """A query sees keys of its own document only.

    Attributes:
        numbers: [batch, length], or [1, length] for all rows. They never decrease along a row, so that a document is
            where they are equal and lies in one piece.
    """

    numbers: fx.Node

    def __str__(self) -> str:
        return "documents"


def documents_of(part: Formula, elements: Elements) -> Documents | None:
    """The documents of n(batch, query) = n(batch, key), where n is known never to decrease."""
    if not (isinstance(part, Atom) and part.relation == "=="):
        return None
    read = part.expression.atoms(AppliedUndef)
    if len({element.func for element in read}) != 1:
        return None
    element = next(iter(read))
    node = elements.node_of(element)
    if len(shape_of(node)) != 2 or not _counts_up(node):
        return None
    row = ZERO if shape_of(node)[0] == ONE else BATCH
    difference = element.func(row, QUERY) - element.func(row, KEY)
    return Documents(node) if part.expression in (difference, -difference) else None


def between(documents: Documents, part: Formula, elements: Elements) -> Formula:
    """A comparison of positions as one of indices, which it is between tokens of one document; else the part itself."""
    if not isinstance(part, Atom) or (positions := _counted_positions(documents.numbers)) is None:
        return part
    try:
        shape = shape_of(positions)
        query, key = (elements.at(positions, inside(shape, (BATCH, index))) for index in (QUERY, KEY))
    except Unknown:
        return part
    if not (isinstance(query, AppliedUndef) and isinstance(key, AppliedUndef)):
        return part
    difference = sympy.expand(part.expression.xreplace({query: key + QUERY - KEY}))
    if difference.has(key):  # more than a difference of positions
        return part
    return elements.domain.at_least_zero(difference) if part.relation == ">=" else part


def _counted(node: fx.Node) -> fx.Node | None:
    """What a node counts along its last dimension: how often it was true so far."""
    if node.target is not aten.cumsum.default:
        return None
    given = arguments(node)
    counted = given["self"]
    while counted.target in (aten._to_copy.default, aten.to.dtype):
        counted = counted.args[0]
    along_last = given["dim"] in (-1, value(node).dim() - 1)
    return counted if along_last and value(counted).dtype == torch.bool else None


def _counts_up(node: fx.Node) -> bool:
    return _counted(node) is not None


def _counted_positions(numbers: fx.Node) -> fx.Node | None:
    """p, where ``numbers`` counts the places at which p[i] - p[i - 1] is not 1; that of i = 0 does not matter."""
    steps = _counted(numbers)
    if steps is None or steps.target is not aten.ne.Scalar or steps.args[1] != 1:
        return None
    difference = steps.args[0]
    if not isinstance(difference, fx.Node) or difference.target is not aten.diff.default:
        return None
    given = arguments(difference)
    positions, along = given["self"], given["dim"] % value(difference).dim()
    # One element in front and none behind: element i is that of positions i and i - 1.
    if given["n"] != 1 or given["append"] is not None or along != value(difference).dim() - 1:
        return None
    in_front = given["prepend"]
    if in_front is None or shape_of(in_front)[-1] != ONE:
        return None
    integers = value(positions).dtype in (torch.int32, torch.int64)
    return positions if integers and value(difference).dtype == value(positions).dtype else None
