"""Calls that recur: what the layers of a model have in common is traced once and copied from then on.

Retracing one call takes PyTorch's dispatch through four modes, about a millisecond, and all layers of a model but the
first repeat what has been traced. What a call of PyTorch becomes depends on its target, on the metadata of its tensors
(which of them are the same included), on its other arguments and on the ambient modes; a call that agrees in all of
these gets a copy of the same nodes. A value that only copies have made exists in the graph alone, until a call that has
to be traced asks for it.

Such a value owns its memory, though it may stand for a view. Where nothing is mutated nobody can tell; with
``views=False`` calls that return views are traced one by one, and mutations are safe.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_slot,
    snapshot_fake,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (int, float, bool, complex, str, type(None), type(...))
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)

# What may leave no trace: methods that return their tensor where it is so already, and a size that is known.
_QUIET = {"contiguous", "to", torch.ops.aten.sym_size.int, "size"}
_FIXED = ("tensor_meta", "original_aten")  # notes that do not depend on who calls
_SIZES = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_storage_offset.default}

_At = Callable[[fx.Node], AbstractContextManager[Any]]


class Mutated(Exception):
    """Something is mutated, and views have been copied."""


class Watched(FunctionalTensorMode):
    """Functionalisation that says when something is mutated.

    Args:
        notice: called with the name of each operator that mutates.
    """

    def __init__(self, notice: Callable[[str], None], **settings: Any) -> None:
        super().__init__(**settings)
        self.notice = notice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.notice(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(eq=False)
class Copied:
    """A value that a copied node computes.

    Attributes:
        node: of the new graph.
        like: a fake tensor with the same metadata, from when the call was traced.
        described: that metadata.
        tensor: the value itself, once it had to be made. It may have been mutated since.
    """

    node: fx.Node
    like: Tensor
    described: Any
    tensor: FunctionalTensor | None = None


@dataclass(frozen=True)
class _Input:
    """The tensor at this position among those that a call is given."""

    position: int


@dataclass(frozen=True)
class _New:
    """What the new node of this number computes: which fake tensor it is like, and how that is described."""

    number: int
    like: Tensor
    described: Any


@dataclass(frozen=True)
class _Traced:
    """What a call became: its new nodes, their arguments as :class:`_Input` and numbers, and what it returned."""

    nodes: list[fx.Node]
    places: dict[fx.Node, _Input | int]
    result: Any


class _Unknown(Exception):
    """A call has an argument of which it is not known what it does."""


@dataclass
class _Given:
    """A call's tensors in order, each with its node in the new graph."""

    tensors: list[Any] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


