"""What the nodes of a graph say about themselves: their values, where they come from, and what may not be moved."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import fx


class Region(NamedTuple):
    """Where in a graph a node is: values of one region may be combined into one operator.

    Attributes:
        stretch: counts mutations and autocast boundaries.
        grad_enabled: whether gradients are recorded.
    """

    stretch: int
    grad_enabled: bool


def regions(graph: fx.Graph) -> dict[fx.Node, Region]:
    """The region of every node. A graph begins in the ambient grad mode."""
    found: dict[fx.Node, Region] = {}
    stretch, grad_enabled = 0, torch.is_grad_enabled()
    for node in graph.nodes:
        if _is_call_of(node, "_set_grad_enabled"):
            grad_enabled = bool(node.args[0])
        boundary = is_boundary(node)
        stretch += boundary
        found[node] = Region(stretch, grad_enabled)
        stretch += boundary
    return found


def is_boundary(node: fx.Node) -> bool:
    """Whether values before and after a node may not be combined into one operator, in whatever grad mode."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return _is_call_of(node, "_enter_autocast", "_exit_autocast", "_enter_inference_mode")


def _is_call_of(node: fx.Node, *names: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in names


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers. Attention is tagged as if it did, but without dropout it does not.

    Neither does ``dropout`` that drops nothing.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if node.target is torch.ops.aten.dropout.default:
        return bool(node.args[1] != 0.0 and node.args[2])
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(given != 0.0)
    return True


def source_line(node: fx.Node) -> str | None:
    """The innermost line of the *model's* source that made a node, as ``modeling_foo.py:88``."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    outside_torch = [f for f in frames if "/torch/" not in f[0]] or frames
    if not outside_torch:
        return None
    path, line = outside_torch[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made a node (``model.layers.3.mlp``), or ``""``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # What the compiled function calls its model: L['self'], L['args'][0] where forward is wrapped, L['model'], …
    path = re.sub(r"^(L\['\w+'\](\[[^\]]*\])*|L__self__|self)", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    path = path.replace(".__dict__._modules", "")
    # A forward that was wrapped from outside (accelerate does) leads to its module through the wrapper.
    path = re.sub(r"\.forward(\.\w+)*?\.__self__", "", path)
    return re.sub(r"^[._]", "", path)


def value(node: Any) -> Any:
    """The fake tensor (or number) a node stands for; plain numbers stand for themselves."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by name, in schema order, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: v for a, v in zip(schema, node.args, strict=False)} | node.kwargs
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def describe(node: Any) -> str:
    """What a value is, in words for a user."""
    if not isinstance(node, fx.Node):
        return str(node)
    if node.op == "placeholder":
        return "an input of the graph"
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))
