"""The yardstick of every operator test: the eager formula, differentiated by autograd in float64.

On a machine with CUDA the kernels run for real; elsewhere on CPU tensors in Triton's interpreter (tests/conftest.py).
The references run in both places.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from unsloth.kernels.operator import Operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Arguments = tuple[Any, ...]
"""Of an operator's schema, in order: tensors on DEVICE, numbers, flags."""


def tensors(values: Any) -> tuple[Any, ...]:
    """What an operator or a formula returned, always as a tuple."""
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


# -- running an operator's two implementations -------------------------------------------------------------------------


def kernel_forward(op: Operator, *args: Any) -> tuple[Tensor, ...]:
    """All outputs, from the kernel."""
    return tensors(op.forward(*args))


def reference_forward(op: Operator, *args: Any) -> tuple[Tensor, ...]:
    """All outputs, from plain torch."""
    return tensors(op.reference(*args))


def kernel_backward(
    op: Operator,
    args: Arguments,
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``op.differentiable``, from the kernel; it is given what ``saves`` names and nothing else."""
    return op.backward(*_backward_arguments(op, args, outputs, grads, needs))


def reference_backward(
    op: Operator,
    args: Arguments,
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``op.differentiable``, from plain torch."""
    return op.reference_backward(*_backward_arguments(op, args, outputs, grads, needs))


IMPLEMENTATIONS = {
    "reference": (reference_forward, reference_backward),
    "kernel": (kernel_forward, kernel_backward),
}


def _backward_arguments(
    op: Operator, args: Arguments, outputs: Sequence[Tensor], grads: Sequence[Tensor], needs: Sequence[bool] | None
) -> Arguments:
    by_name = dict(zip(op.inputs, args, strict=True)) | dict(zip(op.outputs, outputs, strict=True))
    others = [by_name[name] for name in op.inputs if name not in op.tensor_inputs]
    return (*grads, *op.saved(by_name), *others, list(needs or _present(op, args)))


def _present(op: Operator, args: Arguments) -> list[bool]:
    """Which differentiable inputs are there at all."""
    by_name = dict(zip(op.inputs, args, strict=True))
    return [by_name[name] is not None for name in op.differentiable]


def random_grads(op: Operator, outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Upstream gradients, in the layout of the outputs that have one."""
    generator = torch.Generator(DEVICE).manual_seed(1000 + seed)
    graded = [outputs[op.outputs.index(name)] for name in op.gradients_of]
    return [torch.randn(y.shape, generator=generator, device=DEVICE).to(y.dtype) for y in graded]


# -- accuracy ----------------------------------------------------------------------------------------------------------


def assert_accurate(
    op: Operator,
    make_inputs: Callable[[Any, torch.dtype, int], Arguments],
    eager: Callable[..., Any],
    *,
    dtypes: Iterable[torch.dtype],
    shapes: Iterable[Any],
    seeds: Iterable[int] = range(3),
) -> None:
    """Hold reference and kernel to the project's accuracy bar, forward and for each gradient.

    The truth is autograd of ``eager`` in float64 on the same, already rounded, inputs. The error is norm-wise and
    relative, its median over the seeds at most 1.1 times that of ``eager`` in the inputs' own dtype, or at most two
    units in the last place of the value's dtype where eager is (nearly) exact. Both implementations must also agree
    on shapes, dtypes and strides, and return fresh memory.

    Args:
        make_inputs: called as ``(shape, dtype, seed)``; returns the operator's arguments. A shape may be anything.
        eager: takes the operator's arguments, returns the outputs that ``op.gradients_of`` names, as a model would
            compute them.
    """
    for dtype, shape in itertools.product(dtypes, shapes):
        cases = [_Case(op, make_inputs(shape, dtype, seed), eager, seed) for seed in seeds]
        for name, (forward, backward) in IMPLEMENTATIONS.items():
            if name == "kernel" and dtype == torch.float64:
                continue  # float64 always runs the reference
            results = [case.run(forward, backward) for case in cases]
            for i, label in enumerate(cases[0].labels):
                error = median(_error(r[i], c.truth[i]) for r, c in zip(results, cases, strict=True))
                eagers = median(_error(c.eager[i], c.truth[i]) for c in cases)
                bar = max(1.1 * eagers, 2 * torch.finfo(results[0][i].dtype).eps)
                assert error <= bar, (
                    f"{op.name} {name}, {label}, {dtype}, {shape}: relative error {error:.2e}, eager has {eagers:.2e}"
                )


class _Case:
    """One set of inputs with its truth and what eager makes of it: graded outputs first, then gradients."""

    def __init__(self, op: Operator, args: Arguments, eager: Callable[..., Any], seed: int) -> None:
        self.op, self.args = op, args
        self.grads = random_grads(op, op.reference(*args) if len(op.outputs) > 1 else (op.reference(*args),), seed)
        wanted = itertools.compress(op.differentiable, _present(op, args))
        self.labels = [*op.gradients_of, *(f"gradient of {name}" for name in wanted)]
        self.eager = self._differentiate(eager, lambda x: x)
        self.truth = self._differentiate(eager, lambda x: x.double() if x.is_floating_point() else x)

    def _differentiate(self, formula: Callable[..., Any], convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = {
            name: convert(x.detach()).requires_grad_(name in self.op.differentiable)
            for name, x in zip(self.op.inputs, self.args, strict=True)
            if isinstance(x, Tensor)
        }
        outputs = tensors(formula(*(leaves.get(n, a) for n, a in zip(self.op.inputs, self.args, strict=True))))
        wrt = [leaves[name] for name in self.op.differentiable if name in leaves]
        gradients = torch.autograd.grad(outputs, wrt, [g.to(y.dtype) for g, y in zip(self.grads, outputs, strict=True)])
        return [y.detach() for y in outputs] + list(gradients)

    def run(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> list[Tensor]:
        op = self.op
        expected = reference_forward(op, *self.args)
        outputs = forward(op, *self.args)
        gradients = backward(op, self.args, outputs, self.grads)
        assert_same_layout(outputs, expected)
        assert_same_layout(gradients, reference_backward(op, self.args, expected, self.grads))
        inputs = [x for x in (*self.args, *self.grads) if isinstance(x, Tensor)]
        assert_fresh((*outputs, *gradients), inputs)
        return [outputs[op.outputs.index(name)] for name in op.gradients_of] + [g for g in gradients if g is not None]


def _error(x: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm; zero for empty tensors."""
    norm = truth.norm()
    return float((x.double() - truth).norm() / norm) if norm > 0 else float(x.double().norm())


# -- contract ----------------------------------------------------------------------------------------------------------


def assert_same_layout(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Shapes, dtypes and strides are one; strides of dimensions that are never stepped along say nothing."""
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            assert a is e
            continue
        assert a.shape == e.shape and a.dtype == e.dtype, f"{a.shape} {a.dtype}, expected {e.shape} {e.dtype}"
        steps = [i for i, size in enumerate(e.shape) if size > 1] if e.numel() else []
        assert all(a.stride(i) == e.stride(i) for i in steps), f"strides {a.stride()}, expected {e.stride()}"


def assert_fresh(outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> None:
    """No output shares memory with an input or another output."""
    owned = [x.untyped_storage().data_ptr() for x in outputs if x is not None and x.numel()]
    taken = [x.untyped_storage().data_ptr() for x in inputs if x.numel()]
    assert len(set(owned)) == len(owned) and not set(owned) & set(taken), "an output shares memory"


def assert_skips_unneeded(op: Operator, *args: Any) -> None:
    """Every subset of gradients: None where not needed, and the needed ones do not change with the others."""
    for forward, backward in IMPLEMENTATIONS.values():
        outputs = forward(op, *args)
        grads = random_grads(op, outputs)
        everything = backward(op, args, outputs, grads)
        for needs in itertools.product(*([True, False] if present else [False] for present in _present(op, args))):
            some = backward(op, args, outputs, grads, needs)
            assert len(some) == len(needs)
            for need, gradient, full in zip(needs, some, everything, strict=True):
                assert (gradient is not None) == need
                if gradient is not None:
                    torch.testing.assert_close(gradient, full)


def opcheck(op: Operator, *args: Any) -> None:
    """PyTorch's own checks of schema, fake, autograd registration and AOT dispatch, of both registered operators."""
    leaves = [
        a.detach().requires_grad_(name in op.differentiable) if isinstance(a, Tensor) else a
        for name, a in zip(op.inputs, args, strict=True)
    ]
    torch.library.opcheck(op.overload, tuple(leaves))
    outputs = tensors(op.overload(*args))
    grads = random_grads(op, outputs)
    backward = _backward_arguments(op, args, outputs, grads, None)
    torch.library.opcheck(op.overload_backward, backward, test_utils=("test_schema", "test_faketensor"))


# -- compiling without a GPU -------------------------------------------------------------------------------------------

_COMPILE_INSTEAD_OF_LAUNCHING = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Device:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def compile_only(self, *args, grid, warmup, **kwargs):
    assert run(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"]
    print(self.__name__)

triton.runtime.driver.set_active(Device())
run, JITFunction.run = JITFunction.run, compile_only
"""


def assert_compiles(code: str) -> None:
    """Run code whose launches compile for Hopper instead: the interpreter accepts what the compiler refuses.

    The code gives CPU tensors to operators' ``forward`` and ``backward``. It runs in a process of its own, because this
    one may have imported Triton as an interpreter.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE_INSTEAD_OF_LAUNCHING + code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout, f"{result.stdout}\n{result.stderr[-2000:]}"


# -- symbolic shapes ---------------------------------------------------------------------------------------------------


@contextmanager
def symbolic(*args: Any, static: Sequence[int] = (-1,)) -> Iterator[tuple[Any, ...]]:
    """The arguments with symbolic sizes, except in the dimensions ``static``; fails if anything guarded on one.

    Sizes that are equal share a symbol, so give different sizes to what shall be independent; 0 and 1 stay numbers.
    """
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        sizes = [DimDynamic.DUCK] * x.dim()
        for i in static:
            if -x.dim() <= i < x.dim():
                sizes[i] = DimDynamic.STATIC
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    fakes = tuple(fake(x) for x in args)
    before = list(shape_env.guards)
    with mode:
        yield fakes
    assert shape_env.guards == before, f"guards on symbolic sizes: {shape_env.guards}"


def assert_symbolic(op: Operator, *args: Any, static: Sequence[int] = (-1,)) -> None:
    """``supports``, shapes, FLOPs and bytes work on symbolic sizes without guarding on them."""
    with symbolic(*args, static=static) as fakes:
        assert op.supports(*fakes) is None
        outputs = tensors(op.overload(*fakes))
        grads = [torch.empty_like(outputs[op.outputs.index(name)]) for name in op.gradients_of]
        op.overload_backward(*_backward_arguments(op, fakes, outputs, grads, None))
        assert isinstance(op.flops(*fakes), torch.SymInt) and isinstance(op.backward_flops(*fakes), torch.SymInt)
        assert isinstance(op.bytes(*fakes), torch.SymInt)
