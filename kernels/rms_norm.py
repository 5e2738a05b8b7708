"""Root-mean-square normalisation, y = x / rms(x) * (weight + offset) with rms(x) = sqrt(mean(x^2) + eps); and of a sum.

Zhang & Sennrich 2019, arXiv:1910.07467. x: [..., hidden], weight: [hidden]; statistics and arithmetic in float32
(float64 in float64). Without a weight, y = x / rms(x) * offset: offset 1 is the plain norm, and hidden^-1/2 with eps /
hidden in place of eps is x / sqrt(sum(x^2) + eps), the L2 norm. Models differ in where they round, and so in y's dtype:

* ``round_first``: the normalised x returns to x's dtype, then it is scaled: y has the promotion of x's and weight's
  dtypes (Llama; float32 for bf16 x and float32 weight);
* otherwise it is scaled in float32 and rounded once, to x's dtype (Gemma with offset 1, OLMo 2, T5).

y has x's order in memory, as after any elementwise operation. rstd = 1 / rms(x), float32, of shape x.shape[:-1] and in
that order too, is what backward wants besides x and weight. With n = x * rstd and g = dy * (weight + offset):

    dx = rstd * (g - n * mean(g * n)),    dweight = sum over rows of dy * n.

``add_rms_norm`` normalises total = x + residual, rounded to x's dtype as the residual stream is, and returns it too.
The gradient that comes back along the stream is added inside; the result is that of x and of the residual alike.

Rows are read once and held in registers. For r rows of bf16, forward moves 4 * r * hidden bytes (x, y) and backward
6 * r * hidden (dy, x, dx), weight and rstd being negligible: 8192 x 4096 is 134 MB and 201 MB, at least 45 us and 68 us
at 2.97 TB/s (H100 copy), 31 us and 47 us at 4.3 TB/s (H200). With the sum it is 8 * r * hidden either way, 90 us, where
a sum of its own costs 10 and 12. The trainable weight's gradient writes and reads [programs, hidden] float32 besides,
9% more; it is summed in a fixed order, the same in every run on a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from .launch import Fresh, Launch, by_layout
from .operator import operator
from .reasons import dtype_is, too_wide
from .rows import (
    MAX_HIDDEN,
    like,
    load_column_values,
    load_rows,
    programs_that_sum,
    row_order,
    rows_of,
    store_partial_sum,
    store_rows,
    sum_of_rows,
    tile_of_rows,
    tiling,
    warps,
    wide,
)

# -- reference ---------------------------------------------------------------------------------------------------------


def _scale(weight: Tensor | None, offset: float) -> Tensor | float:
    return offset if weight is None else wide(weight) + offset


def _result_dtype(x: Tensor, weight: Tensor | None, round_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if round_first and weight is not None else x.dtype


def _reference(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    x_ = wide(x)
    rstd = torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)
    normed = x_ * rstd
    if round_first:
        normed = normed.to(x.dtype)
    y = normed * _scale(weight, offset)
    return like(x, y, _result_dtype(x, weight, round_first)), like(x[..., 0], rstd.squeeze(-1), x_.dtype)


def _reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    needs: list[bool],
    grad_total: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    grad, normed = wide(grad), wide(x) * rstd.unsqueeze(-1)
    grad_x = grad_weight = None
    if needs[0]:
        g = grad * _scale(weight, offset)
        grad_x = rstd.unsqueeze(-1) * (g - normed * (g * normed).mean(-1, keepdim=True))
        grad_x = like(x, grad_x if grad_total is None else grad_x + wide(grad_total), x.dtype)
    if needs[1] and weight is not None:
        grad_weight = sum_of_rows(grad * normed, weight.dtype)
    return grad_x, grad_weight


def _add_reference(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = like(x, x + residual, x.dtype)
    return total, *_reference(total, *others)


def _add_reference_backward(grad_total: Tensor, grad_y: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return _reference_backward(grad_y, *others, grad_total=grad_total)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scale(weight, offset, column, HIDDEN: tl.constexpr):
    scale = offset
    if weight is not None:
        scale = load_column_values(weight, column, HIDDEN) + offset
    return scale


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    residual,
    weight,
    total,
    y,
    rstd,
    rows,
    x_stride,
    residual_stride,
    eps,
    offset,
    HIDDEN: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = tile_of_rows(tl.program_id(0) * ROWS, rows, HIDDEN, ROWS, BLOCK)
    scale = _load_scale(weight, offset, column, HIDDEN)
    values = load_rows(x, row, x_stride, column, inside)
    if residual is not None:
        values += load_rows(residual, row, residual_stride, column, inside)
        rounded = values.to(total.dtype.element_ty)
        store_rows(total, row, column, rounded, inside, HIDDEN)
        values = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, axis=1) / HIDDEN + eps)
    tl.store(rstd + row, r, mask=row < rows)
    normed = values * r[:, None]
    if ROUND_FIRST:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    store_rows(y, row, column, normed * scale, inside, HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    rstd,
    grad_x,
    partial,
    rows,
    grad_stride,
    grad_total_stride,
    x_stride,
    offset,
    HIDDEN: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes every num_programs-th tile; without NEED_WEIGHT there are programs for one tile each."""
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row, column, inside = tile_of_rows(start, rows, HIDDEN, ROWS, BLOCK)
        dy = load_rows(grad, row, grad_stride, column, inside)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = load_rows(x, row, x_stride, column, inside) * r
        if NEED_WEIGHT:
            weight_sum += dy * normed
        if NEED_X:
            g = dy * _load_scale(weight, offset, column, HIDDEN)  # from cache: its registers are worth more
            mean = tl.sum(g * normed, axis=1, keep_dims=True) / HIDDEN
            dx = (g - normed * mean) * r
            if grad_total is not None:
                dx += load_rows(grad_total, row, grad_total_stride, column, inside)
            store_rows(grad_x, row, column, dx, inside, HIDDEN)
    if NEED_WEIGHT:
        store_partial_sum(partial, weight_sum, HIDDEN, BLOCK)


