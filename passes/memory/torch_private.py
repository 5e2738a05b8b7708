"""The private parts of PyTorch's partitioner that ours stands on, in one place.

They exist from torch 2.11 to 2.15; ``tests/memory`` fails loudly when one is gone or takes other arguments.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx
from torch._functorch import partitioners


def backward_nodes(
    gm: fx.GraphModule, static_lifetime_input_indices: list[int] | None, num_fwd_outputs: int
) -> tuple[set[fx.Node], list[Any]]:
    """The nodes that depend on a tangent or must run in backward, and the joint outputs that are gradients."""
    info = partitioners.classify_nodes(gm, static_lifetime_input_indices or [], num_fwd_outputs)
    _, outputs, *_ = partitioners._extract_fwd_bwd_outputs(gm, num_fwd_outputs=num_fwd_outputs)
    return set(info.tangents_closure), outputs


def extract(
    gm: fx.GraphModule,
    saved_values: list[fx.Node],
    saved_sym_nodes: list[fx.Node],
    num_fwd_outputs: int,
    static_lifetime_input_indices: list[int] | None,
    static_lifetime_input_nodes: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut the joint graph in two; what backward needs beyond the saved values is computed again in it."""
    if static_lifetime_input_nodes is None:
        info = partitioners.classify_nodes(gm, static_lifetime_input_indices or [], num_fwd_outputs)
        static_lifetime_input_nodes = info.static_lifetime_input_nodes
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


def min_cut(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """PyTorch's own partition."""
    return partitioners.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)


def is_sym_node(node: fx.Node) -> bool:
    """Whether a node is a symbolic number."""
    return partitioners.is_sym_node(node) and not partitioners._is_assert_only_symbool(node)


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only checks something."""
    return "_assert" in str(node.target)


def signature(name: str) -> set[str]:
    """Parameter names of one of the private functions, for the test that watches them."""
    return set(inspect.signature(getattr(partitioners, name)).parameters)