class Recurring:
    """Remembers what calls became in one graph that is being traced.

    Args:
        views: whether calls that return views are copied as well.
    """

    def __init__(self, *, views: bool) -> None:
        self.views = views
        accelerator = torch.accelerator.current_accelerator()
        self.devices = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
        self.traced: dict[Any, _Traced | None] = {}
        self.copies: list[tuple[fx.Node, fx.Node]] = []
        self.mutating = False

    def mutates(self, what: str) -> None:
        """To be told of every operator that mutates something.

        Raises:
            Mutated: views have been copied, and may miss it.
        """
        if self.views:
            raise Mutated(what)
        self.mutating = True

    def run(self, node: fx.Node, env: dict[fx.Node, Any], tracer: Any, at: _At, live: Callable[[], Any]) -> Any:
        """The result of a call in Dynamo's graph: a copy where it is known what the call becomes, or traced anew.

        Args:
            node: the call.
            env: the values of Dynamo's graph so far, copied ones among them.
            tracer: PyTorch's, whose graph is growing.
            at: enters a context in which new nodes are said to come from the call.
            live: traces the call.
        """
        given = _Given()
        with torch._C.DisableTorchFunction(), nullcontext() if self.views else at(node):  # asking may make views anew
            try:
                key = (_target(node), *self._ambient(), self._key((node.args, node.kwargs), env, tracer, given))
            except _Unknown:
                key = None
            if key is not None and (traced := self.traced.get(key)) is not None:
                with at(node):
                    return self._copy(traced, given, tracer)
        if key is None or key in self.traced:
            return live()
        last, self.mutating = next(iter(reversed(tracer.graph.nodes))), False
        result = live()
        with torch._C.DisableTorchFunction(), nullcontext() if self.views else at(node):
            new = list(_after(last))
            # What leaves no trace at all may have been called for something else than its result.
            known = (new or node.target in _QUIET) and not self.mutating
            self.traced[key] = self._learn(new, given, result, tracer) if known else None
        return result

    def complete(self) -> None:
        """Give the nodes that were copied values of their own. Called when nothing is traced any more."""
        for copy, original in self.copies:
            copy.meta["val"] = pytree.tree_map_only(Tensor, snapshot_fake, original.meta["val"])
            copy.meta.update((name, original.meta[name]) for name in _FIXED if name in original.meta)
        self.copies.clear()

    # -- what a call depends on ----------------------------------------------------------------------------------------

    def _ambient(self) -> tuple[Any, ...]:
        autocast = (torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in self.devices)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast

    def _key(self, argument: Any, env: dict[fx.Node, Any], tracer: Any, given: _Given) -> Any:
        """All that is known of an argument when tracing, in a form that can be compared."""

        def key(a: Any) -> Any:
            a = env[a] if isinstance(a, fx.Node) else a
            if isinstance(a, (Copied, FunctionalTensor)):
                node, _, described = _described(a, tracer)
                first = given.nodes.index(node) if node in given.nodes else len(given.nodes)
                given.tensors.append(a)
                given.nodes.append(node)
                return first, described
            if isinstance(a, (tuple, list)):
                return type(a), *map(key, a)
            if isinstance(a, dict):
                return tuple((name, key(value)) for name, value in a.items())
            if isinstance(a, slice):
                return "slice", key(a.start), key(a.stop), key(a.step)
            if isinstance(a, _SYMBOLIC):
                return type(a), a.node.expr
            if isinstance(a, _PLAIN):
                return type(a), repr(a) if isinstance(a, float) else a  # True is not 1, nor 0.0 -0.0
            raise _Unknown

        return key(argument)

    # -- what it becomes -----------------------------------------------------------------------------------------------

    def _learn(self, new: list[fx.Node], given: _Given, result: Any, tracer: Any) -> _Traced | None:
        """What the call became; None where a copy of it might not be the same."""
        places: dict[fx.Node, _Input | int] = {n: _Input(i) for i, n in reversed(list(enumerate(given.nodes)))}
        kept: list[fx.Node] = []
        for node in new:
            if _is_number(node) and (node.target in _SIZES or all(map(_is_number, node.all_input_nodes))):
                continue  # the same number, whoever asks for it
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                continue  # holds wherever it held once
            if not _is_pure(node) or not all(n in places or _is_number(n) for n in node.all_input_nodes):
                return None
            places[node] = len(kept)
            kept.append(node)
        owned = {_memory(t, tracer) for t in given.tensors}

        def returned(leaf: Any) -> Any:
            if isinstance(leaf, FunctionalTensor):
                node, like, described = _described(leaf, tracer)
                place = places.get(node)
                if place is None or (not self.views and _memory(leaf, tracer) in owned):
                    raise _Unknown
                return place if isinstance(place, _Input) else _New(place, like, described)
            if isinstance(leaf, _PLAIN) or (isinstance(leaf, _SYMBOLIC) and not free_unbacked_symbols(leaf)):
                return leaf
            raise _Unknown

        try:
            return _Traced(kept, places, pytree.tree_map(returned, result))
        except _Unknown:
            return None

    def _copy(self, traced: _Traced, given: _Given, tracer: Any) -> Any:
        copies: list[fx.Node] = []

        def here(node: fx.Node) -> fx.Node:
            place = traced.places.get(node)
            if place is None:
                return node  # a number
            return given.nodes[place.position] if isinstance(place, _Input) else copies[place]

        for original in traced.nodes:
            args, kwargs = (fx.map_arg(a, here) for a in (original.args, original.kwargs))
            name = getattr(original.target, "_opname", "getitem")
            copy = tracer.create_node("call_function", original.target, args, kwargs, name)
            self.copies.append((copy, original))
            copies.append(copy)

        def returned(leaf: Any) -> Any:
            if isinstance(leaf, _Input):
                return given.tensors[leaf.position]
            return Copied(copies[leaf.number], leaf.like, leaf.described) if isinstance(leaf, _New) else leaf

        return pytree.tree_map(returned, traced.result)


def tensor_of(value: Any, tracer: Any) -> Any:
    """The value itself, made where so far only the graph has it."""
    if not isinstance(value, Copied):
        return value
    if value.tensor is None:
        with disable_proxy_modes_tracing():
            inner = snapshot_fake(value.like)
        assert inner is not None
        track_tensor_tree(inner, fx.Proxy(value.node, tracer), constant=None, tracer=tracer)
        value.tensor = FunctionalTensor.to_functional(inner)
        inner.requires_grad_(value.like.requires_grad)  # the functional one is outside of autograd, as traced ones are
    return value.tensor


def plain(value: Any) -> Any:
    """The tensor inside of a functional one, with all that was done to it."""
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)
    return torch._from_functional_tensor(value.elem)


def _target(node: fx.Node) -> Any:
    """What is called, if nothing but its arguments decides what it does."""
    module = getattr(node.target, "__module__", None) or "torch"
    if node.op == "call_method" or (node.op == "call_function" and module.split(".")[0] in ("torch", "_operator")):
        return node.target
    raise _Unknown


def _described(value: Any, tracer: Any) -> tuple[fx.Node, Tensor, Any]:
    """A tensor's node in the new graph, a tensor like it, and all that operators may ask of it but its numbers."""
    if isinstance(value, Copied):
        if value.tensor is None:
            return value.node, value.like, value.described
        value = value.tensor
    inner = plain(value)
    slot = get_proxy_slot(inner, tracer, None)
    if slot is None or slot.constant is not None or not isinstance(inner, FakeTensor) or inner.constant is not None:
        raise _Unknown  # its numbers are known, and a call may depend on them
    if inner.layout is not torch.strided or free_unbacked_symbols(inner):
        raise _Unknown
    sizes = tuple(_size(s) for s in (*inner.shape, *inner.stride(), inner.storage_offset()))
    bits = inner.is_conj(), inner.is_neg(), inner.is_inference(), inner.requires_grad, value.requires_grad
    return slot.proxy.node, inner, (inner.dim(), sizes, inner.dtype, inner.device, bits)


def _size(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _memory(value: Any, tracer: Any) -> int:
    return _described(value, tracer)[1].untyped_storage()._cdata


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _is_pure(node: fx.Node) -> bool:
    if "eager_input_vals" in node.meta or "val" not in node.meta:  # the first belongs to the arguments
        return False
    if node.target is operator.getitem:
        return True
    if _is_number(node):  # read from a tensor
        return False
    return isinstance(node.target, OpOverload) and not node.target._schema.is_mutable


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), _SYMBOLIC)
