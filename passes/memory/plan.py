"""What is kept for backward, and what is computed again: decided over the joint graph, value by value.

A plan only names the values to keep. Two policies make one:

* ``keep``: everything that backward wants, in the fewest bytes that need no expensive operator twice. Views, casts,
  elementwise arithmetic and our memory-bound operators are repeated where their inputs are kept anyway.
* ``recompute``: only what crosses from one repeated layer to the next, and what the head needs.

Random operators are never run a second time without their seed: a recomputed dropout mask would be another mask, and
the loss would not show it.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.operator import operator_of
from ..rewrite import is_random, module_path, value

# An operator below this many FLOPs per byte moved is bound by memory, and running it again is cheap.
MEMORY_BOUND = 32
# A statistic (rstd, logsumexp) this much smaller than what its operator reads is kept rather than computed again.
STATISTIC = 16
# Longest chain of cheap operators that backward repeats to get at one value.
LONGEST_CHAIN = 24


class Tag(Enum):
    """What happens to a forward value that backward wants."""

    KEEP = "keep"
    RECOMPUTE = "recompute"


@dataclass(frozen=True)
class Plan:
    """Which values of a joint graph are kept for backward.

    Attributes:
        policy: "keep" or "recompute".
        tags: a tag per forward value that backward reads, by node name. Graph inputs are not listed: they are there.
        saved_bytes: bytes of the kept values, symbolic sizes at their hints.
        why: why this policy was chosen.
    """

    policy: str
    tags: dict[str, Tag]
    saved_bytes: int
    why: str

    @property
    def kept(self) -> list[str]:
        return [name for name, tag in self.tags.items() if tag is Tag.KEEP]

    @property
    def digest(self) -> str:
        text = ";".join(f"{name}={tag.value}" for name, tag in sorted(self.tags.items()))
        return hashlib.sha256(f"{self.policy}:{text}".encode()).hexdigest()

    def __str__(self) -> str:
        counts = Counter(tag for tag in self.tags.values())
        return (
            f"{self.policy} ({self.why}): {counts[Tag.KEEP]} values kept, {self.saved_bytes / 2**30:.2f} GiB; "
            f"{counts[Tag.RECOMPUTE]} computed again"
        )


@dataclass(frozen=True)
class Joint:
    """A joint graph seen from the memory floor: who can run in forward, and what backward reads.

    Attributes:
        forward: nodes that need no gradient from outside, in order.
        wanted: forward values that backward nodes or outputs read, in order, placeholders excluded.
    """

    graph: fx.Graph
    forward: list[fx.Node]
    wanted: list[fx.Node]


def read_joint(gm: fx.GraphModule, backward: set[fx.Node], backward_outputs: Iterable[Any]) -> Joint:
    """Split a joint graph into what forward can compute and what backward wants of it.

    Args:
        gm: the joint graph.
        backward: every node that depends on a tangent, or has to run in backward.
        backward_outputs: the joint graph's outputs that are gradients.
    """
    forward = [n for n in gm.graph.nodes if n not in backward and n.op != "output"]
    read = {i for n in backward if n.op != "output" for i in n.all_input_nodes}
    read |= {o for o in backward_outputs if isinstance(o, fx.Node)}
    wanted = [n for n in forward if n in read and is_value(n)]
    return Joint(gm.graph, forward, wanted)


def keep_plan(joint: Joint, why: str = "it fits") -> Plan:
    """Keep everything that backward wants, in the fewest bytes that need no expensive operator twice."""
    kept: set[fx.Node] = set()
    for node in joint.wanted:
        kept |= _cheapest(node, kept)
    return _plan("keep", joint, kept, why)


def recompute_plan(joint: Joint, why: str = "asked for") -> Plan:
    """Keep what crosses from one repeated layer to the next, what is random, and what the head needs."""
    layer = layers(joint.forward)
    kept = {n for n in joint.forward if is_value(n) and _must_keep(n)}
    for node in joint.forward:
        for source in map(base, node.all_input_nodes):
            crosses = node in layer and layer.get(source) != layer[node]
            if crosses and is_value(source):
                kept.add(source)
    for node in joint.wanted:
        if layer and base(node) not in layer:
            kept |= _cheapest(node, kept)
    return _plan("recompute", joint, kept, why)


def layers(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """The index of the repeated layer each node belongs to; nodes outside the layers are left out.

    Layers are the numbered children of the module container that made most of the graph.
    """
    homes = {n: found.groups() for n in nodes if (found := re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", module_path(n)))}
    sizes = Counter(container for container, _ in homes.values())
    repeated = {c for c in sizes if len({i for container, i in homes.values() if container == c}) > 1}
    if not repeated:
        return {}
    container = max(repeated, key=sizes.__getitem__)
    return {n: int(index) for n, (c, index) in homes.items() if c == container}


def _plan(policy: str, joint: Joint, kept: set[fx.Node], why: str) -> Plan:
    used = _used(joint, kept)
    tags = {n.name: Tag.KEEP for n in joint.forward if n in used}
    tags |= {n.name: Tag.RECOMPUTE for n in joint.wanted if n not in used}
    return Plan(policy, tags, sum(nbytes(n) for n in used), why)


def _used(joint: Joint, kept: set[fx.Node]) -> set[fx.Node]:
    """The kept values that backward meets when it walks back from what it wants."""
    used: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    todo = list(joint.wanted)
    while todo:
        node = todo.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        if node in kept:
            used.add(node)
        else:
            todo.extend(node.all_input_nodes)
    return used


# -- the fewest bytes that make a value available ---------------------------------------------------------------------


def _cheapest(node: fx.Node, kept: set[fx.Node], depth: int = 0) -> set[fx.Node]:
    """Values to keep beside ``kept`` so that ``node`` can be had in backward with cheap operators only."""
    if node.op == "placeholder" or node in kept or not is_value(node):
        return set()
    if _must_keep(node) or not is_cheap(node) or depth > LONGEST_CHAIN:
        return {node}
    if _is_statistic(node):
        return {node}
    sources = [s for n in _inputs(node) for s in _cheapest(n, kept, depth + 1)]
    price = sum(map(nbytes, set(sources)))
    own = nbytes(node)
    # A tie goes to the source of a view or of a single value: its bytes serve other readers too.
    tie_goes_to_source = is_view(node) or len([n for n in _inputs(node) if n.op != "placeholder"]) == 1
    return set(sources) if price < own or (price == own and tie_goes_to_source) else {node}


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The values an operator reads; an output of a tuple reads what the tuple's operator reads."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return [n for n in source.all_input_nodes if is_value(n)]


def _must_keep(node: fx.Node) -> bool:
    """Whether running the operator again would give another result."""
    maker = node.args[0] if node.target is operator.getitem else node
    assert isinstance(maker, fx.Node)
    if "inductor_random" in str(maker.target) or "inductor_lookup_seed" in str(maker.target):
        return False  # a pure function of its seed
    return is_random(maker) or "inductor_seeds" in str(maker.target) or "run_and_save_rng" in str(maker.target)


def is_cheap(node: fx.Node) -> bool:
    """Whether an operator moves bytes rather than computes: a view, a cast, elementwise, or a declared one."""
    maker = node.args[0] if node.target is operator.getitem else node
    assert isinstance(maker, fx.Node)
    if not isinstance(maker.target, torch._ops.OpOverload):
        return False
    if (declared := operator_of(maker.target)) is not None:
        arguments = [value(a) for a in maker.args]
        return hint(declared.flops(*arguments)) < MEMORY_BOUND * hint(_moved(maker))
    return is_view(maker) or torch.Tag.pointwise in maker.target.tags or maker.target in _MOVERS


_MOVERS = {
    torch.ops.aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.cat.default,
    torch.ops.aten.full.default,
    torch.ops.aten.arange.start_step,
    torch.ops.prims.iota.default,
    torch.ops.prims.inductor_lookup_seed.default,
    torch.ops.prims.inductor_random.default,
}


def is_view(node: fx.Node) -> bool:
    """Whether an operator returns its input's own bytes in another arrangement."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def base(node: fx.Node) -> fx.Node:
    """The value whose bytes a view shows."""
    while is_view(node):
        maker = node.args[0] if node.target is operator.getitem else node
        assert isinstance(maker, fx.Node)
        source = maker.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _is_statistic(node: fx.Node) -> bool:
    if node.target is not operator.getitem or is_view(node):
        return False
    return nbytes(node) * STATISTIC <= sum(nbytes(n) for n in _inputs(node))


def is_value(node: fx.Node) -> bool:
    """Whether a node is one tensor (and not a tuple, a number or a subgraph)."""
    return isinstance(node.meta.get("val"), Tensor)


def nbytes(node: fx.Node) -> int:
    """Size of a value in bytes, symbolic sizes at their hints."""
    val = node.meta["val"]
    return hint(val.numel()) * val.element_size()


def _moved(node: fx.Node) -> int:
    results = node.meta.get("val")
    values = results if isinstance(results, (tuple, list)) else [results]
    written = sum(hint(v.numel()) * v.element_size() for v in values if isinstance(v, Tensor))
    return written + sum(nbytes(n) for n in node.all_input_nodes if is_value(n))


def hint(size: Any) -> int:
    """An integer for a possibly symbolic size, without guarding on it."""
    if isinstance(size, torch.SymInt):
        known = size.node.hint
        return int(known) if known is not None else 4096
    return int(size)
