"""Attention written out as softmax(q kT * scale + mask) v, with sinks in the two ways that models write them.

What a formula finds, :class:`Parts`, is what PyTorch's own attention would be called with; what becomes of it is the
business of :mod:`attention`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..pattern import Attempt, Found, Pattern, capture, cast, describe, function, is_cast, number
from ..rewrite import Call, Miss, value
from ..search import search
from ..soundness import same_sizes
from ..vocabulary import cat, sigmoid, tanh, unsqueeze, view
from .elements import Elements
from .indexing import arguments, inside, operand_of, same, shape_of
from .values import HIDDEN, Unknown

aten = torch.ops.aten


@dataclass(frozen=True)
class Parts:
    """One attention.

    Attributes:
        node: what computes its result.
        interior: the nodes that the formula consumed, ``node`` included.
        mask: boolean, or added to the scores, or None; a call where it is still to be made of several.
        sinks: [heads], or None.
        cap: of the scores, which are cap tanh(scores / cap) before the mask is added, or None.
        variant: which spelling it was.
    """

    node: fx.Node
    interior: frozenset[fx.Node]
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    mask: fx.Node | Call | None
    sinks: fx.Node | None
    variant: str
    cap: float | None = None


# -- words -------------------------------------------------------------------------------------------------------------


def _swaps_last_two(node: fx.Node, rest: dict[str, Any]) -> str | None:
    rank = value(node).dim()
    swapped = {d % rank for d in (rest["dim0"], rest["dim1"])} == {rank - 1, rank - 2}
    return None if swapped else "the keys are not transposed in their last two dimensions"


def _over_keys(node: fx.Node, rest: dict[str, Any]) -> str | None:
    dims = rest["dim"] if isinstance(rest["dim"], (list, tuple)) else [rest["dim"]]
    alone = [d % value(node.args[0]).dim() for d in dims] == [value(node.args[0]).dim() - 1]
    return None if alone else f"the {describe(node)} is not over the keys alone"


def _one_batch_of_heads(node: fx.Node, found: Found) -> str | None:
    """Of a product [batch * heads, queries, keys]: whether its views of q and k only merge their first two dimensions.

    The scores then are a view of it that splits them again: :func:`_attends` asks for no other shape.
    """
    for name, batched in (("q", node.args[1]), ("k", node.args[2].args[0])):  # type: ignore[union-attr]
        (batch, heads, *rest), merged = value(found[name]).shape, value(batched).shape
        if not same_sizes(merged, (batch * heads, *rest)):
            return f"{name} is not a batch of heads"
    return None


def _any(node: fx.Node, rest: dict[str, Any]) -> None:
    return None  # asked by `_attends`, when all of the formula is there: the reason is worth more then


class _Values(Pattern):
    """The values of ``max``, which returns their positions as well."""

    def __init__(self, inner: Pattern) -> None:
        self.inner, self.size = inner, 1 + inner.size

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
            return self.inner.match(node.args[0], found.through(node), attempt)
        return attempt.dead_end(f"expected the values of max, found {describe(node)}", node, found)


matmul = function("matmul", aten.matmul.default)
baddbmm = function("baddbmm", aten.baddbmm.default)
zeros = function("zeros", aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default, check=_any)
transposed = function("transpose", aten.transpose.int, check=_swaps_last_two)
softmax = function("softmax", aten.softmax.int, check=_over_keys)
masked_fill = function("masked_fill", aten.masked_fill.Scalar)
where = function("where", aten.where.self, aten.where.ScalarOther)
logsumexp = function("logsumexp", aten.logsumexp.default, check=_over_keys)
dropout = function("dropout", aten.dropout.default, check=_any)
all_but_the_last = function("slice", aten.slice.Tensor, check=_any)
amax = function("amax", aten.amax.default, check=_over_keys)
_max = function("max", aten.max.dim, check=_over_keys)


def largest(x: Pattern) -> Pattern:
    """The largest of the last dimension, which stays."""
    return _Values(_max(x)) | amax(x)


# -- the formulas ------------------------------------------------------------------------------------------------------


def _attends(node: fx.Node, found: Found) -> str | None:
    """What the formula leaves open: shapes, what is dropped or cut off, and where a sink comes from."""
    for inner in found.interior:
        given = arguments(inner) if inner.target in (aten.dropout.default, aten.slice.Tensor) else {}
        if given.get("train") and given["p"] != 0.0:
            return f"attention weights are dropped with probability {given['p']}"
        if inner.target is aten.slice.Tensor and not _leaves_out_the_last(inner, given):
            return "the slice does not leave out the last column alone"
    if any(value(found[name]).dim() != 4 for name in ("q", "k", "v")):
        return "q, k and v are not [batch, heads, length, width]"
    if "column" in found.captures and _per_head(found["column"]) is None:
        return "the sinks are no number per head"
    if not all(isinstance(found.captures.get(name, 1.0), (int, float)) for name in _NUMBERS):
        return "the scale is not known when compiling"
    return None


_NUMBERS = ("scale", "divisor", "uncapped", "inverse", "cap")


def _hides(node: fx.Node, found: Found) -> str | None:
    """Whether the number that stands where scores are hidden does hide them, whatever is added to it."""
    low = found.captures.get("low")
    if low is None:
        try:
            low = Elements({}).at(found["lowest"], ()) if value(found["lowest"]).dim() == 0 else None
        except Unknown:
            low = None
    hides = isinstance(low, (int, float)) and not isinstance(low, bool) and low <= HIDDEN
    return None if hides else f"{'what stands for a score' if low is None else low} does not hide it"


def _explicit(found: Found) -> fx.Node | Call | None:
    """What is added to the scores, where parts of it stand instead of them."""
    captures = found.captures
    if "hidden" not in captures and "seen" not in captures:
        return captures.get("mask")
    places, dtype = captures.get("hidden", captures.get("seen")), value(found["q"]).dtype
    bias = captures.get("bias") or Call(aten.zeros_like.default, (places,), {"dtype": dtype}, shared=True)
    if "hidden" in captures:
        mask = Call(aten.masked_fill.Scalar, (bias, places, captures["low"]), shared=True)
    elif "low" in captures:
        mask = Call(aten.where.ScalarOther, (places, bias, captures["low"]), shared=True)
    else:
        mask = Call(aten.where.self, (places, bias, captures["lowest"]), shared=True)
    return mask if "mask" not in captures else Call(aten.add.Tensor, (mask, captures["mask"]), shared=True)


def _leaves_out_the_last(node: fx.Node, given: dict[str, Any]) -> bool:
    whole, end = value(given["self"]).shape, value(given["end"])
    if given["dim"] % len(whole) != len(whole) - 1 or given["step"] != 1 or given["start"] not in (None, 0):
        return False
    return end is not None and (end == -1 or statically_known_true(end == whole[-1] - 1))


def weighted(probabilities: Pattern) -> Pattern:
    """Probabilities times values."""
    return matmul(cast(dropout(cast(probabilities)) | cast(probabilities)), capture("v"))


def stable_softmax(x: Pattern) -> Pattern:
    """The softmax, whether or not the largest score was subtracted before; it does so itself."""
    return softmax(cast(x - largest(x)) | cast(x))


product = cast(matmul(capture("q"), transposed(capture("k"))))
added_to_zeros = view(
    baddbmm(zeros(), view(capture("q")), transposed(view(capture("k"))), 1, number("scale")).where(_one_batch_of_heads)
)
scaled = product * number("scale") | product / number("divisor") | product | cast(added_to_zeros)
scores = capture("scores", cast(scaled) + capture("mask") | cast(scaled))
biased = cast(cast(scaled) + capture("bias") | cast(scaled))
lowest = number("low") | capture("lowest")
filled = masked_fill(biased, capture("hidden"), number("low")) | where(capture("seen"), biased, lowest)
joined = capture("joined", cat(cast(scores), capture("column")))
above_the_sink = cast(unsqueeze(sigmoid(cast(logsumexp(cast(scores))) - capture("column")), -1))

_squashed = cast(tanh(cast(scaled / number("uncapped") | scaled * number("inverse")))) * number("cap")
capped = cast(_squashed) + capture("mask") | _squashed

ATTENTION = {
    "a sink as a column": weighted(all_but_the_last(cast(stable_softmax(joined)))).where(_attends),
    "a sink as a factor": (cast(weighted(stable_softmax(scores))) * above_the_sink).where(_attends),
    "written out": weighted(stable_softmax(scores)).where(_attends),
    "capped by tanh": weighted(stable_softmax(cast(capped))).where(_attends),
    "filled in": weighted(stable_softmax(cast(filled) + capture("mask") | filled)).where(_attends).where(_hides),
}


def find(graph: fx.Graph) -> Iterator[Parts | Miss]:
    """Attentions that are written out, and what is nearly one."""
    heart = frozenset({aten.softmax.int})
    for result in search(graph, ATTENTION, heart=heart, close=2):
        yield result if isinstance(result, Miss) else _parts(*result)


def _parts(node: fx.Node, found: Found) -> Parts:
    captures = found.captures
    scale = 1.0 / captures["divisor"] if "divisor" in captures else float(captures.get("scale", 1.0))
    column, cap = captures.get("column"), captures.get("cap")
    if cap is not None:  # tanh of the scores over the cap, in whatever way that is written
        scale *= cap * (captures["inverse"] if "inverse" in captures else 1.0 / captures["uncapped"])
    return Parts(
        node=node,
        interior=found.interior,
        q=found["q"],
        k=found["k"],
        v=found["v"],
        scale=scale,
        mask=_explicit(found),
        sinks=None if column is None else _per_head(column),
        variant=found.variant,
        cap=None if cap is None else float(cap),
    )


_INDEX = sympy.symbols("batch head query key", integer=True, nonnegative=True)


def _per_head(column: fx.Node) -> fx.Node | None:
    """The numbers [heads] of which a column of scores (or [batch, heads, queries]) repeats each for its head."""
    node, index = column, inside(shape_of(column), _INDEX[: value(column).dim()])
    heads, found = index[1], None
    while True:
        if index == (heads,) and same(shape_of(node)[0], shape_of(column)[1]):
            found = node  # and further up: there may be conversions
        if is_cast(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        elif (source := operand_of(node, index)) is not None:
            node, index = source
        else:
            return found
