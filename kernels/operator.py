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

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "unsloth"
LAUNCH = f"{NAMESPACE}_launch"

# Not ``torch.library.custom_op``: its checks at every call cost as much time as a launch.
_LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in (NAMESPACE, LAUNCH)}

OPERATORS: dict[str, Operator] = {}
"""Every declared operator by name."""


class KernelWarning(UserWarning):
    """A kernel raised and was replaced by its reference for the rest of the process."""


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
        return tuple(a.name for a in self.schema.arguments if _is_tensor(a))

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
        return _as_returned(self.reference_backward(*args), args[0])

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
            operator, and differentiating through it raises.
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
        _supports=supports,
    )
    _check_names(op)
    _register_forward(op, schema[len(name) :])
    if op.differentiable:
        _register_backward(op)
        _register_autograd(op)
    else:
        _refuse_gradients(op.name)
    _register_flops(op)
    OPERATORS[name] = op
    return op


def operator_of(target: Any) -> Operator | None:
    """The operator whose forward a graph node's target is, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return OPERATORS.get(target._opname)
    return None


def switch_off(op: Operator, reason: str) -> None:
    """Disable an operator's kernel for this process; graphs that use it are compiled again without it."""
    if op.disabled is None:
        op.disabled = reason
        warnings.warn(f"{NAMESPACE}: the {op.name} kernel failed and is switched off: {reason}", KernelWarning, 2)


# -- wiring ------------------------------------------------------------------------------------------------------------


def _is_there(value: Tensor | None) -> bool:
    """Whether a tensor that is optional was given or made; how many elements it has may be symbolic."""
    return value is not None and not (value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0)


def _is_tensor(argument: Any) -> bool:
    return _type_name(argument) in ("Tensor", "Tensor?")


def _check_names(op: Operator) -> None:
    known = {*op.tensor_inputs, *op.outputs}
    for what, names, allowed in (
        ("saves", op.saves, known),
        ("differentiable", op.differentiable, set(op.tensor_inputs)),
        ("gradients_of", op.gradients_of, set(op.outputs)),
        ("same_gradient", op.same_gradient.keys(), set(op.tensor_inputs) - set(op.differentiable)),
        ("same_gradient", op.same_gradient.values(), set(op.differentiable)),
        ("saves_instead", (*op.saves_instead, *op.saves_instead.values()), set(op.saves)),
    ):
        if unknown := [n for n in names if n not in allowed]:
            raise ValueError(f"operator {op.name}: {what} names {unknown}, the schema has {sorted(allowed)}")
    if any(not n for n in op.outputs):
        raise ValueError(f"operator {op.name}: every output of the schema needs a name")


