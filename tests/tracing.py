"""Graphs as the passes see them, made from ordinary functions and modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from unsloth.compiler.capture import retrace


def dynamo_graph(function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> fx.GraphModule:
    """The one Dynamo graph of a call; asserts that there is only one."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    (gm,) = graphs
    return gm


def trace(function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> fx.GraphModule:
    """The functionalised pre-dispatch ATen graph of a call."""
    return retrace(dynamo_graph(function, *args, dynamic=dynamic, **kwargs))


def targets(gm: fx.GraphModule) -> list[str]:
    """Operator names in graph order: ``aten.linear.default`` reads "linear"."""
    calls = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    return [str(getattr(t, "_opname", getattr(t, "__name__", t))) for t in calls]
