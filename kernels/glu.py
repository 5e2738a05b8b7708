"""Gated linear units: swiglu = silu(gate) * up and geglu = gelu(gate) * up.

Shazeer 2020, arXiv:2002.05202; gelu is Hendrycks & Gimpel 2016, arXiv:1606.08415, exact (erf) or by tanh. gate, up
and y have one shape [..., intermediate] and one dtype; all between is float32 and y is rounded once (eager bf16 also
rounds the activation before the product).

Forward moves 3 values per element (reads gate, up; writes y), backward 5 (reads grad, gate, up; writes dgate, dup): for
8192 x 14336 in bf16 that is 0.70 GB and 1.17 GB, or 0.24 ms and 0.40 ms at the 2.97 TB/s that an H100 copies with. The
arithmetic hides behind the loads.

gate and up may be the two halves of one projection: rows with a stride of their own are read where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .launch import Fresh, Launch, by_layout
from .operator import operator
from .reasons import dtype_is
from .rows import row_stride

BYTES_PER_THREAD = 32
"""Two 128-bit accesses per tensor and thread: enough loads in flight to fill the memory pipeline of an H100."""
WARPS = 4

CUBIC = 0.044715
"""Of the tanh form: gelu(x) ~ x (1 + tanh z) / 2 with z = sqrt(2/pi) (x + CUBIC x^3)."""

# Constants that the kernels read.
SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_2Z = tl.constexpr(2 * math.sqrt(2 / math.pi))
_2Z_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * CUBIC)
_2Z_3CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 3 * CUBIC)


# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).contiguous()


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_slope(x: Tensor, tanh: bool) -> Tensor:
    if tanh:
        t = torch.tanh(math.sqrt(2 / math.pi) * (x + CUBIC * x**3))
        z_slope = math.sqrt(2 / math.pi) * (1 + 3 * CUBIC * x * x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * z_slope
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu(x: Tensor, tanh: bool) -> Tensor:
    return F.gelu(x, approximate="tanh" if tanh else "none")


def _swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return _rounded(F.silu(_wide(gate)) * _wide(up), gate)


def _geglu_reference(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return _rounded(_gelu(_wide(gate), tanh) * _wide(up), gate)


def _swiglu_reference_backward(grad: Tensor, gate: Tensor, up: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    grad_, gate_, up_ = _wide(grad), _wide(gate), _wide(up)
    return (
        _rounded(grad_ * up_ * _silu_slope(gate_), gate) if needs[0] else None,
        _rounded(grad_ * F.silu(gate_), up) if needs[1] else None,
    )


def _geglu_reference_backward(
    grad: Tensor, gate: Tensor, up: Tensor, tanh: bool, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    grad_, gate_, up_ = _wide(grad), _wide(gate), _wide(up)
    return (
        _rounded(grad_ * up_ * _gelu_slope(gate_, tanh), gate) if needs[0] else None,
        _rounded(grad_ * _gelu(gate_, tanh), up) if needs[1] else None,
    )


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _share(x, ACT: tl.constexpr):
    """The part of x that the gate lets through, act(x) = x * share(x), and its derivative."""
    if ACT == GELU:
        share = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        slope = tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    else:
        if ACT == SILU:
            z = x
            z_slope = 1.0
        else:  # (1 + tanh z) / 2 is sigmoid(2z)
            z = x * (x * x * _2Z_CUBIC + _2Z)
            z_slope = x * x * _2Z_3CUBIC + _2Z
        # sigmoid(z) without overflow, and sigmoid(z) (1 - sigmoid(z)) without the difference, which cancels.
        e = tl.exp(-tl.abs(z))
        r = 1 / (1 + e)
        share = tl.where(z < 0, e * r, r)
        slope = e * r * r * z_slope
    return share, slope


@triton.jit
def _tile(width, BLOCK: tl.constexpr):
    """This program's row, its first column in it, and its lanes.

    Positions are 64-bit scalars, the lanes 32-bit: tensors of any size at the price of 32-bit vector arithmetic.
    """
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return row, start, tl.arange(0, BLOCK)


@triton.jit
def _glu_forward_kernel(
    gate, up, y, width, gate_stride, up_stride, ACT: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    row, start, lane = _tile(width, BLOCK)
    inside = None if EVEN else start + lane < width
    g = tl.load(gate + row * gate_stride + start + lane, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + start + lane, mask=inside).to(tl.float32)
    share, _ = _share(g, ACT)
    tl.store(y + row * width + start + lane, g * share * u, mask=inside)


@triton.jit
def _glu_backward_kernel(
    grad,
    gate,
    up,
    dgate,
    dup,
    width,
    grad_stride,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, start, lane = _tile(width, BLOCK)
    inside = None if EVEN else start + lane < width
    dy = tl.load(grad + row * grad_stride + start + lane, mask=inside).to(tl.float32)
    g = tl.load(gate + row * gate_stride + start + lane, mask=inside).to(tl.float32)
    share, slope = _share(g, ACT)
    if NEED_GATE:
        u = tl.load(up + row * up_stride + start + lane, mask=inside).to(tl.float32)
        tl.store(dgate + row * width + start + lane, dy * u * (share + g * slope), mask=inside)
    if NEED_UP:
        tl.store(dup + row * width + start + lane, dy * g * share, mask=inside)


# -- launch ------------------------------------------------------------------------------------------------------------


def _readable(*tensors: Tensor) -> tuple[list[int], list[Callable[[Tensor], Tensor] | None], int, int]:
    """Row strides of tensors of one shape, what copies those that have none, the number of rows and their width.

    Contiguous tensors are one long row.
    """
    shape = tensors[0].shape
    in_place = [row_stride(x) for x in tensors]
    rows, width = math.prod(shape[:-1]), shape[-1]
    strides = [width if stride is None else stride for stride in in_place]
    if all(stride == width for stride in strides):
        rows, width = 1, rows * width
    return strides, [Tensor.contiguous if stride is None else None for stride in in_place], rows, width


def _tiling(rows: int, width: int, itemsize: int) -> tuple[int, dict[str, Any]]:
    """Number of programs and their block."""
    block = WARPS * 32 * BYTES_PER_THREAD // itemsize
    return rows * triton.cdiv(width, block), {"BLOCK": block, "EVEN": width % block == 0}


@by_layout
def _forward_launch(gate: Tensor, up: Tensor, act: int) -> Launch:
    strides, copies, rows, width = _readable(gate, up)
    programs, block = _tiling(rows, width, gate.element_size())
    return Launch(
        _glu_forward_kernel,
        programs,
        device=gate.device,
        results=[Fresh.contiguous(gate.shape, gate.dtype)],
        scalars=(width, *strides),
        constants={"ACT": act, **block},
        copies=copies,
        num_warps=WARPS,
    )


@by_layout
def _backward_launch(grad: Tensor, gate: Tensor, up: Tensor, act: int, need_gate: bool, need_up: bool) -> Launch:
    strides, copies, rows, width = _readable(grad, gate, up)
    programs, block = _tiling(rows, width, gate.element_size())
    return Launch(
        _glu_backward_kernel,
        programs if need_gate or need_up else 0,
        device=gate.device,
        results=[Fresh.contiguous(gate.shape, gate.dtype) if need else None for need in (need_gate, need_up)],
        scalars=(width, *strides),
        constants={"ACT": act, "NEED_GATE": need_gate, "NEED_UP": need_up, **block},
        copies=copies,
        num_warps=WARPS,
    )


def _forward(gate: Tensor, up: Tensor, act: int) -> Any:
    return _forward_launch(gate, up, act)(gate, up)[0]


def _backward(grad: Tensor, gate: Tensor, up: Tensor, act: int, needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(_backward_launch(grad, gate, up, act, *needs)(grad, gate, up))


def _swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    return _forward(gate, up, SILU.value)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    return _backward(grad, gate, up, SILU.value, needs)


def _geglu_forward(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return _forward(gate, up, GELU_TANH.value if tanh else GELU.value)


def _geglu_backward(grad: Tensor, gate: Tensor, up: Tensor, tanh: bool, needs: list[bool]) -> tuple[Tensor | None, ...]:
    return _backward(grad, gate, up, GELU_TANH.value if tanh else GELU.value, needs)


# -- the operators -----------------------------------------------------------------------------------------------------


def _supports(gate: Tensor, up: Tensor, *_: Any) -> str | None:
    if reason := dtype_is(gate, torch.bfloat16, torch.float16, torch.float32):
        return reason
    if gate.dtype != up.dtype:
        return f"gate is {gate.dtype} and up is {up.dtype}"
    if gate.dim() == 0 or gate.dim() != up.dim():
        return f"gate has {gate.dim()} dimensions and up has {up.dim()}"
    if not all(statically_known_true(g == u) for g, u in zip(gate.shape, up.shape, strict=True)):
        return f"gate {tuple(gate.shape)} and up {tuple(up.shape)} are not known to have one shape"
    return None


# Operations per element, an exponential or a division counted as one.
swiglu = operator(
    "swiglu(Tensor gate, Tensor up) -> (Tensor y)",
    reference=_swiglu_reference,
    reference_backward=_swiglu_reference_backward,
    forward=_swiglu_forward,
    backward=_swiglu_backward,
    saves="gate up",
    differentiable="gate up",
    gradients_of="y",
    rows="gate up y",
    supports=_supports,
    flops=lambda gate, up: 6 * gate.numel(),
    backward_flops=lambda gate, up: 12 * gate.numel(),
)

geglu = operator(
    "geglu(Tensor gate, Tensor up, bool tanh) -> (Tensor y)",
    reference=_geglu_reference,
    reference_backward=_geglu_reference_backward,
    forward=_geglu_forward,
    backward=_geglu_backward,
    saves="gate up",
    differentiable="gate up",
    gradients_of="y",
    rows="gate up y",
    supports=_supports,
    flops=lambda gate, up, tanh: 11 * gate.numel(),
    backward_flops=lambda gate, up, tanh: 20 * gate.numel(),
)