def _dispatch(op: Operator, kernel: Callable[..., Any], reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Run the kernel where there is one, the reference elsewhere; never under the ambient autocast."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    if torch.is_autocast_enabled(device.type) or _is_elsewhere(device):
        with _ambient(device):
            return _run(op, kernel, reference, args, device)
    return _run(op, kernel, reference, args, device)


def _run(op: Operator, kernel: Any, reference: Any, args: tuple[Any, ...], device: torch.device) -> Any:
    if op.runs_kernel_on(device.type):
        try:
            return kernel(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  the operator is functional: its reference can always take over
            switch_off(op, f"{type(error).__name__}: {error}")
    return reference(*args)


def _is_elsewhere(device: torch.device) -> bool:
    """Whether Triton would launch on another device than the tensors'."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


@contextlib.contextmanager
def _ambient(device: torch.device) -> Iterator[None]:
    """Autocast off, and Triton launches on the tensors' own device."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if _is_elsewhere(device):
            stack.enter_context(torch.cuda.device(device))
        yield


def _define(op: Operator, name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator in both namespaces; returns the one that can be given an autograd layer."""
    for namespace, library in _LIBRARIES.items():
        library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    differentiated, launch = (getattr(getattr(torch.ops, namespace), name).default for namespace in _LIBRARIES)
    op.launch[differentiated] = launch
    return differentiated


def _register_forward(op: Operator, signature: str) -> None:
    def run(*args: Any) -> Any:
        return _dispatch(op, op.forward, op.reference, args)

    op.overload = _define(op, op.name, signature, run, op.fake or op.reference)


def _register_backward(op: Operator) -> None:
    maybe_none = {a.name for a in op.schema.arguments if _type_name(a) == "Tensor?"} | {*op.saves_instead.values()}
    arguments = [
        *(f"Tensor grad_{name}" for name in op.gradients_of),
        *(f"Tensor? {name}" if name in maybe_none else f"Tensor {name}" for name in op.saves),
        *(f"{_type_name(a)} {a.name}" for a in op.schema.arguments if not _is_tensor(a)),
        "bool[] needs",
    ]
    returns = ", ".join(f"Tensor grad_of_{name}" for name in op.differentiable)

    def run(*args: Any) -> Any:
        return _as_returned(_dispatch(op, op.backward, op.reference_backward, args), args[0])

    name = f"{op.name}_backward"

    def fake(*args: Any) -> Any:
        return _as_returned(op.fake_backward(*args), args[0])

    op.overload_backward = _define(op, name, f"({', '.join(arguments)}) -> ({returns})", run, fake)
    _refuse_gradients(name)


def _refuse_gradients(name: str) -> None:
    """Raise where a gradient is asked of an operator that has none, instead of going on without it."""

    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{NAMESPACE}::{name} is not differentiable")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=_LIBRARIES[NAMESPACE])


def _as_returned(gradients: Sequence[Tensor | None], like: Tensor) -> Any:
    # A dispatcher schema cannot return None, so a gradient that nobody wants is an empty tensor.
    filled = [like.new_empty(0) if g is None else g for g in gradients]
    return tuple(filled) if len(filled) > 1 else filled[0]


def _register_autograd(op: Operator) -> None:
    inputs, outputs = op.inputs, op.outputs
    others = [i for i, a in enumerate(op.schema.arguments) if not _is_tensor(a)]
    positions = [inputs.index(name) for name in op.differentiable]
    followers = {inputs.index(name): inputs.index(of) for name, of in op.same_gradient.items()}
    graded = [outputs.index(name) for name in op.gradients_of]
    statistics = [i for i in range(len(outputs)) if i not in graded]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        by_name = dict(zip(op.inputs, inputs, strict=True)) | dict(zip(outputs, values, strict=True))
        ctx.save_for_backward(*op.saved(by_name))
        ctx.others = [inputs[i] for i in others]
        ctx.mark_non_differentiable(*(values[i] for i in statistics))

    def backward(ctx: Any, *grads: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad)
        for follower, of in followers.items():
            wanted[of] |= wanted[follower]
        needs = [bool(wanted[i]) for i in positions]
        result = op.overload_backward(*(grads[i] for i in graded), *ctx.saved_tensors, *ctx.others, needs)
        gradients: list[Tensor | None] = [None] * len(inputs)
        values = result if isinstance(result, tuple) else (result,)
        for i, need, value in zip(positions, needs, values, strict=True):
            gradients[i] = value if need else None
        for follower, of in followers.items():
            gradients[follower] = gradients[of] if ctx.needs_input_grad[follower] else None
        return tuple(gradients)

    name = f"{NAMESPACE}::{op.name}"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARIES[NAMESPACE])


def _register_flops(op: Operator) -> None:
    def forward_formula(*args: Any, out_val: Any = None, **_: Any) -> Any:
        return op.flops(*args)

    def backward_formula(*args: Any, out_val: Any = None, **_: Any) -> Any:
        # The backward operator is given saved values, not the schema's arguments: rebuild them by name. An input that
        # backward does not save is not part of its arithmetic either, except through the gradient's shape.
        names = [*(f"grad_{n}" for n in op.gradients_of), *op.saves]
        names += [a.name for a in op.schema.arguments if not _is_tensor(a)]
        given = dict(zip(names, args, strict=False))
        return op.backward_flops(*(given.get(name, args[0]) for name in op.inputs))

    namespace = getattr(torch.ops, NAMESPACE)
    register_flop_formula(getattr(namespace, op.name), get_raw=True)(forward_formula)
    if op.differentiable:
        register_flop_formula(getattr(namespace, f"{op.name}_backward"), get_raw=True)(backward_formula)


def _type_name(argument: Any) -> str:
    """The schema spelling of an argument's type: ``Optional[float]`` is written ``float?``, ``List[int]`` ``int[]``."""
    name = str(argument.type)
    for prefix, suffix in (("Optional[", "?"), ("List[", "[]")):
        if name.startswith(prefix):
            return name[len(prefix) : -1] + suffix
    return name


def _nbytes(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, (tuple, list)):
        return sum(_nbytes(v) for v in values)
    return 0


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, math.ceil(math.log2(max(n, 1))))
