"""What an attention mask hides, proven from the graph that builds it: soundness rule 2, "proven or kept".

:func:`prove` asks one question, "what is the value of the mask's element (batch, head, query, key)?", and answers it
with a formula by asking the same of the node's operands: ``arange`` answers with its index, a view passes the question
on under another index, a comparison makes a formula, ``cumsum`` of a constant is a product. So sequence lengths may be
symbolic, and nothing is ever tried out at one size. What no rule explains stays an unknown *element*, a function of the
indices at which it is read; a formula that still contains one depends on data, or on an operator without a rule.

The formula of a mask is a conjunction; each of its parts has to be one of the kinds below (:class:`Causal`,
:class:`Window`, :class:`Chunks`, :class:`Documents`), or the mask is kept as it is, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from ..rewrite import source_line, value
from .documents import BATCH, KEY, QUERY, Documents, between, documents_of
from .elements import Elements, input_name
from .indexing import Shape, align, integer, shape_of
from .predicate import And, Atom, Formula, conjunction
from .values import Unknown, unknowns

HEAD = sympy.Symbol("head", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Causal:
    """A query sees the keys up to its own position: key ≤ query."""

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Window:
    """A query sees no key that is ``width`` or more positions back: query - key < width."""

    width: int

    def __str__(self) -> str:
        return f"window {self.width}"


@dataclass(frozen=True)
class Chunks:
    """A query sees the keys of its own chunk of ``size`` positions, the first of which begins the row."""

    size: int

    def __str__(self) -> str:
        return f"chunks of {self.size}"


Kind = Causal | Window | Chunks | Documents


@dataclass(frozen=True)
class Mask:
    """A mask that was proven: the conjunction of its kinds. With none of them every key is visible."""

    kinds: frozenset[Kind] = frozenset()

    @property
    def causal(self) -> bool:
        return Causal() in self.kinds

    @property
    def window(self) -> int | None:
        return min((kind.width for kind in self.kinds if isinstance(kind, Window)), default=None)

    @property
    def chunks(self) -> list[int]:
        return sorted(kind.size for kind in self.kinds if isinstance(kind, Chunks))

    @property
    def documents(self) -> fx.Node | None:
        return next((kind.numbers for kind in self.kinds if isinstance(kind, Documents)), None)

    def __str__(self) -> str:
        return " ∧ ".join(sorted(map(str, self.kinds))) or "everything visible"


@dataclass(frozen=True)
class Kept:
    """Why a mask stays an explicit tensor; ``node`` and ``source_line`` say where the proof ended."""

    reason: str
    node: fx.Node
    source_line: str | None


def prove(mask: fx.Node, scores: tuple[int | torch.SymInt, ...], *, right_padded: bool = False) -> Mask | Kept:
    """Fold the subgraph that builds a mask into what it hides.

    Args:
        mask: a boolean mask (True is visible) or one that is added to the scores (0 is visible, and -inf or a number
            that has the same effect is hidden), of a shape that broadcasts to ``scores``.
        scores: the sizes [batch, heads, queries, keys], symbolic or not. Query 0 and key 0 are the first rows of q and
            k, so "causal" is the alignment of ``is_causal``: top left.
        right_padded: the caller's promise that an input [batch, length] of the graph hides keys at the end of a row
            only, and that nobody reads results at hidden positions. A causal query sees a hidden key only if it is
            hidden itself, so beside "causal" such a mask has nothing to add.

    Returns:
        A :class:`Mask` that equals the tensor for every value of the graph's inputs (that the promise allows, in rows
        that are read) and every symbolic size, or :class:`Kept`.
    """
    sizes = tuple(integer(s) for s in scores)
    elements = Elements(dict(zip((BATCH, HEAD, QUERY, KEY), sizes, strict=True)))
    try:
        formula = visibility(mask, sizes, elements)
    except Unknown as unknown:
        return Kept(unknown.reason, unknown.node, unknown.source_line or source_line(mask))
    parts = set(_parts(formula))
    kinds: set[Kind] = {found for part in parts if (found := documents_of(part, elements))}
    strangers: list[Formula] = []
    for part in parts:
        inside = _within(kinds, part, elements)
        if (kind := _kind(inside)) is not None:
            kinds.add(kind)
        elif inside is not True and documents_of(part, elements) is None:
            strangers.append(part)
    if right_padded and Causal() in kinds:
        strangers = [part for part in strangers if not _is_padding(part, elements)]
    return _kept(mask, strangers, elements) if strangers else Mask(frozenset(kinds))


def visibility(mask: fx.Node, scores: Shape, elements: Elements) -> Formula:
    """The formula that holds where a key is visible, over BATCH, HEAD, QUERY and KEY."""
    index = align((BATCH, HEAD, QUERY, KEY), shape_of(mask), scores)
    if index is None:
        raise Unknown(f"its shape {tuple(value(mask).shape)} is not known to broadcast to the scores'", mask)
    return elements.visible(mask, index)


def _parts(formula: Formula) -> Iterator[Formula]:
    if isinstance(formula, And):
        yield from formula.parts
    elif formula is not True:
        yield formula


def _kind(part: Formula) -> Kind | None:
    """The kind of mask that one part of the conjunction is. New kinds are recognised here."""
    if not isinstance(part, Atom) or part.relation == "!=":
        return None
    if part.relation == "==":
        return _chunks(part.expression)
    if part.expression == QUERY - KEY:
        return Causal()
    reach = part.expression - (KEY - QUERY)
    if reach.is_Integer and reach >= 0:
        return Window(int(reach) + 1)
    return None


def _chunks(difference: sympy.Expr) -> Chunks | None:
    """Of ⌊query / size⌋ - ⌊key / size⌋ = 0, in either order."""
    for quotient in difference.atoms(sympy.floor) or {KEY}:  # ⌊key / 1⌋ is spelled so
        size = KEY / quotient.args[0] if quotient is not KEY else sympy.Integer(1)
        other = sympy.floor(QUERY / size)
        if size.is_Integer and difference in (quotient - other, other - quotient):
            return Chunks(int(size))
    return None


def _within(kinds: set[Kind], part: Formula, elements: Elements) -> Formula:
    """What a part of the conjunction says where the documents among its other parts hold."""
    for kind in kinds:
        if isinstance(kind, Documents):
            part = between(kind, part, elements)
    return part


def _is_padding(part: Formula, elements: Elements) -> bool:
    """Whether a key is visible where an input of the graph, read at its batch and position, is not zero."""
    if not (isinstance(part, Atom) and part.relation == "!="):
        return False
    element = part.expression
    return (
        isinstance(element, AppliedUndef)
        and element.args == (BATCH, KEY)
        and elements.origin(element).node.op == "placeholder"
    )


# -- reasons -----------------------------------------------------------------------------------------------------------


def _kept(mask: fx.Node, strangers: list[Formula], elements: Elements) -> Kept:
    """The most telling reason: what the mask depends on, before any shape that has no name."""
    read_from = {u for part in strangers for u in unknowns(part)}
    if False in strangers:
        return Kept("hides every key", mask, source_line(mask))
    if not read_from:
        return Kept(f"visible where {conjunction(strangers)} is no kind of mask we know", mask, source_line(mask))
    read = min(read_from, key=lambda u: (_use(u, read_from) == "", str(u)))
    origin = elements.origin(read)
    if inputs := sorted(_inputs_behind(origin.node)):
        reason = f"depends on the input {' and '.join(inputs[:2])}{_use(read, read_from)}"
    else:
        reason = origin.reason
    return Kept(reason, origin.node, origin.source_line or source_line(mask))


def _use(element: AppliedUndef, others: set[AppliedUndef]) -> str:
    """What an unknown element is there for, judged by the indices at which it is read."""
    places = {e.args for e in others if e.func == element.func}
    if {args[-1:] for args in places} == {(QUERY,), (KEY,)}:
        return " (documents)"
    return " (padding)" if places == {(BATCH, KEY)} else ""


def _inputs_behind(node: fx.Node) -> set[str]:
    """Names of the graph's tensor inputs that a node is computed from."""
    seen, todo, names = {node}, [node], set()
    while todo:
        node = todo.pop()
        if node.op == "placeholder" and isinstance(value(node), torch.Tensor):
            names.add(input_name(node))
        todo += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return names
