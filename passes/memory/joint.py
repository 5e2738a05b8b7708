"""What the memory floor knows about a joint graph: what backward reads, what a value costs, what may run twice."""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.operator import NAMESPACE, operator_of
from ..rewrite import is_random, module_path, value
from .norms import SPLIT
from .torch_private import optimization_hint

# An operator of ours with at most this many FLOPs per element that it writes is bound by memory, and running it again
# is cheap. An elementwise formula stays below whatever its shape; a product does so only where it is tiny.
ELEMENTWISE = 24
# A statistic (rstd, logsumexp) this much smaller than what its operator reads is kept rather than computed again.
STATISTIC = 16

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Joint:
    """A joint graph seen from the memory floor.

    Attributes:
        forward: nodes that need no gradient from outside, in order. Some of them (``pow``'s derivative, a weight
            dequantised for backward) come from backward formulas; where they run is for the plan to say.
        needed: those that forward has to run for its own outputs.
        wanted: forward values that backward nodes or outputs read, in order, graph inputs excluded.
        mutated: graph inputs that forward overwrites: in backward they hold something else.
        copies: nodes that backward alone runs, each with the one of forward that it is a copy of (spans.py).
        early: what a layer's residual is computed again by, in the turn of the layer above; copies are for its own.
    """

    graph: fx.Graph
    forward: list[fx.Node]
    needed: frozenset[fx.Node]
    wanted: list[fx.Node]
    mutated: frozenset[fx.Node]
    copies: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    early: frozenset[fx.Node] = frozenset()

    @functools.cached_property
    def forward_set(self) -> frozenset[fx.Node]:
        return frozenset(self.forward)


def read_joint(
    gm: fx.GraphModule,
    backward: Collection[fx.Node],
    needed: Iterable[fx.Node],
    gradients: Iterable[Any],
    mutated: Iterable[fx.Node] = (),
) -> Joint:
    """Split a joint graph into what forward can compute and what backward wants of it.

    Args:
        gm: the joint graph.
        backward: every node that depends on a tangent, or has to run in backward.
        needed: every node that the outputs of forward are computed from.
        gradients: the joint graph's outputs that backward returns.
        mutated: graph inputs that are overwritten after forward, beside those that operators in the graph overwrite.
    """
    forward = [n for n in gm.graph.nodes if n not in backward and n.op != "output"]
    read = {i for n in backward if n.op != "output" for i in n.all_input_nodes}
    read |= {o for o in gradients if isinstance(o, fx.Node)}
    wanted = [n for n in forward if n in read and is_value(n) and not is_free(n)]
    overwritten = {base(a) for n in forward for a in _written(n)}
    return Joint(gm.graph, forward, frozenset(needed), wanted, frozenset({*overwritten, *mutated}))


def layers(joint: Joint) -> dict[fx.Node, tuple[str, int]]:
    """The repeated layer that made each node of forward, as (container, index); nodes outside of layers are left out.

    A layer is a numbered child of a module that has several (``model.layers``, ``visual.blocks``); the outermost one
    counts, so an expert within a layer is no layer. What backward formulas brought belongs where its inputs do.
    """
    numbered = r"(.*?)(?:^|\.)(\d+)(?:\.|$)"
    homes = {n: found.groups() for n in joint.needed if (found := re.match(numbered, module_path(n)))}
    children = Counter(container for container, _ in set(homes.values()))
    layer = {n: (container, int(index)) for n, (container, index) in homes.items() if children[container] > 1}
    for node in joint.forward:
        if node in joint.copies:
            if joint.copies[node] in layer:
                layer[node] = layer[joint.copies[node]]
        elif maker(node) in joint.needed:
            if maker(node) in layer:
                layer[node] = layer[maker(node)]
        elif inherited := [layer[n] for n in node.all_input_nodes if n in layer]:
            layer[node] = inherited[0]
    for node in joint.forward:
        if SPLIT in node.meta and node.target is operator.getitem and node not in joint.copies:
            # The norm after a layer's last sum is the next layer's, so that the sum alone crosses the border.
            reader = next((u for u in node.users if u in joint.needed), None)
            for part in (node, maker(node)):
                layer.pop(part, None)
                if reader in layer:
                    layer[part] = layer[reader]
    layer |= {copy: layer[node] for copy, node in joint.copies.items() if node in layer}
    return layer


def tokens(joint: Joint) -> tuple[int | torch.SymInt, int | torch.SymInt] | None:
    """Sequences and tokens in each: of an integer input [batch, length]; None where there is none."""
    for node in joint.forward:
        if node.op == "placeholder" and is_value(node):
            value = node.meta["val"]
            if not value.dtype.is_floating_point and value.dim() == 2 and value.dtype.itemsize == 8:
                return value.shape[0], value.shape[1]
    return None


# -- what a node is ----------------------------------------------------------------------------------------------------


def is_value(node: fx.Node) -> bool:
    """Whether a node is one tensor (and not a tuple, a number or a subgraph)."""
    return isinstance(node.meta.get("val"), Tensor)


def is_free(node: fx.Node) -> bool:
    """Whether backward has a value anyway: graph inputs and constants."""
    return node.op in ("placeholder", "get_attr")


