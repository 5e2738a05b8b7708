"""The accuracy bar of DESIGN.md: an operator against float64, beside what eager PyTorch makes of the formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from unsloth.kernels.operator import Operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests' tensors live: real kernels on CUDA, Triton's interpreter on the CPU."""


def assert_accurate(
    op: Operator,
    inputs: Callable[[int], Sequence[Tensor]],
    *others: Any,
    eager: Callable[..., Tensor],
    exact: Callable[..., Tensor] | None = None,
    seeds: int = 3,
) -> None:
    """Both the kernel and the reference of ``op`` are as accurate as eager, forward and every gradient.

    The error is norm-wise against autograd of the formula in float64 on the same, already rounded inputs; its median
    over seeds is at most 1.1 times eager's, or two units of rounding of the output's dtype.

    Args:
        inputs: makes the operator's differentiable inputs from a seed.
        others: the operator's other arguments.
        eager: the formula as a model spells it, run in the inputs' dtype.
        exact: the formula that is run in float64, where it is another spelling.
    """
    errors: dict[str, list[list[float]]] = {"eager": [], "kernel": [], "reference": []}
    for seed in range(seeds):
        tensors = inputs(seed)
        with torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            grad = torch.randn(eager(*tensors, *others).shape, device=DEVICE).to(tensors[0].dtype)
        truth = _with_gradients(exact or eager, [x.double() for x in tensors], others, grad.double())
        results = {
            "eager": _with_gradients(eager, tensors, others, grad),
            "kernel": run(op, tensors, others, grad, kernel=True),
            "reference": run(op, tensors, others, grad, kernel=False),
        }
        for name, values in results.items():
            errors[name].append([relative_error(x, t) for x, t in zip(values, truth, strict=True)])

    dtype = inputs(0)[0].dtype
    for which, what in enumerate(("output", *(f"gradient of {name}" for name in op.differentiable))):
        found = {name: median(run[which] for run in runs) for name, runs in errors.items()}
        bar = max(1.1 * found["eager"], torch.finfo(dtype).eps)
        for name in ("kernel", "reference"):
            assert found[name] <= bar, f"{op.name} {name}, {what}, {dtype}: error {found[name]:.2e}, eager's {found}"


def run(
    op: Operator,
    tensors: Sequence[Tensor],
    others: Sequence[Any],
    grad: Tensor,
    needs: Sequence[bool] | None = None,
    kernel: bool = True,
) -> list[Any]:
    """The graded output and the gradients, by calling the operator's functions directly; backward gets only `saves`."""
    forward, backward = (op.forward, op.backward) if kernel else (op.reference, op.reference_backward)
    returned = forward(*tensors, *others)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    by_name = dict(zip(op.inputs, [*tensors, *others], strict=True)) | dict(zip(op.outputs, outputs, strict=True))
    saved = [by_name[name] for name in op.saves]
    gradients = backward(grad, *saved, *others, list(needs or [True] * len(op.differentiable)))
    return [by_name[op.gradients_of[0]], *gradients]


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Norm-wise; 0 where both are zero."""
    assert x.shape == truth.shape, (x.shape, truth.shape)
    difference = float((x.double() - truth.double()).norm())
    return difference / float(truth.double().norm()) if difference else 0.0


def _with_gradients(
    formula: Callable[..., Tensor], tensors: Sequence[Tensor], others: Sequence[Any], grad: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = formula(*leaves, *others)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]
