"""From Dynamo's graph to functionalised pre-dispatch ATen: few spellings, source lines and symbolic shapes kept.

Dynamo's graph holds whatever functions the model's author called. Retracing it above autograd and below composite
operators leaves one vocabulary (``aten.linear``, ``aten.silu``, ``aten.scaled_dot_product_attention`` stay whole;
``reshape``, ``to`` and in-place operators become ``view``, ``_to_copy`` and their functional forms), so that a formula
has few spellings, and no formula can match across a mutation.

Two kinds of higher-order operator need care. Activation-checkpoint bodies are inlined, because what to recompute is
our planner's decision. The body of a custom ``autograd.Function`` is *carried*: interpreting it would record its
forward only and silently lose its gradient (that of every frozen 4-bit layer, for one), so the call moves to the new
graph as it stands, and AOTAutograd or eager autograd runs it as they would have.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from ..passes.runner import MODULE_ATTRIBUTES, copy_source
from ..passes.soundness import LostGradient, assert_keeps_gradients, forget_record, record, shape_env_of
from .einsum import as_product
from .mutations import behind_autograd, detached, keep_mutations, mutation, out_of_place
from .recurring import Copied, Mutated, Recurring, Watched, plain, tensor_of
from .vmap import write_out_vmap

_higher_order = torch.ops.higher_order
_INLINED = {getattr(_higher_order, "tag_activation_checkpoint", None)} - {None}
_CARRIED = {getattr(_higher_order, "autograd_function_apply", None)} - {None}
# Of others it is not known that they mutate nothing.
_PURE = _INLINED | _CARRIED | {getattr(_higher_order, "flex_attention", None)} - {None}


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``target.copy_(source)`` once functionalised: a value in the target's layout, and one with a derivative."""
    if (source.dtype, source.device) != (target.dtype, target.device):
        source = torch.ops.aten._to_copy.default(source, dtype=target.dtype, device=target.device)
    source = source.expand(target.shape)
    return torch.slice_scatter(target, source) if target.dim() else source


# Functionalisation leaves `copy` without a derivative, which AOTAutograd and eager autograd would only say in backward.
_SPELLINGS = {torch.ops.aten.copy.default: _copy, torch.ops.aten.einsum.default: as_product}
# Results that nothing may mutate under ``export``: whether they alias their input depends on the arguments.
_FROZEN = {torch.nn.functional.dropout, torch.dropout}
# What AOTAutograd and Inductor read from the placeholders of Dynamo's graph.
_PLACEHOLDER_META = (
    "example_value",
    "tensor_dict",
    "_dynamo_source",
    "nn_module_stack",
    "stack_trace",
    "grapharg",
    "steal_arg",
)


class CaptureError(RuntimeError):
    """The graph cannot be retraced faithfully; the caller keeps Dynamo's graph."""


def retrace(gm: fx.GraphModule, *, check: bool = True) -> fx.GraphModule:
    """Retrace Dynamo's graph to functionalised pre-dispatch ATen.

    Args:
        gm: a graph module from Dynamo, whose placeholders carry fake values in ``meta["example_value"]``.
        check: ask autograd now whether a gradient was lost; otherwise
            :func:`~unsloth.passes.runner.run_passes` does, together with its own check.

    Returns:
        A new graph module with the same inputs and outputs. Every node has ``meta["val"]``, and where Dynamo knew
        them ``stack_trace`` and ``nn_module_stack``.

    Raises:
        CaptureError: when an operator cannot be traced, or when an output of the new graph would no longer depend
            differentiably on the inputs it depended on before.
    """
    fakes = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if mode is None:
        raise CaptureError("the graph has no tensor inputs")
    if any(isinstance(f, Tensor) and not isinstance(f, FakeTensor) for f in fakes):
        raise CaptureError("an input is not a plain tensor")
    try:
        with mode, preserve_node_meta():
            graph = _traced(write_out_vmap(gm), fakes, mode)
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}") from error
    _keep_identity(gm, graph)
    _tidy(graph.graph)
    graph.recompile()
    # Autograd itself says which inputs each output depends on: in Dynamo's own fake values, and later in ours.
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    leaves = pytree.tree_leaves(output.args[0])
    record(graph, [n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in leaves], fakes)
    if check:
        try:
            assert_keeps_gradients(graph)
        except LostGradient as error:
            raise CaptureError(str(error)) from error
        forget_record(graph)
    return graph


