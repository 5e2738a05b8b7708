"""What a rewrite may never change: the values' shapes and types, the outputs' strides, the paths of the gradients.

The rewritten graph is run on fake tensors with autograd on, so both questions are answered by PyTorch itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from .fakes import fake_execution
from .gradients import reachable_inputs


class Unsound(RuntimeError):
    """A rewritten graph is not the same mathematics."""


def assert_same_mathematics(before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Raise :class:`Unsound` unless ``after`` may stand for ``before``.

    Checked: every node's value has the shape and dtype its metadata states; graph outputs keep shape, dtype, device
    and strides; each output depends differentiably on exactly the inputs it depended on.
    """
    had, kept = propagate(before), propagate(after)
    if len(had) != len(kept):
        raise Unsound(f"the graph has {len(kept)} outputs, it had {len(had)}")
    inputs = _inputs(before)
    names = [n.name for n in before.graph.nodes if n.op == "placeholder"]
    reached = zip(reachable_inputs(had, inputs), reachable_inputs(kept, _inputs(after)), strict=True)
    for index, (old, new, (was, now)) in enumerate(zip(had, kept, reached, strict=True)):
        if difference := _difference(old, new, strides=True):
            raise Unsound(f"output {index} {difference}")
        if lost := was - now:
            raise Unsound(f"output {index} lost its gradient with respect to {names[min(lost)]}")
        if gained := now - was:
            raise Unsound(f"output {index} gained a gradient with respect to {names[min(gained)]}")


def propagate(gm: fx.GraphModule) -> list[Any]:
    """Run a graph on its fake inputs in the ambient grad mode, checking every value against its node's metadata."""
    inputs = _inputs(gm)
    with fake_execution(inputs):
        return pytree.tree_leaves(_Checking(gm, garbage_collect_values=False).run(*inputs))


class _Checking(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        stated = n.meta.get("val") if n.op == "call_function" else None
        if isinstance(stated, Tensor) and (difference := _difference(stated, result, strides=False)):
            raise Unsound(f"{n.name} {difference}")
        return result


def _difference(old: Any, new: Any, *, strides: bool) -> str | None:
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None if isinstance(old, Tensor) == isinstance(new, Tensor) else "is no longer a tensor"
    if old.dtype != new.dtype:
        return f"changed its dtype from {old.dtype} to {new.dtype}"
    if old.device != new.device:
        return f"moved from {old.device} to {new.device}"
    if old.dim() != new.dim() or not same_sizes(old.shape, new.shape):
        return f"changed its shape from {tuple(old.shape)} to {tuple(new.shape)}"
    if strides and not same_sizes(old.stride(), new.stride()):
        return f"changed its strides from {old.stride()} to {new.stride()}"
    return None


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes are known to be equal without adding a guard."""
    return len(a) == len(b) and statically_known_true(sym_eq(tuple(a), tuple(b)))


def count_guards(gm: fx.GraphModule) -> int:
    """How many guards the graph's symbolic shapes carry: a pass may not add any (soundness rule 7)."""
    for value in _inputs(gm):
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            return len(value.fake_mode.shape_env.guards)
    return 0


def _inputs(gm: fx.GraphModule) -> list[Any]:
    return [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
