"""One declaration turns an operator's mathematics into a registered PyTorch operator.

An operator of our dialect is *functional*: it returns fresh tensors and mutates and aliases nothing. It is opaque to
the compilers below us, so that the memory planner can see what it saves and decide about it as a whole. A declaration
gives the mathematics (plain torch and Triton, forward and backward) and this module does the wiring, once:

* ``torch.ops.unsloth.<name>`` and ``torch.ops.unsloth.<name>_backward``, both without aliasing, both with a fake;
* the same two under ``torch.ops.unsloth_launch``, without autograd: what a graph calls once it is differentiated;
* autograd that hands backward exactly what ``saves`` names, so the contract is tested on every device;
* FLOP formulas for both (an operator without one counts as free and would always be recomputed);
* a kernel that raises is switched off for the process, and the reference takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .registration import LAUNCH as LAUNCH
from .registration import (
    NAMESPACE,
    as_returned,
    is_tensor,
    refuse_gradients,
    register_autograd,
    register_backward,
    register_flops,
    register_forward,
)
from .registration import KernelWarning as KernelWarning
from .registration import switch_off as switch_off

OPERATORS: dict[str, Operator] = {}
"""Every declared operator by name."""


@dataclass(eq=False)
class Operator:
    """A declared operator: callable, differentiable, and open about what it saves and costs.

    Calling it with the arguments of its schema returns what the schema names: one tensor, or a tuple.
    """

    name: str
    schema: torch.FunctionSchema
    reference: Callable[..., Any]
    reference_backward: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    saves: tuple[str, ...]
    saves_instead: Mapping[str, str]
    differentiable: tuple[str, ...]
    gradients_of: tuple[str, ...]
    same_gradient: Mapping[str, str]
    devices: tuple[str, ...]
    flops: Callable[..., Any]
    backward_flops: Callable[..., Any]
    fake: Callable[..., Any] | None
    fake_backward: Callable[..., Any]
    opaque_backward: bool
    rows: tuple[str, ...]
    _supports: Callable[..., str | None]
    overload: torch._ops.OpOverload = field(init=False)
    overload_backward: torch._ops.OpOverload = field(init=False)
    launch: dict[torch._ops.OpOverload, torch._ops.OpOverload] = field(init=False, default_factory=dict)
    """By operator, forward and backward: the same call without an autograd layer."""
    disabled: str | None = None
    """Why the kernel was switched off in this process, or None."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.schema.arguments)

    @property
    def tensor_inputs(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.schema.arguments if is_tensor(a))

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(r.name for r in self.schema.returns)

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def saved(self, values: Mapping[str, Any]) -> list[Any]:
        """What backward is given of the inputs and outputs, in the order of ``saves``; None for what it can spare."""
        spared = {other for name, other in self.saves_instead.items() if _is_there(values[name])}
        return [None if name in spared else values[name] for name in self.saves]

    def supports(self, *args: Any) -> str | None:
        """None when the operator may replace its subgraph for these (possibly fake) arguments, else the reason."""
        if self.disabled is not None:
            return f"the {self.name} kernel is switched off: {self.disabled}"
        return self._supports(*args)

    def bytes(self, *args: Any) -> Any:
        """Bytes that forward must move: each input read once, each output written once. May be a SymInt."""
        return _nbytes(args) + _nbytes(self.overload(*args))

    def backward_as_returned(self, *args: Any) -> Any:
        """``reference_backward`` with the return convention of the registered backward operator."""
        return as_returned(self.reference_backward(*args), args[0])

    def runs_kernel_on(self, device: str) -> bool:
        """Whether this operator has a kernel of its own for that device type (otherwise the reference runs)."""
        return device in self.devices and self.disabled is None


def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError("this operator has no gradient")


def operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    reference_backward: Callable[..., Any] = _no_gradient,
    forward: Callable[..., Any],
    backward: Callable[..., Any] = _no_gradient,
    saves: str = "",
    differentiable: str = "",
    gradients_of: str = "",
    supports: Callable[..., str | None],
    flops: Callable[..., Any],
    backward_flops: Callable[..., Any] = _no_gradient,
    saves_instead: Mapping[str, str] | None = None,
    same_gradient: Mapping[str, str] | None = None,
    fake: Callable[..., Any] | None = None,
    fake_backward: Callable[..., Any] | None = None,
    opaque_backward: bool = False,
    rows: str = "",
    devices: Sequence[str] = ("cuda",),
) -> Operator:
    """Declare and register an operator.

    Args:
        schema: ``"rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)"``. Every output is named.
            An input that may be absent is a ``Tensor?``; it is None everywhere then, and its gradient is never needed.
        reference: the formula in plain torch, with the schema's arguments; returns the schema's outputs as fresh
            tensors. Runs on any device and on fake tensors: it is the CPU kernel and the shape function, so its
            outputs' strides are the contract that ``forward`` has to meet.
        reference_backward: called as ``(*grads, *saved, *others, needs)`` where ``grads`` are the gradients of
            ``gradients_of``, ``saved`` is what ``saves`` names, ``others`` are the schema's non-tensor arguments in
            order, and ``needs[i]`` tells whether the gradient of ``differentiable[i]`` is wanted. Returns a tuple
            with a fresh tensor per differentiable input, None where it is not needed. It is written out, never
            autograd of the reference: otherwise what ``saves`` promises would go untested.
        forward, backward: the same contracts, on the devices named in ``devices``.
        saves: names of inputs and outputs that backward is given.
        differentiable: names of the tensor inputs that get a gradient. Without any the operator has no backward
            operator, and differentiating through it raises. A gradient that any other input wants would be lost: no
            formula is replaced there, and the soundness check counts no path through that input.
        gradients_of: names of the outputs that have a gradient. The others (statistics) are marked as having none.
        supports: called with the schema's arguments; None or the reason why the operator does not apply.
        flops, backward_flops: floating-point operations as a function of the schema's arguments (tensors, possibly
            with symbolic sizes); ``backward_flops`` is for all gradients together, and is given None for what
            ``saves_instead`` spares.
        saves_instead: ``{"z": "x"}`` where backward needs the optional input z, if there is one, in place of x: it is
            given None for x then, and x is not kept in memory for it. z may be an output as well, which counts as
            absent where its shape is (0,).
        same_gradient: ``{"residual": "x"}`` where the gradient of the input ``residual`` is that of the differentiable
            input ``x``: one tensor is both, and ``needs`` says whether either is wanted. They have one shape and dtype.
        fake: computes the outputs' shapes in place of the reference: for one that cannot be traced, because it loops
            over a size that may be symbolic or reads a constant tensor, or takes long to. The operator then stays
            opaque where others are replaced by their reference.
        fake_backward: the same for ``reference_backward``, which is still traced where the operator is replaced.
        opaque_backward: it cannot be traced either, so it stays as well.
        rows: for an operator that treats tokens apart, the inputs and outputs [..., features] with a row for each: a
            row of an output depends on that row of the inputs alone, and on all of the other inputs; an output that is
            not named is a sum over tokens. Backward is then taken to be alike: the gradient of what has rows has rows,
            any other is a sum. Such operators can be run on a few tokens at a time.
        devices: device types on which ``forward`` and ``backward`` run.
    """
    name = schema.split("(", 1)[0]
    parsed = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
    op = Operator(
        name=name,
        schema=parsed,
        reference=reference,
        reference_backward=reference_backward,
        forward=forward,
        backward=backward,
        saves=tuple(saves.split()),
        saves_instead=dict(saves_instead or {}),
        differentiable=tuple(differentiable.split()),
        gradients_of=tuple(gradients_of.split()),
        same_gradient=dict(same_gradient or {}),
        devices=tuple(devices),
        flops=flops,
        backward_flops=backward_flops,
        fake=fake,
        fake_backward=fake_backward or reference_backward,
        opaque_backward=opaque_backward,
        rows=tuple(rows.split()),
        _supports=supports,
    )
    _check_names(op)
    register_forward(op, schema[len(name) :])
    if op.differentiable:
        register_backward(op)
        register_autograd(op)
    else:
        refuse_gradients(op.name)
    register_flops(op)
    OPERATORS[name] = op
    return op


def operator_of(target: Any) -> Operator | None:
    """The operator whose forward a graph node's target is, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return OPERATORS.get(target._opname)
    return None


def launched(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The call without an autograd layer, for an operator of ours; any other as it is."""
    if target.namespace != NAMESPACE:
        return target
    return getattr(getattr(torch.ops, LAUNCH), target._opname).default


def _is_there(value: Tensor | None) -> bool:
    """Whether a tensor that is optional was given or made; how many elements it has may be symbolic."""
    return value is not None and not (value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0)


def _check_names(op: Operator) -> None:
    known = {*op.tensor_inputs, *op.outputs}
    for what, names, allowed in (
        ("saves", op.saves, known),
        ("differentiable", op.differentiable, set(op.tensor_inputs)),
        ("gradients_of", op.gradients_of, set(op.outputs)),
        ("rows", op.rows, known),
        ("same_gradient", op.same_gradient.keys(), set(op.tensor_inputs) - set(op.differentiable)),
        ("same_gradient", op.same_gradient.values(), set(op.differentiable)),
        ("saves_instead", (*op.saves_instead, *op.saves_instead.values()), set(op.saves)),
    ):
        if unknown := [n for n in names if n not in allowed]:
            raise ValueError(f"operator {op.name}: {what} names {unknown}, the schema has {sorted(allowed)}")
    if any(not n for n in op.outputs):
        raise ValueError(f"operator {op.name}: every output of the schema needs a name")


def _nbytes(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, (tuple, list)):
        return sum(_nbytes(v) for v in values)
    return 0


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, math.ceil(math.log2(max(n, 1))))