def _traced(gm: fx.GraphModule, fakes: list[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """The graph, retraced; calls that recur are copied, of views only where nothing is mutated."""
    for views in (True, False):
        recurring = Recurring(views=views)
        functionalised = _Functionalised(gm, _fresh_outputs(gm, mode), recurring)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # a trace that ends early leaves its own behind
                graph = make_fx(functionalised, _SPELLINGS, pre_dispatch=True, tracing_mode="real")(*fakes)
        except Mutated:
            continue
        recurring.complete()
        return graph
    raise AssertionError("only copied views make a mutation a problem")


class _Functionalised:
    """Runs a graph on functional tensors and returns plain ones; mutations of inputs become copies at the end."""

    def __init__(self, gm: fx.GraphModule, carried: dict[fx.Node, Any], recurring: Recurring) -> None:
        self.gm, self.carried, self.recurring = gm, carried, recurring

    def __call__(self, *args: Any) -> Any:
        # ``export`` keeps composite functional operators (linear, attention, losses) whole above autograd.
        settings = {"pre_dispatch": True, "export": True, "_allow_token_discovery": True}
        mode = Watched(self.recurring.mutates, **settings)
        outside = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with outside, mode:
            inputs = [FunctionalTensor.to_functional(a) if isinstance(a, Tensor) else a for a in args]
            before = [plain(i) for i in inputs]
            interpreter = _Interpreter(self.gm, self.carried, self.recurring)
            try:
                results = interpreter.run(*inputs)
            finally:
                while interpreter.autocast:
                    interpreter.leave_autocast()
            after = [plain(i) for i in inputs]
            mutated = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new]
            itself = {id(inputs[i]): args[i] for i in mutated}  # a mutated input that is returned stays that input
            outputs = pytree.tree_map_only(FunctionalTensor, lambda t: itself.get(id(t), plain(t)), results)
        for i in mutated:
            leaf = args[i].requires_grad and args[i].is_leaf  # mutable only where autograd does not look
            with torch.no_grad() if leaf else nullcontext():
                args[i].copy_(after[i])
        return outputs


class _Interpreter(fx.Interpreter):
    """Interprets Dynamo's graph under the tracer; enters checkpoint bodies and carries autograd functions."""

    def __init__(self, gm: fx.GraphModule, carried: dict[fx.Node, Any], recurring: Recurring) -> None:
        super().__init__(gm)
        self.carried, self.recurring = carried, recurring
        self.autocast: list[tuple[str, bool, torch.dtype]] = []
        self.tracer = _pre_dispatch_tracer()

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method") or n.target in _INLINED | _CARRIED:
            return self.trace_node(n)
        match n.target, n.args:
            case operator.getitem, (fx.Node() as node, int() as i) if isinstance(self.env[node], (tuple, list)):
                return self.env[node][i]
        return self.recurring.run(n, self.env, self.tracer, self._set_current_node, lambda: self.trace_node(n))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        arguments = super().fetch_args_kwargs_from_env(n)
        return pytree.tree_map_only(Copied, lambda copied: tensor_of(copied, self.tracer), arguments)

    def trace_node(self, n: fx.Node) -> Any:
        self.node = n
        result = self._traced(n)
        environment = shape_env_of(n.meta.get("example_value")) if n.meta.get("unbacked_bindings") else None
        if environment is not None:
            # What is read off the data a second time gets other symbols, and would be something else to every check.
            rebind_unbacked(environment, n, result)
        return result

    def _traced(self, n: fx.Node) -> Any:
        if isinstance(n.target, HigherOrderOperator) and n.target not in _PURE:
            self.recurring.mutates(str(n.target))
        parameter = behind_autograd(n)
        if parameter is not None:
            through = self.env[parameter] - self.env[parameter].detach()
        changed, differentiable = detached(n), None
        if changed is not None and (function := out_of_place(mutation(n) or "")) is not None:
            arguments, named = self.fetch_args_kwargs_from_env(n)
            differentiable = function(*arguments, **named)
        result = super().run_node(n)
        if changed is not None and differentiable is not None:
            self.env[changed] = result = differentiable.to(result.dtype)
        if parameter is not None:
            # What comes after sees the new value, whose gradient is the parameter's; a sum with zeros is exact.
            self.env[parameter] = result.detach() + through
        if n.target in _FROZEN and isinstance(result, Tensor):
            result = result.clone()  # that may be mutated; _tidy takes it out again
        # dynamic=True makes eps and scales symbolic too, and a formula would not be known for what it is. A guard on
        # the number of a module is what Dynamo itself would have made; a number that the caller passes stays open.
        return float(result) if isinstance(result, torch.SymFloat) and _is_of_a_module(n) else result

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):
            raise CaptureError(f"the graph holds the tensor {target} instead of taking it as an input")
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _INLINED:
            body, *inputs = args
            inner = _Interpreter(body, self.carried, self.recurring)
            inner.autocast = self.autocast
            return inner.run(*inputs)
        if target in _CARRIED:
            return _carry(target, args, kwargs, self.carried[self.node])
        # The tracer records a change of autocast without making it, and every dtype after it would be wrong.
        if target is torch.amp.autocast_mode._enter_autocast:
            self.enter_autocast(*args)
        elif target is torch.amp.autocast_mode._exit_autocast:
            self.leave_autocast()
        return super().call_function(target, args, kwargs)

    def enter_autocast(self, device: str, dtype: torch.dtype | None = None, enabled: bool = True, *_: Any) -> None:
        ambient = torch.get_autocast_dtype(device)
        self.autocast.append((device, torch.is_autocast_enabled(device), ambient))
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype or ambient)

    def leave_autocast(self) -> None:
        device, enabled, dtype = self.autocast.pop()
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _is_of_a_module(node: fx.Node) -> bool:
    """Whether a number is read from an input that is an attribute of a module."""
    origin = node.args[0] if node.target == "item" and node.args else None
    source = getattr(origin.meta.get("grapharg"), "source", None) if isinstance(origin, fx.Node) else None
    while source is not None:
        if "NNModuleSource" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False


