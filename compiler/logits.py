"""``logits="drop"``: a training step that reads only the loss need not hold the logits until its end.

Kept logits are the largest tensor of a step (tokens × vocabulary), alive from the head to the end of backward, and
autograd makes a gradient of zeros of the same size for them. A graph that returns both a loss and the tensor that the
loss was computed from gives up the latter, and a stand-in that explains itself takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_LOSSES = {
    torch.ops.aten.cross_entropy_loss.default,
    torch.ops.aten.nll_loss_nd.default,
    torch.ops.aten.nll_loss.default,
}
# What may lie between a head and its loss: the same values in another arrangement or dtype.
_ARRANGEMENTS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.log_softmax.int,
    torch.ops.aten.expand.default,
}


class DroppedLogitsError(RuntimeError):
    """The logits were read although ``logits="drop"`` was asked for."""


class DroppedLogits(Tensor):
    """Stands for logits that were not kept: it knows their shape and dtype, and any use of it raises."""

    @staticmethod
    def __new__(cls, shape: Any, dtype: torch.dtype, device: torch.device) -> DroppedLogits:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DroppedLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # what trainers do to every output before they look at any
            return args[0]
        raise DroppedLogitsError(
            'the logits were not kept, because the model is compiled with options={"logits": "drop"}; '
            'compile it with options={"logits": "keep"} to read them'
        )


def find_logits(gm: fx.GraphModule) -> tuple[int, ...]:
    """Indices of graph outputs that are a loss's own logits, in a graph that also returns that loss.

    An output qualifies when a cross-entropy that contributes to a scalar output is computed from it by rearrangement
    and casts alone.
    """
    outputs = _outputs(gm)
    losses = {o for o in outputs if isinstance(o, fx.Node) and _is_scalar(o)}
    sources: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.target in _LOSSES and losses & _descendants(node):
            sources |= _arranged_from(node.args[0])
    return tuple(i for i, o in enumerate(outputs) if isinstance(o, fx.Node) and o in sources and not _is_scalar(o))


def drop_outputs(gm: fx.GraphModule, indices: tuple[int, ...]) -> None:
    """Take the outputs out of the graph (in place); :func:`restore_outputs` puts stand-ins back at run time."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    output.args = (tuple(o for i, o in enumerate(_outputs(gm)) if i not in indices),)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def restore_outputs(results: Any, gaps: dict[int, tuple[Any, torch.dtype, torch.device]]) -> list[Any]:
    """Insert a :class:`DroppedLogits` at every dropped index."""
    remaining = iter(results)
    total = len(results) + len(gaps)
    return [DroppedLogits(*gaps[i]) if i in gaps else next(remaining) for i in range(total)]


def _outputs(gm: fx.GraphModule) -> list[Any]:
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return pytree.tree_leaves(output.args[0])


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


def _descendants(node: fx.Node) -> set[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user not in found:
                found.add(user)
                todo.append(user)
    return found


def _arranged_from(node: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    while isinstance(node, fx.Node):
        found.add(node)
        if node.target not in _ARRANGEMENTS:
            break
        node = node.args[0]
    return found
