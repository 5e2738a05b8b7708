"""The private parts of PyTorch's partitioner that ours stands on, in one place.

They exist from torch 2.11 to 2.15; ``tests/memory`` fails loudly when one is gone or takes other arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._functorch import compile_utils, partitioners
from torch._functorch import config as functorch_config
from torch.fx.experimental import symbolic_shapes

PARTS = {
    "classify_nodes": partitioners,
    "_extract_fwd_bwd_outputs": partitioners,
    "_extract_fwd_bwd_modules": partitioners,
    "reordering_to_mimic_autograd_engine": partitioners,
    "raise_getitems": partitioners,
    "thread_graphsafe_rng_from_hops": partitioners,
    "is_not_collective": partitioners,
    "is_sym_node": partitioners,
    "fx_graph_cse": compile_utils,
}
"""What is used, and where it lives."""


def tidy(gm: fx.GraphModule) -> None:
    """Drop what nobody reads and merge what is computed twice, as PyTorch's partition does first."""
    gm.graph.eliminate_dead_code()
    gm.graph = compile_utils.fx_graph_cse(gm.graph) if functorch_config.cse else gm.graph


class Sides(NamedTuple):
    """Who belongs where in a joint graph."""

    backward: Collection[fx.Node]
    """What depends on a tangent, or must run in backward."""
    needed: Collection[fx.Node]
    """What the outputs of forward are computed from."""
    gradients: list[Any]
    """The joint graph's outputs that backward returns."""
    long_lived: Any
    """Inputs that outlive the graph."""


def sides(gm: fx.GraphModule, static_lifetime_input_indices: list[int] | None, num_fwd_outputs: int) -> Sides:
    """Tell forward from backward in a joint graph."""
    info = partitioners.classify_nodes(gm, static_lifetime_input_indices or [], num_fwd_outputs)
    _, gradients, *_ = partitioners._extract_fwd_bwd_outputs(gm, num_fwd_outputs=num_fwd_outputs)
    return Sides(info.tangents_closure, info.required_fw_nodes, gradients, info.static_lifetime_input_nodes)


def inputs_mutated_outside(gm: fx.GraphModule) -> list[fx.Node]:
    """The inputs that the runtime overwrites after forward with one of its outputs."""
    (output,) = gm.graph.find_nodes(op="output")
    written = {d.mutated_input for d in output.meta.get("desc", ()) if hasattr(d, "mutated_input")}
    return [n for n in gm.graph.find_nodes(op="placeholder") if n.meta.get("desc") in written] if written else []


def extract(
    gm: fx.GraphModule,
    saved_values: list[fx.Node],
    saved_sym_nodes: list[fx.Node],
    num_fwd_outputs: int,
    static_lifetime_input_nodes: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut the joint graph in two; what backward needs beyond the saved values is computed again in it."""
    forward, backward = partitioners._extract_fwd_bwd_modules(
        gm,
        saved_values,
        saved_sym_nodes=saved_sym_nodes,
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_nodes=static_lifetime_input_nodes,
    )
    for module in (forward, backward):
        module.graph.eliminate_dead_code(is_impure_node=partitioners.is_not_collective)
    # Without this, everything that backward computes again would be computed, and alive, before its first step.
    backward = partitioners.reordering_to_mimic_autograd_engine(backward)
    forward, backward = partitioners.raise_getitems(forward), partitioners.raise_getitems(backward)
    forward = partitioners.thread_graphsafe_rng_from_hops(forward, is_backward=False)
    backward = partitioners.thread_graphsafe_rng_from_hops(backward, is_backward=True)
    return forward, backward


def min_cut(gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """PyTorch's own partition."""
    return partitioners.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)


def is_sym_node(node: fx.Node) -> bool:
    """Whether a node is a symbolic number that something computes with.

    A condition that is only asserted is none: Inductor takes no condition as an input, and backward asks it anew of the
    numbers in it. PyTorch's partition says so too, from 2.13 on.
    """
    if not partitioners.is_sym_node(node):
        return False
    asserted = all(user.target is torch.ops.aten._assert_scalar.default for user in node.users)
    return not (isinstance(node.meta["val"], torch.SymBool) and node.users and asserted)


def optimization_hint(size: Any, fallback: int) -> int:
    """The size that a symbolic number was traced with; ``fallback`` where it depends on data. Never guards."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if (public := getattr(symbolic_shapes, "optimization_hint", None)) is not None:
        return public(size, fallback=fallback)
    return size.node.hint if size.node.hint is not None else fallback


def signature(name: str) -> set[str]:
    """Parameter names of one of the private functions, for the test that watches them."""
    return set(inspect.signature(getattr(PARTS[name], name)).parameters)
