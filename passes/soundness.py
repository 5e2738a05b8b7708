"""What a rewrite may never change: the values' shapes and types, the outputs' strides, the paths of the gradients.

The rewritten graph is run on fake tensors with autograd on, so both questions are answered by PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import rebind_unbacked, statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from .fakes import fake_execution
from .gradients import reachable_inputs


class Unsound(RuntimeError):
    """A rewritten graph is not the same mathematics."""


class LostGradient(Unsound):
    """A retraced graph lacks a gradient that Dynamo's graph had: no rewrite of it is to blame."""


class Output(NamedTuple):
    """What must not change about an output.

    Attributes:
        value: the (fake) tensor, or whatever else it is.
        reaches: indices of the inputs that it depends on differentiably.
    """

    value: Any
    reaches: frozenset[int]


_RECORD = "unsloth_output"


def record(gm: fx.GraphModule, values: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Note on a graph's outputs what they are in the graph that it was made from.

    Running a graph on fake tensors takes as long as tracing it. Of a graph with a record only the rewritten form is
    run, and itself only where the two differ.

    Args:
        values: the outputs as they were computed from ``inputs`` with autograd on.
    """
    nodes = pytree.tree_leaves(_output(gm).args[0])
    for node, value, reaches in zip(nodes, values, reachable_inputs(values, inputs), strict=True):
        if isinstance(node, fx.Node):
            node.meta[_RECORD] = Output(value, reaches)


def forget_record(gm: fx.GraphModule) -> None:
    """Take the record off a graph that has been checked, and with it the autograd graph that it keeps alive."""
    for node in gm.graph.nodes:
        node.meta.pop(_RECORD, None)


def assert_same_mathematics(before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Raise :class:`Unsound` unless ``after`` may stand for ``before``.

    Checked: every node's value has the shape and dtype its metadata states; graph outputs keep shape, dtype, device
    and layout; each output depends differentiably on exactly the inputs it depended on.

    Raises:
        LostGradient: ``before`` itself lacks a gradient that its record has.
    """
    names = [n.name for n in before.graph.nodes if n.op == "placeholder"]
    kept, noted = _outputs(after), _recorded(before)
    if noted is not None and _change(noted, kept, names) is None:
        return
    had = _outputs(before)
    if noted is not None:
        _assert_none_lost(noted, had, names)
    if (change := _change(had, kept, names)) is not None:
        raise Unsound(change)


def assert_keeps_gradients(gm: fx.GraphModule) -> None:
    """Raise :class:`LostGradient` where a graph's outputs do not reach an input that their record has."""
    if (noted := _recorded(gm)) is not None:
        _assert_none_lost(noted, _outputs(gm, _Running), [n.name for n in gm.graph.nodes if n.op == "placeholder"])


def _change(had: list[Output], kept: list[Output], names: list[str]) -> str | None:
    if len(had) != len(kept):
        return f"the graph has {len(kept)} outputs, it had {len(had)}"
    for index, (old, new) in enumerate(zip(had, kept, strict=True)):
        if difference := _difference(old.value, new.value, strides=True):
            return f"output {index} {difference}"
        if lost := old.reaches - new.reaches:
            return f"output {index} lost its gradient with respect to {names[min(lost)]}"
        if gained := new.reaches - old.reaches:
            return f"output {index} gained a gradient with respect to {names[min(gained)]}"
    return None


def _assert_none_lost(noted: list[Output], had: list[Output], names: list[str]) -> None:
    for index, (old, new) in enumerate(zip(noted, had, strict=True)):
        if lost := old.reaches - new.reaches:
            some = ", ".join(names[i] for i in sorted(lost)[:3])
            raise LostGradient(f"output {index} would lose its gradient with respect to {some}")


def _recorded(gm: fx.GraphModule) -> list[Output] | None:
    nodes = pytree.tree_leaves(_output(gm).args[0])
    if not any(isinstance(n, fx.Node) and _RECORD in n.meta for n in nodes):
        return None
    return [n.meta[_RECORD] if isinstance(n, fx.Node) else Output(n, frozenset()) for n in nodes]


class _Running(fx.Interpreter):
    """Runs a graph whose sizes may be read off its data: each running would give them another name."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.meta.get("unbacked_bindings") and (environment := shape_env_of(result)) is not None:
            rebind_unbacked(environment, n, result)
        return result


def shape_env_of(result: Any) -> Any:
    """Where the symbols of a value's sizes are known."""
    for value in pytree.tree_leaves(result):
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value.node.shape_env
        if isinstance(value, FakeTensor):
            return value.fake_mode.shape_env
    return None


class _Checking(_Running):
    """Checks every value against its node's metadata."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        stated = n.meta.get("val") if n.op == "call_function" else None
        if isinstance(stated, Tensor) and (difference := _difference(stated, result, strides=False)):
            raise Unsound(f"{n.name} {difference}")
        return result


def _outputs(gm: fx.GraphModule, interpreter: type[fx.Interpreter] = _Checking) -> list[Output]:
    """Run a graph on its fake inputs in the ambient grad mode."""
    inputs = _inputs(gm)
    environment = next((e for e in map(shape_env_of, inputs) if e is not None), None)
    # What this run names anew is forgotten; it may not wait for a tracer to bind it.
    unnoticed = nullcontext() if environment is None else environment.ignore_fresh_unbacked_symbols()
    with fake_execution(inputs), unnoticed:
        values = pytree.tree_leaves(interpreter(gm, garbage_collect_values=False).run(*inputs))
    return [Output(*pair) for pair in zip(values, reachable_inputs(values, inputs), strict=True)]


def _difference(old: Any, new: Any, *, strides: bool) -> str | None:
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None if isinstance(old, Tensor) == isinstance(new, Tensor) else "is no longer a tensor"
    if old.dtype != new.dtype:
        return f"changed its dtype from {old.dtype} to {new.dtype}"
    if old.device != new.device:
        return f"moved from {old.device} to {new.device}"
    if old.dim() != new.dim() or not same_sizes(old.shape, new.shape):
        return f"changed its shape from {tuple(old.shape)} to {tuple(new.shape)}"
    if strides and not same_layout(old, new):
        return f"changed its strides from {old.stride()} to {new.stride()}"
    return None


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are known to lie in memory alike, without adding a guard.

    How far apart the elements of a dimension are says nothing where it has one element: operators give such a dimension
    any stride that they like, and PyTorch compares strides likewise (``torch._prims_common``: significant strides).
    """
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(statically_known_true(size == 1) or statically_known_true(sym_eq(x, y)) for size, x, y in strides)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes are known to be equal without adding a guard."""
    return len(a) == len(b) and statically_known_true(sym_eq(tuple(a), tuple(b)))


def count_guards(gm: fx.GraphModule) -> int:
    """How many guards the graph's symbolic shapes carry: a pass may not add any (soundness rule 7)."""
    for value in _inputs(gm):
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            return len(value.fake_mode.shape_env.guards)
    return 0


def _output(gm: fx.GraphModule) -> fx.Node:
    (output,) = gm.graph.find_nodes(op="output")
    return output


def _inputs(gm: fx.GraphModule) -> list[Any]:
    return [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
