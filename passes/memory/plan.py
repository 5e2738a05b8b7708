"""What is kept for backward, and what is computed again: decided over the joint graph, value by value.

A plan only names the values to keep. Two policies make one:

* ``keep``: everything that backward wants, in the fewest bytes that need no expensive operator twice. Views, casts,
  elementwise arithmetic and our memory-bound operators are repeated where their inputs are kept anyway.
* ``recompute``: only what crosses the border of a repeated layer, and what the rest (the head) needs.

Random operators are never run a second time without their seed: a recomputed dropout mask would be another mask, and
the loss would not show it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import fx

from .joint import (
    Joint,
    base,
    inputs,
    is_free,
    is_pinned,
    is_repeatable,
    is_statistic,
    is_value,
    is_view,
    layers,
    maker,
    nbytes,
)

# Longest chain of cheap operators that backward repeats to get at one value.
LONGEST_CHAIN = 24


class Tag(Enum):
    """What happens to a forward value that backward needs."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"


@dataclass(frozen=True)
class Plan:
    """Which values of a joint graph are kept for backward.

    Attributes:
        policy: "keep", "recompute", or "mixed": some layers keep what others compute again.
        tags: a tag per forward value that backward needs, by node name. Graph inputs and views are not listed: the
            former are there anyway, the latter are what their base is.
        saved_bytes: bytes of the kept values, symbolic sizes at their hints.
        host_bytes: bytes of the offloaded values.
        why: why this policy was chosen.
        peak_bytes: of the whole step, predicted; 0 where nobody asked.
        seconds: what computing again adds to the step, and waiting for the link to the host; predicted.
        parts: the peak by category.
        words: what is kept and what is not, for people.
        rows: tokens that the stretches are run on at a time; 0 where nothing is run in slices.
        stretches: of forward and of backward, the operators of each stretch that is run in slices, by node name.
        inner: residuals that are computed again from the one before, by node name; others then span two layers.
    """

    policy: str
    tags: dict[str, Tag]
    saved_bytes: int
    why: str
    peak_bytes: int = 0
    seconds: float = 0.0
    parts: Mapping[str, int] = field(default_factory=dict)
    words: str = ""
    host_bytes: int = 0
    note: str = ""
    tokens: int = 0
    limit: int = 0
    rows: int = 0
    stretches: tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]] = ((), ())
    inner: tuple[str, ...] = ()

    @property
    def kept(self) -> list[str]:
        return [name for name, tag in self.tags.items() if tag is Tag.KEEP]

    @property
    def recomputed(self) -> list[str]:
        return [name for name, tag in self.tags.items() if tag is Tag.RECOMPUTE]

    @property
    def offloaded(self) -> list[str]:
        """What waits in host memory for backward."""
        return [name for name, tag in self.tags.items() if tag is Tag.OFFLOAD]

    @property
    def saved(self) -> list[str]:
        """What forward hands to backward: what is kept, and what is offloaded."""
        return [name for name, tag in self.tags.items() if tag is not Tag.RECOMPUTE]

    @property
    def digest(self) -> str:
        text = ";".join(f"{name}={tag.value}" for name, tag in sorted(self.tags.items()))
        return hashlib.sha256(f"{self.policy}:{text}:{self.rows}:{self.stretches}:{self.inner}".encode()).hexdigest()

    def __str__(self) -> str:
        text = (
            f"{self.policy} ({self.why}): {len(self.kept)} values kept, {self.saved_bytes / 2**30:.2f} GiB; "
            f"{len(self.recomputed)} computed again"
        )
        if self.offloaded:
            text += f", {len(self.offloaded)} offloaded ({self.host_bytes / 2**30:.2f} GiB)"
        if self.peak_bytes:
            text += f"; peak {self.peak_bytes / 2**30:.2f} GiB, {self.seconds * 1e3:.1f} ms of computing again"
        return "\n".join(filter(None, (text, self.words, self.note)))


def keep_plan(joint: Joint, why: str = "it fits") -> Plan:
    """Keep everything that backward wants, in the fewest bytes that need no expensive operator twice."""
    kept = _fewest_bytes(joint, joint.wanted, set(), lambda n: is_repeatable(n, joint))
    return plan_of("keep", joint, kept, why)


def recompute_plan(joint: Joint, why: str = "asked for") -> Plan:
    """Keep what crosses the border of a repeated layer and what a second run would not give again.

    Outside the layers, and where there are none, the plan is that of :func:`keep_plan`.
    """
    layer = layers(joint)
    if not layer:
        why = f"{why}; but no repeated layers found"
    crossing = {
        source
        for node in joint.forward
        if node in joint.needed
        for source in map(base, node.all_input_nodes)
        if is_value(source) and layer.get(source) != layer.get(node)
    }
    wanted = [n for n in joint.wanted if base(n) not in layer]
    pinned = {n for n in joint.forward if n in layer and is_value(n) and is_pinned(n, joint)}
    kept = _fewest_bytes(joint, [*wanted, *crossing], pinned, lambda n: n not in layer and is_repeatable(n, joint))
    return plan_of("recompute", joint, kept, why)