def _carry(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    """Emit the call ``target(*args, **kwargs)`` into the graph being traced, without running it."""
    tracer = _pre_dispatch_tracer()

    def proxy(value: Any) -> Any:
        if isinstance(value, FunctionalTensor):
            return get_proxy_slot(plain(value), tracer).proxy
        if isinstance(value, torch.SymInt):
            return get_proxy_slot(value, tracer).force()
        if isinstance(value, fx.GraphModule):
            name = _fresh_name(tracer.root, target.__name__)
            tracer.root.register_module(name, keep_mutations(value))
            return tracer.create_proxy("get_attr", name, (), {})
        return value

    leaf = (fx.GraphModule, torch.SymInt, Tensor)
    map_args = pytree.tree_map(proxy, (args, kwargs), is_leaf=lambda v: isinstance(v, leaf))
    result = tracer.create_proxy("call_function", target, *map_args)
    track_tensor_tree(outputs, result, constant=None, tracer=tracer)
    return pytree.tree_map_only(Tensor, FunctionalTensor.to_functional, outputs)


def _pre_dispatch_tracer() -> Any:
    from torch._ops import _get_dispatch_mode_pre_dispatch

    mode = _get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)
    if mode is None:
        raise CaptureError("an autograd function was met outside of tracing")
    return mode.tracer


def _fresh_name(root: torch.nn.Module, stem: str) -> str:
    number = 0
    while hasattr(root, f"{stem}_{number}"):
        number += 1
    return f"{stem}_{number}"


def _fresh_outputs(gm: fx.GraphModule, mode: FakeTensorMode) -> dict[fx.Node, Any]:
    """For every carried call, also in nested bodies, fake tensors of its outputs' shape that no tracer has seen."""

    def fresh(value: Tensor) -> Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    with disable_proxy_modes_tracing(), mode:
        return {
            n: pytree.tree_map_only(Tensor, fresh, n.meta["example_value"])
            for module in gm.modules()
            if isinstance(module, fx.GraphModule)
            for n in module.graph.nodes
            if n.op == "call_function" and n.target in _CARRIED
        }


def _keep_identity(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Give the new graph the old one's input names and what AOTAutograd knows about them (static parameters)."""
    for name in MODULE_ATTRIBUTES:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    new.meta.update(old.meta)
    for before, after in zip(_placeholders(old), _placeholders(new), strict=True):
        after._rename(before.name)
        after.target = before.target
        after.meta.update({key: before.meta[key] for key in _PLACEHOLDER_META if key in before.meta})
        after.meta.setdefault("val", before.meta["example_value"])
        copy_source(before, after)


def _tidy(graph: fx.Graph) -> None:
    """Drop what the retrace left behind: assertions about its own fakes, aliases and copies (nothing mutates now)."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_needless(node):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def _is_needless(node: fx.Node) -> bool:
    """Whether it is an alias, or the copy made of a frozen result, and stays inside of the graph."""
    source = node.args[0] if node.target is torch.ops.aten.clone.default and not node.kwargs else None
    copy = isinstance(source, fx.Node) and source.target is torch.ops.aten.dropout.default
    return (copy or node.target is torch.ops.aten.alias.default) and all(user.op != "output" for user in node.users)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