def maker(node: fx.Node) -> fx.Node:
    """The operator behind a value: the node itself, or the one whose tuple it is taken from."""
    while node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that the operator behind a value reads."""
    return [n for n in maker(node).all_input_nodes if is_value(n)]


def is_view(node: fx.Node) -> bool:
    """Whether a value is its operator's input in another arrangement."""
    target = maker(node).target
    return isinstance(target, torch._ops.OpOverload) and _shows_its_input(target)


@functools.cache
def _shows_its_input(target: torch._ops.OpOverload) -> bool:
    return not target._schema.is_mutable and any(r.alias_info is not None for r in target._schema.returns)


def base(node: fx.Node) -> fx.Node:
    """The value whose bytes a view shows."""
    while is_view(node):
        source = maker(node).args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def is_statistic(node: fx.Node) -> bool:
    """Whether a value is one output of several, and tiny beside what its operator reads."""
    if node.target is not operator.getitem or is_view(node):
        return False
    return nbytes(node) * STATISTIC <= sum(map(nbytes, inputs(node)))


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator overwrites."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    named = zip(node.target._schema.arguments, node.args, strict=False)
    given = [(a, v) for a, v in named] + [(a, node.kwargs.get(a.name)) for a in node.target._schema.arguments]
    return [v for a, v in given if isinstance(v, fx.Node) and a.alias_info is not None and a.alias_info.is_write]


# -- what may run twice, and what that costs ---------------------------------------------------------------------------


def is_repeatable(node: fx.Node, joint: Joint) -> bool:
    """Whether backward may compute a value at little cost: by a cheap operator, or one that forward does not run."""
    return not is_pinned(node, joint) and (is_cheap(node) or maker(node) not in joint.needed)


def is_pinned(node: fx.Node, joint: Joint) -> bool:
    """Whether running a value's operator again could give another value, so that it is kept or backward is wrong.

    That is so for random operators, for those we know nothing about, where an input was overwritten meanwhile, and
    for choices (top-k, sort): made again from numbers that round differently, they could choose differently.
    """
    operation = maker(node)
    if is_free(node) or is_view(node):
        return False
    # Inductor's ``inductor_random`` is a pure function of its seed; ``inductor_seeds`` is random.
    if _is_bound_to_forward(operation) or is_random(operation) or any(base(n) in joint.mutated for n in inputs(node)):
        return True
    return operation in joint.needed and (not _is_known(operation.target) or _is_choice(node))


def is_cheap(node: fx.Node) -> bool:
    """Whether the operator behind a value moves bytes rather than computes: elementwise, a copy, a lookup."""
    operation = maker(node)
    if not isinstance(operation.target, torch._ops.OpOverload):
        return False
    if (declared := operator_of(operation.target)) is not None:
        results = operation.meta.get("val")
        written = [v for v in (results if isinstance(results, (tuple, list)) else [results]) if isinstance(v, Tensor)]
        flops = declared.flops(*map(value, operation.args))
        return hint(flops) <= ELEMENTWISE * sum(hint(v.numel()) for v in written)
    if operation.target.overloadpacket in MOVERS or torch.Tag.pointwise in operation.target.tags:
        return True
    return unpacks(operation.target)


MOVERS = {
    *(aten._to_copy, aten.clone, aten._unsafe_view, aten.cat, aten.repeat, aten.flip, aten.roll, aten.tril, aten.triu),
    *(aten.embedding, aten.index, aten.index_select, aten.gather, aten.constant_pad_nd, aten.slice_scatter),
    *(aten.select_scatter, aten.full, aten.full_like, aten.arange, aten.scalar_tensor, aten.lift_fresh_copy),
    *(aten.zeros, aten.ones, aten.zeros_like, aten.ones_like, aten.new_zeros, aten.new_ones, aten.new_full),
    *(prims.convert_element_type, prims.iota),
    *(prims.inductor_lookup_seed, prims.inductor_random, prims.inductor_randint),
}

# Libraries whose operators are random only where they say so. Others may not: an untagged random operator that runs
# again gives wrong gradients beside the right loss.
_KNOWN = {"aten", "prims", NAMESPACE, "bitsandbytes", "torchao"}
_KNOWN_HIGHER_ORDER = {"flex_attention", "triton_kernel_wrapper_functional"}


def _is_known(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _KNOWN or unpacks(target)
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _KNOWN_HIGHER_ORDER


def unpacks(target: Any) -> bool:
    """Whether an operator is a dequantisation, ours or a library's: keeping what it unpacked would undo the packing."""
    return isinstance(target, torch._ops.OpOverload) and "dequantize" in target._opname


def _is_choice(node: fx.Node) -> bool:
    """Whether an operator picked integers by looking at real numbers."""
    real = [n.meta["val"].dtype.is_floating_point for n in (node, *inputs(node))]
    return not real[0] and any(real[1:]) and not is_cheap(node)


def _is_bound_to_forward(node: fx.Node) -> bool:
    mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return mutable or node.meta.get("partitioner_tag") == "must_be_in_forward"


# -- sizes -------------------------------------------------------------------------------------------------------------


def nbytes(node: fx.Node) -> int:
    """Size of a value in bytes, symbolic sizes at their hints."""
    val = node.meta["val"]
    return hint(val.numel()) * val.element_size()


def hint(size: Any) -> int:
    """An integer for a possibly symbolic size, without guarding on it."""
    return optimization_hint(size, fallback=4096)