def plan_of(policy: str, joint: Joint, kept: set[fx.Node], why: str) -> Plan:
    """Tag what backward meets when it walks back from what it wants, stopping at kept values."""
    tags: dict[fx.Node, Tag] = {}
    todo = list(joint.wanted)
    while todo:
        node = base(todo.pop())
        if node in tags or is_free(node) or not is_value(node):
            continue
        tags[node] = Tag.KEEP if node in kept else Tag.RECOMPUTE
        if node not in kept:
            assert not is_pinned(node, joint), f"{node.name} must not run again, and is not kept"
            todo.extend(inputs(node))
    names = {n.name: tags[n] for n in joint.forward if n in tags}
    return Plan(policy, names, sum(nbytes(n) for n, tag in tags.items() if tag is Tag.KEEP), why)


# -- the fewest bytes --------------------------------------------------------------------------------------------------


def _fewest_bytes(
    joint: Joint, wanted: Iterable[fx.Node], pinned: set[fx.Node], repeatable: Callable[[fx.Node], bool]
) -> set[fx.Node]:
    """What to keep, ``pinned`` included, so that the wanted values can be had with repeatable operators only.

    Greedy, twice: the second time with an eye to what the first would have kept later on (``v`` keeps all of a fused
    ``qkv``, so that ``q`` is free), and to sources that several values share.
    """
    search = _Search(joint, {base(n) for n in wanted}, pinned, repeatable)
    first = search.run(expected=set())
    second = search.run(expected=first | search.worth_sharing(first))
    return min(first, second, key=lambda kept: sum(search.size[n] for n in kept - pinned))


class _Search:
    def __init__(
        self, joint: Joint, wanted: set[fx.Node], pinned: set[fx.Node], repeatable: Callable[[fx.Node], bool]
    ) -> None:
        self.joint, self.wanted, self.pinned = joint, wanted, pinned
        self.values = [n for n in joint.forward if is_value(n) and not is_free(n) and not is_view(n)]
        self.size = {n: nbytes(n) for n in self.values}
        self.read = {n: [s for s in map(base, inputs(n)) if not is_free(s)] for n in self.values}
        self.repeatable = {n for n in self.values if n not in pinned and repeatable(n) and not is_statistic(n)}
        self.sources: dict[fx.Node, frozenset[fx.Node]] = {}
        self.declined: dict[fx.Node, frozenset[fx.Node]] = {}

    def run(self, expected: set[fx.Node]) -> set[fx.Node]:
        """One greedy walk in graph order.

        The sources of a value are the kept or unrepeatable values that it is computed from through repeatable
        operators. It is computed again where that adds fewer bytes than it has itself: where its sources are kept
        anyway, or are smaller.

        Args:
            expected: values to take for kept before the walk gets there.
        """
        kept, chain = set(self.pinned), dict.fromkeys(self.values, 0)
        self.sources, self.declined = {n: frozenset({n}) for n in self.values}, {}
        for node in self.values:
            if node in self.repeatable:
                origin = frozenset().union(*(self.sources[s] for s in self.read[node]))
                length = 1 + max((chain[s] for s in self.read[node]), default=0)
                price = self.bytes(origin - kept - expected)
                # A tie between one value and another goes to the earlier one, whose bytes serve other readers too.
                cheaper = price < self.size[node] or (price == self.size[node] and len(origin) == 1)
                if cheaper and length <= LONGEST_CHAIN:
                    self.sources[node], chain[node] = origin, length
                else:
                    self.declined[node] = origin
            if node in self.wanted:
                kept |= self.sources[node]
        return self.without_idle_repeats(kept)

    def worth_sharing(self, kept: set[fx.Node]) -> set[fx.Node]:
        """Sources that are smaller than all the kept values together which they would make superfluous."""
        spared: Counter[fx.Node] = Counter()
        for node, origin in self.declined.items():
            missing = origin - kept
            if node in kept and len(missing) == 1:
                spared[next(iter(missing))] += self.size[node]
        return {source for source, size in spared.items() if size > self.size[source]}

    def without_idle_repeats(self, kept: set[fx.Node]) -> set[fx.Node]:
        """Keep a wanted value itself where its sources serve nothing else and are no smaller."""
        again = [n for n in self.values if n in self.wanted and n not in kept]
        readers = Counter(s for n in again for s in self.sources[n])
        for node in again:
            idle = {s for s in self.sources[node] if readers[s] == 1 and s not in self.wanted and s not in self.pinned}
            gain = self.bytes(idle) - self.size[node]
            if gain > 0 or (gain == 0 and maker(node) in self.joint.needed):
                kept = (kept - idle) | {node}
        return kept

    def bytes(self, nodes: Iterable[fx.Node]) -> int:
        return sum(self.size[n] for n in nodes)
