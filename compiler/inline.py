"""What becomes of our operators once the graph is differentiated and cut.

Where an operator has no kernel for a device, its formula goes back into the graph for Inductor to fuse: it was
recognised, the memory planner has seen it whole, and nothing is gained by keeping it opaque. Where it has one, it is
called without its autograd layer. This runs on the forward and the backward graph, as Inductor's
``post_grad_custom_pre_pass``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..kernels.offload import offload, prefetch
from ..kernels.operator import OPERATORS, Operator
from ..passes.fakes import fake_execution
from .identity import source_digest
from .splice import splice

_COPIES = {op.launch[op.overload] for op in (offload, prefetch)}


class InlineReferences(CustomGraphPass):
    """Replaces operators by their reference on devices where they have no kernel, and by their launch elsewhere."""

    def __call__(self, graph: fx.Graph) -> None:
        references = _references()
        for node in list(graph.nodes):
            if (found := references.get(node.target)) is not None:
                operator, formula = found
                values = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], node.args)
                device = next(v.device.type for v in values if isinstance(v, Tensor))
                if formula is None or operator.runs_kernel_on(device):
                    node.target = operator.launch[node.target]
                else:
                    _inline(graph, node, formula, values)
        graph.lint()
        if any(node.target in _COPIES for node in graph.nodes):
            # Inductor would have a copy to the host wait until someone wants its result, because it takes the host's
            # memory for the device's. lower.py sees to it that this holds for this graph alone.
            torch._inductor.config.reorder_for_peak_memory = False  # type: ignore[attr-defined]

    def uuid(self) -> str:
        # A graph compiled after a kernel had failed must not come back where it works.
        disabled = sorted(op.name for op in OPERATORS.values() if op.disabled is not None)
        return f"unsloth-inline-{source_digest()}-{','.join(disabled)}"


def _references() -> dict[Any, tuple[Operator, Any]]:
    found: dict[Any, tuple[Operator, Any]] = {}
    for operator in OPERATORS.values():
        traceable = operator.fake is None  # otherwise its reference cannot be traced, and it stays opaque
        found[operator.overload] = (operator, operator.reference if traceable else None)
        if operator.differentiable:
            formula = None if operator.opaque_backward else operator.backward_as_returned
            found[operator.overload_backward] = (operator, formula)
    return found


def _inline(graph: fx.Graph, node: fx.Node, formula: Any, values: tuple[Any, ...]) -> None:
    """Trace the formula on the node's fake arguments and splice its nodes in place of the call."""
    positions = [i for i, v in enumerate(values) if isinstance(v, (Tensor, torch.SymInt, torch.SymFloat))]

    def call(*inputs: Any) -> Any:
        given = dict(zip(positions, inputs, strict=True))
        return formula(*(given.get(i, v) for i, v in enumerate(values)))

    with fake_execution(values), torch.no_grad():
        body = make_fx(call, decomposition_table=select_decomp_table())(*(values[i] for i in positions))
    with graph.inserting_before(node):
        outputs = splice(graph, body, [node.args[i] for i in positions])
    if isinstance(outputs, (tuple, list)):
        for user in list(node.users):  # an operator with several outputs is only ever read through getitem
            index = user.args[1]
            assert isinstance(index, int)
            user.replace_all_uses_with(outputs[index])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(outputs)
    graph.erase_node(node)
