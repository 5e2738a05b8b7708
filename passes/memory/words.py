"""A plan in words, and what is wrong with a budget."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from ...kernels.operator import operator_of
from ..rewrite import module_path
from .joint import Joint, is_value, maker
from .liveness import Timeline, root
from .patterns import Layer

GIB = 1 << 30


class BudgetError(ValueError):
    """The budget is below what the smallest plan needs."""


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"


def in_words(layers: Sequence[Layer], chosen: Iterable[fx.Node]) -> str:
    """What the repeated layers keep: ``keep lora_linears_2 (mlp) in 12 of 32 layers (20–31)``."""
    kept = {root(n) for n in chosen}
    homes: dict[str, list[int]] = defaultdict(list)
    seen: dict[str, int] = {}
    for i, layer in enumerate(layers):
        for position in sorted(layer.most):
            value = layer.values[position]
            label = _label(value, layer)
            seen[label] = seen.get(label, 0) + 1
            if value in kept:
                homes[label].append(i)
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for label in seen:
        groups[tuple(dict.fromkeys(homes[label]))].append(label)
    parts = []
    for where, labels in sorted(groups.items(), key=lambda item: -len(item[0])):
        names = ", ".join(labels)
        if len(where) == len(layers):
            parts.append(f"keep {names} in all {len(layers)} layers")
        elif where:
            parts.append(f"keep {names} in {len(where)} of {len(layers)} layers ({_spans(where)})")
        else:
            parts.append(f"compute {names} again")
    return "; ".join(parts)


def _label(value: fx.Node, layer: Layer) -> str:
    """``mlp: swiglu``, ``self_attn: rope.q``: the place within the layer and the operator's output."""
    operation = maker(value)
    path = module_path(operation)
    inside = re.sub(r".*?\.?\b\d+(?:\.|$)", "", path, count=1)
    name = str(getattr(operation.target, "_opname", operation.target)).lstrip("_")
    declared = operator_of(operation.target)
    if value is not operation and declared is not None:
        name = f"{name}.{declared.outputs[int(str(value.args[1]))]}"
    return f"{inside}: {name}" if inside else name


def _spans(numbers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][-1] + 1:
            spans[-1][-1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def below_floor(budget: int, timeline: Timeline, length: int | None) -> str:
    """The message for a budget that no plan meets."""
    parts: Mapping[str, int] = timeline.parts
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    told = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    message = f"memory_budget {gib(budget)} is below the floor of {gib(timeline.peak)}: {told}"
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
    """Tokens per sequence, if the graph has tokens: an integer input [batch, length]."""
    for node in joint.forward:
        if node.op == "placeholder" and is_value(node):
            value = node.meta["val"]
            if not value.dtype.is_floating_point and value.dim() == 2 and value.dtype.itemsize == 8:
                return int(value.shape[1]) if isinstance(value.shape[1], int) else None
    return None
