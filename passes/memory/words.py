"""A plan in words, and what is wrong with a budget."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

from torch import fx

from ...kernels.operator import operator_of
from ..rewrite import module_path
from .joint import Joint, maker, tokens
from .patterns import Layer
from .timeline import Timeline

GIB = 1 << 30
EVERY_SECOND = 4
"""More numbers than these are not listed one by one where they are every second one."""


class BudgetError(ValueError):
    """The budget is below what the smallest plan needs."""


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def in_words(
    layers: Sequence[Layer], kept: Sequence[Collection[fx.Node]], away: Sequence[int] = (), inner: Sequence[int] = ()
) -> str:
    """What the repeated layers keep: ``mlp.gate_proj.y1 kept in 12 of 32 layers (20–31); the rest kept``.

    Args:
        kept: per layer what it keeps. Values that fewer than half of the layers have are left out.
        away: the layers whose residual, what they hand on to the next one, waits in host memory.
        inner: the layers whose residual is computed again, from the one before, which so spans two layers.
    """
    told = [_in_words(layers, kept)]
    if away:
        told.append(f"offload residuals of {len(away)} of {len(layers)} layers ({_spans(away)})")
    if inner:
        told.append(
            f"compute residuals of {len(inner)} of {len(layers)} layers ({_spans(inner)}) again, each from the one "
            "before, which spans two layers"
        )
    return "; ".join(filter(None, told))


def _in_words(layers: Sequence[Layer], kept: Sequence[Collection[fx.Node]]) -> str:
    homes: dict[str, list[int]] = defaultdict(list)
    where: dict[str, list[int]] = defaultdict(list)
    for i, (layer, chosen) in enumerate(zip(layers, kept, strict=True)):
        for position, label in _labels(layer).items():
            if position not in layer.must:
                homes[label].append(i)
            if layer.values[position] in chosen:
                where[label].append(i)
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for label, there in homes.items():
        if 2 * len(there) >= len(layers):
            groups[tuple(i for i in where[label] if i in there)].append(label)
    count = len(layers)
    full = [g for g in groups if len(g) >= count - 1]
    parts = []
    for group, labels in sorted(groups.items(), key=lambda item: -len(item[0])):
        if group in full:
            continue
        names = ", ".join(labels)
        told = f"kept in {len(group)} of {count} layers ({_spans(group)})" if group else "computed again in every layer"
        parts.append(f"{names} {told}")
    if not count or not groups:
        return ""
    if not parts:
        return f"all {count} layers keep everything that backward wants"
    return "; ".join([*parts, *(["all else kept"] if full else ["layers keep their inputs"])])


def _labels(layer: Layer) -> dict[int, str]:
    """A name for each value that a plan may keep, by its position; the second of one name has a number."""
    seen: Counter[str] = Counter()
    labels = {}
    for position in sorted(layer.most):
        label = _label(layer.values[position], layer)
        seen[label] += 1
        labels[position] = label if seen[label] == 1 else f"{label} {seen[label]}"
    return labels


def sliced_in_words(operations: Iterable[fx.Node], layers: Sequence[int], count: int, rows: int) -> str:
    """``mlp of 32 of 32 layers (0–31) in slices of 2,048 tokens``.

    Args:
        operations: those whose results are too wide.
        layers: those that have them.
        count: of all layers.
        rows: tokens in a slice, about.
    """
    places = [_inside(op).split(".") for op in operations]
    common = [part for part, *others in zip(*places, strict=False) if all(part == other for other in others)]
    what = ".".join(common) or "the widest values"
    return (
        f"{what} of {len(layers)} of {count} layers ({_spans(layers)}) in slices of {rows:,} tokens, whose sums round "
        "in another order"
    )


def _inside(operation: fx.Node) -> str:
    """The module of an operator, within its layer."""
    return re.sub(r".*?\.?\b\d+(?:\.|$)", "", module_path(operation), count=1)


def _label(value: fx.Node, layer: Layer) -> str:
    """``mlp.gate_proj.y1``: the place within the layer, and which of an operator's outputs."""
    operation = maker(value)
    inside = _inside(operation)
    name = str(getattr(operation.target, "_opname", operation.target)).lstrip("_")
    declared = operator_of(operation.target)
    if declared is not None and value is not operation:
        output = declared.outputs[int(str(value.args[1]))]
        return f"{inside}.{output}" if inside else f"{name}.{output}"
    return inside or name


def _spans(numbers: Sequence[int]) -> str:
    """``0–3, 7``, and ``1, 3, … 9`` for every second one."""
    if len(numbers) > EVERY_SECOND and all(b - a == 2 for a, b in pairwise(numbers)):
        return f"{numbers[0]}, {numbers[1]}, … {numbers[-1]}"
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][-1] + 1:
            spans[-1][-1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def below_floor(budget: int, timeline: Timeline, length: int | None, in_one_piece: str = "") -> str:
    """The message for a budget that no plan meets.

    Args:
        in_one_piece: why layers' widest values could not be made in slices of tokens, if they could not.
    """
    parts: Mapping[str, int] = timeline.parts
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    told = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    message = f"memory_budget {gib(budget)} is below the floor of {gib(timeline.peak)}: {told}"
    if in_one_piece:
        message = f"{message}; layers' widest values are made for all tokens at once, because {in_one_piece}"
    fits = length_that_fits(budget, timeline, length)
    if fits is None:
        return message
    if fits < 1:
        return f"{message}; no sequence is short enough"
    return f"{message}; sequences of about {fits} tokens would fit, in place of {length}"


def length_that_fits(budget: int, timeline: Timeline, length: int | None) -> int | None:
    """Tokens per sequence whose floor is within the budget: what is kept and worked with grows with them.

    A workspace that does not makes the answer too small, which is the safe side.
    """
    if length is None:
        return None
    parts = timeline.parts
    grows = parts["kept for backward"] + parts["working"] - timeline.standing.library
    return int(length * max(0.0, budget - (timeline.peak - grows)) / grows) if grows > 0 else None


def sequence_length(joint: Joint) -> int | None:
    """Tokens per sequence, if the graph has tokens and one length."""
    _, length = tokens(joint) or (None, None)
    return length if isinstance(length, int) else None


def tokens_within(budget: int, timeline: Timeline, count: int) -> int:
    """Tokens up to which a plan that was made for ``count`` is within a budget; at least so many.

    Gradients stay as they are; what a step holds beside them, and beside what is there all the time, grows no faster
    than the tokens do.
    """
    moments = zip(timeline.gradients, timeline.kept, timeline.working, strict=True)
    room = budget - timeline.standing.total
    shares = [(room - gradients) / (kept + working) for gradients, kept, working in moments if kept + working > 0]
    return max(count, int(count * min(shares, default=1)))
