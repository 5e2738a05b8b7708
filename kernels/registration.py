"""How a declared operator becomes one of PyTorch's: dispatch, fakes, autograd, FLOP formulas, a way on when it fails.

A declaration (:mod:`operator`) is registered twice, under ``torch.ops.unsloth`` with autograd and under
``torch.ops.unsloth_launch`` without; both run the kernel where there is one and the reference elsewhere.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .shapes import once_per_layout

if TYPE_CHECKING:
    from .operator import Operator

NAMESPACE = "unsloth"
LAUNCH = f"{NAMESPACE}_launch"

# Not ``torch.library.custom_op``: its checks at every call cost as much time as a launch.
_LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in (NAMESPACE, LAUNCH)}


class KernelWarning(UserWarning):
    """A kernel raised and was replaced by its reference for the rest of the process."""


def switch_off(op: Operator, reason: str) -> None:
    """Disable an operator's kernel for this process; graphs that use it are compiled again without it."""
    if op.disabled is None:
        op.disabled = reason
        warnings.warn(f"{NAMESPACE}: the {op.name} kernel failed and is switched off: {reason}", KernelWarning, 2)


def is_tensor(argument: Any) -> bool:
    return type_name(argument) in ("Tensor", "Tensor?")


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
    fake = once_per_layout(fake)
    for namespace, library in _LIBRARIES.items():
        library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    differentiated, launch = (getattr(getattr(torch.ops, namespace), name).default for namespace in _LIBRARIES)
    op.launch[differentiated] = launch
    return differentiated


def register_forward(op: Operator, signature: str) -> None:
    def run(*args: Any) -> Any:
        return _dispatch(op, op.forward, op.reference, args)

    op.overload = _define(op, op.name, signature, run, op.fake or op.reference)


def register_backward(op: Operator) -> None:
    maybe_none = {a.name for a in op.schema.arguments if type_name(a) == "Tensor?"} | {*op.saves_instead.values()}
    arguments = [
        *(f"Tensor grad_{name}" for name in op.gradients_of),
        *(f"Tensor? {name}" if name in maybe_none else f"Tensor {name}" for name in op.saves),
        *(f"{type_name(a)} {a.name}" for a in op.schema.arguments if not is_tensor(a)),
        "bool[] needs",
    ]
    returns = ", ".join(f"Tensor grad_of_{name}" for name in op.differentiable)

    def run(*args: Any) -> Any:
        return as_returned(_dispatch(op, op.backward, op.reference_backward, args), args[0])

    name = f"{op.name}_backward"

    def fake(*args: Any) -> Any:
        return as_returned(op.fake_backward(*args), args[0])

    op.overload_backward = _define(op, name, f"({', '.join(arguments)}) -> ({returns})", run, fake)
    refuse_gradients(name)


def refuse_gradients(name: str) -> None:
    """Raise where a gradient is asked of an operator that has none, instead of going on without it."""

    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{NAMESPACE}::{name} is not differentiable")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=_LIBRARIES[NAMESPACE])


def as_returned(gradients: Sequence[Tensor | None], like: Tensor) -> Any:
    # A dispatcher schema cannot return None, so a gradient that nobody wants is an empty tensor.
    filled = [like.new_empty(0) if g is None else g for g in gradients]
    return tuple(filled) if len(filled) > 1 else filled[0]


def register_autograd(op: Operator) -> None:
    inputs, outputs = op.inputs, op.outputs
    others = [i for i, a in enumerate(op.schema.arguments) if not is_tensor(a)]
    positions = [inputs.index(name) for name in op.differentiable]
    followers = {inputs.index(name): inputs.index(of) for name, of in op.same_gradient.items()}
    given = {*positions, *followers}
    graded = [outputs.index(name) for name in op.gradients_of]
    statistics = [i for i in range(len(outputs)) if i not in graded]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        by_name = dict(zip(op.inputs, inputs, strict=True)) | dict(zip(outputs, values, strict=True))
        ctx.save_for_backward(*op.saved(by_name))
        ctx.others = [inputs[i] for i in others]
        ctx.mark_non_differentiable(*(values[i] for i in statistics))
        # Autograd's own record leads to every tensor, those that backward has nothing for included.
        ctx.leads_to = tuple(i in given for i, value in enumerate(inputs) if isinstance(value, Tensor))

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


def register_flops(op: Operator) -> None:
    def forward_formula(*args: Any, out_val: Any = None, **_: Any) -> Any:
        return op.flops(*args)

    def backward_formula(*args: Any, out_val: Any = None, **_: Any) -> Any:
        # The backward operator is given saved values, not the schema's arguments: rebuild them by name. An input that
        # backward does not save is not part of its arithmetic either, except through the gradient's shape.
        names = [*(f"grad_{n}" for n in op.gradients_of), *op.saves]
        names += [a.name for a in op.schema.arguments if not is_tensor(a)]
        given = dict(zip(names, args, strict=False))
        return op.backward_flops(*(given.get(name, args[0]) for name in op.inputs))

    namespace = getattr(torch.ops, NAMESPACE)
    register_flop_formula(getattr(namespace, op.name), get_raw=True)(forward_formula)
    if op.differentiable:
        register_flop_formula(getattr(namespace, f"{op.name}_backward"), get_raw=True)(backward_formula)


def type_name(argument: Any) -> str:
    """The schema spelling of an argument's type: ``Optional[float]`` is written ``float?``, ``List[int]`` ``int[]``."""
    name = str(argument.type)
    for prefix, suffix in (("Optional[", "?"), ("List[", "[]")):
        if name.startswith(prefix):
            return name[len(prefix) : -1] + suffix
    return name