# -- launch ------------------------------------------------------------------------------------------------------------


@by_layout
def _forward_launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> Launch | None:
    """From x, residual and weight to total (None where nothing is added), y and rstd; None where it does not apply."""
    y = torch.empty_like(x, dtype=_result_dtype(x, weight, round_first), device="meta")
    order = row_order(y)
    if order is None or _supports(x, weight) is not None:
        return None
    tiles, tile = tiling(math.prod(x.shape[:-1]), x.shape[-1])
    strides, copies = rows_of(order, x, residual)
    return Launch(
        _forward_kernel,
        tiles if y.numel() else 0,
        device=x.device,
        results=(None if residual is None else Fresh.like(x), Fresh.like(y), Fresh.like(x[..., 0], torch.float32)),
        scalars=(y.numel() // max(1, x.shape[-1]), *strides, eps, offset),
        constants={"ROUND_FIRST": round_first, **tile},
        copies=(*copies, _dense(weight)),
        num_warps=warps(x.shape[-1]),
    )


@by_layout
def _backward_launch(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    need_x: bool,
    need_weight: bool,
) -> Launch | None:
    """To the gradient of x and each program's sum for that of the weight; None where the kernel does not apply."""
    grad_x = torch.empty_like(x, device="meta")
    order = row_order(grad_x)
    if order is None or not x.numel() or _supports(x, weight) is not None:
        return None
    tiles, tile = tiling(math.prod(x.shape[:-1]), x.shape[-1])
    programs = programs_that_sum(tiles, x.device) if need_weight else tiles
    strides, copies = rows_of(order, grad, grad_total, x)
    one_behind_the_other = rstd.permute(order[:-1]).is_contiguous()
    return Launch(
        _backward_kernel,
        programs if need_x or need_weight else 0,
        device=x.device,
        results=(
            Fresh.like(x) if need_x else None,
            Fresh.contiguous((programs, x.shape[-1]), torch.float32) if need_weight else None,
        ),
        scalars=(x.numel() // x.shape[-1], *strides, offset),
        constants={"NEED_X": need_x, "NEED_WEIGHT": need_weight, **tile},
        copies=(
            *copies,
            _dense(weight),
            None if one_behind_the_other else lambda x: x.permute(order[:-1]).contiguous(),
        ),
        num_warps=warps(x.shape[-1]),
    )


def _dense(weight: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    return None if weight is None or weight.is_contiguous() else Tensor.contiguous


def _forward(x: Tensor, weight: Tensor | None, *others: Any) -> tuple[Any, ...]:
    launch = _forward_launch(x, None, weight, *others)
    if launch is None:
        return _reference(x, weight, *others)
    _, y, rstd = launch(x, None, weight)
    return y, rstd


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    needs: list[bool],
    grad_total: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    launch = _backward_launch(grad, grad_total, x, weight, rstd, offset, *needs)
    if launch is None:
        return _reference_backward(grad, x, weight, rstd, eps, offset, round_first, needs, grad_total)
    grad_x, partial = launch(grad, grad_total, x, weight, rstd)
    return grad_x, None if partial is None or weight is None else partial.sum(0).to(weight.dtype)


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor | None, *others: Any) -> tuple[Any, ...]:
    launch = _forward_launch(x, residual, weight, *others)
    return _add_reference(x, residual, weight, *others) if launch is None else tuple(launch(x, residual, weight))


def _add_backward(grad_total: Tensor, grad_y: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return _backward(grad_y, *others, grad_total=grad_total)


# -- the operators -----------------------------------------------------------------------------------------------------


def _supports(x: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    kernel_dtypes = torch.bfloat16, torch.float16, torch.float32
    if x.dim() == 0:
        return "x has no dimension"
    if weight is not None:
        if weight.dim() != 1 or not statically_known_true(weight.shape[0] == x.shape[-1]):
            return f"the weight's shape {tuple(weight.shape)} is not the last dimension of x {tuple(x.shape)}"
        if reason := dtype_is(weight, *kernel_dtypes):
            return reason
    return too_wide(x, MAX_HIDDEN) or dtype_is(x, *kernel_dtypes)


def _add_supports(x: Tensor, residual: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    if x.dtype != residual.dtype:
        return f"x is {x.dtype} and the residual is {residual.dtype}"
    if x.dim() != residual.dim() or not statically_known_true(sym_eq(tuple(x.shape), tuple(residual.shape))):
        return f"x {tuple(x.shape)} and the residual {tuple(residual.shape)} are not known to have one shape"
    return _supports(x, weight)


rms_norm = operator(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool round_first) -> (Tensor y, Tensor rstd)",
    reference=_reference,
    reference_backward=_reference_backward,
    forward=_forward,
    backward=_backward,
    saves="x weight rstd",
    differentiable="x weight",
    gradients_of="y",
    rows="x y rstd",
    supports=_supports,
    flops=lambda x, *_: 4 * x.numel(),
    backward_flops=lambda x, *_: 9 * x.numel(),
)

add_rms_norm = operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool round_first)"
    " -> (Tensor total, Tensor y, Tensor rstd)",
    reference=_add_reference,
    reference_backward=_add_reference_backward,
    forward=_add_forward,
    backward=_add_backward,
    saves="total weight rstd",
    differentiable="x weight",
    same_gradient={"residual": "x"},
    gradients_of="total y",
    rows="x residual total y rstd",
    supports=_add_supports,
    flops=lambda x, *_: 5 * x.numel(),
    backward_flops=lambda x, *_: 10 * x.numel(),
)
