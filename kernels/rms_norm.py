"""Root-mean-square normalisation, y = x / rms(x) * (weight + offset) with rms(x) = sqrt(mean(x^2) + eps).

Zhang & Sennrich 2019, arXiv:1910.07467. x: [..., hidden], weight: [hidden]; statistics and arithmetic in float32
(float64 in float64). Models differ in where they round, and so in y's dtype:

* ``round_first``: the normalised x returns to x's dtype, then it is scaled: y has the promotion of x's and weight's
  dtypes (Llama; float32 for bf16 x and float32 weight);
* otherwise it is scaled in float32 and rounded once, to x's dtype (Gemma with offset 1, OLMo 2, T5).

y has x's order in memory, as after any elementwise operation. rstd = 1 / rms(x), float32, of shape x.shape[:-1] and in
that order too, is what backward wants besides x and weight. With n = x * rstd and g = dy * (weight + offset):

    dx = rstd * (g - n * mean(g * n)),    dweight = sum over rows of dy * n.

Rows are read once and held in registers. For r rows of bf16, forward moves 4 * r * hidden bytes (x, y) and backward
6 * r * hidden (dy, x, dx), weight and rstd being negligible: 8192 x 4096 is 134 MB and 201 MB, at least 45 us and 68 us
at 2.97 TB/s (H100 copy), 31 us and 47 us at 4.3 TB/s (H200). The trainable weight's gradient writes and reads
[programs, hidden] float32 besides, 9% more; it is summed in a fixed order, the same in every run on a device.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .operator import next_power_of_two, operator
from .reasons import dtype_is, too_wide

MAX_HIDDEN = 65536
"""One row at 32 warps is then 64 float32 values a thread: the last width at which registers hold most of it."""

ELEMENTS_PER_THREAD = 32
"""64 bytes of bf16 in flight per thread and tensor, and registers left for five or six programs per multiprocessor."""

PROGRAMS_PER_PROCESSOR = 4
"""Of the weight gradient's kernel: as many as its registers allow at once, and few enough partial sums."""


# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _like(x: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of the values, in x's order of memory as an elementwise operation would leave it."""
    return torch.empty_like(x, dtype=dtype).copy_(values)


def _result_dtype(x: Tensor, weight: Tensor, round_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype


def _reference(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    if round_first:
        normed = normed.to(x.dtype)
    y = normed * (_wide(weight) + offset)
    return _like(x, y, _result_dtype(x, weight, round_first)), _like(x[..., 0], rstd.squeeze(-1), wide.dtype)


def _reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    grad, normed = _wide(grad), _wide(x) * rstd.unsqueeze(-1)
    grad_x = grad_weight = None
    if needs[0]:
        g = grad * (_wide(weight) + offset)
        grad_x = _like(x, rstd.unsqueeze(-1) * (g - normed * (g * normed).mean(-1, keepdim=True)), x.dtype)
    if needs[1]:
        grad_weight = (grad * normed).reshape(math.prod(x.shape[:-1]), x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x, grad_weight


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(start, rows, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row numbers [ROWS], columns [BLOCK], and which elements of the tile exist."""
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    return row, column, inside


@triton.jit
def _load(base, row, stride, column, inside):
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_scale(weight, offset, column, HIDDEN: tl.constexpr):
    return (tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    weight,
    y,
    rstd,
    rows,
    x_stride,
    eps,
    offset,
    HIDDEN: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _tile(tl.program_id(0) * ROWS, rows, HIDDEN, ROWS, BLOCK)
    scale = _load_scale(weight, offset, column, HIDDEN)
    values = _load(x, row, x_stride, column, inside)
    r = tl.rsqrt(tl.sum(values * values, axis=1) / HIDDEN + eps)
    tl.store(rstd + row, r, mask=row < rows)
    normed = values * r[:, None]
    if ROUND_FIRST:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + row[:, None] * HIDDEN + column[None, :], normed * scale, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad,
    x,
    weight,
    rstd,
    grad_x,
    partial,
    rows,
    grad_stride,
    x_stride,
    offset,
    HIDDEN: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes every num_programs-th tile; without NEED_WEIGHT there are programs for one tile each."""
    program = tl.program_id(0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row, column, inside = _tile(start, rows, HIDDEN, ROWS, BLOCK)
        dy = _load(grad, row, grad_stride, column, inside)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = _load(x, row, x_stride, column, inside) * r
        if NEED_WEIGHT:
            total += dy * normed
        if NEED_X:
            g = dy * _load_scale(weight, offset, column, HIDDEN)  # from cache: its registers are worth more
            mean = tl.sum(g * normed, axis=1, keep_dims=True) / HIDDEN
            tl.store(grad_x + row[:, None] * HIDDEN + column[None, :], (g - normed * mean) * r, mask=inside)
    if NEED_WEIGHT:
        column = tl.arange(0, BLOCK)
        tl.store(partial + program * HIDDEN + column, tl.sum(total, axis=0), mask=column < HIDDEN)


# -- launch ------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, order: list[int]) -> Tensor:
    """x as [rows, hidden] with its rows in that order: a view where one stride says it, else a copy."""
    rows = x.permute(order).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _row_order(y: Tensor) -> list[int] | None:
    """The permutation that makes the dense y contiguous, or None if it moves the last dimension."""
    last = y.dim() - 1
    order = [*sorted(range(last), key=y.stride, reverse=True), last]
    return order if y.permute(order).is_contiguous() else None


def _tiling(rows: int, hidden: int) -> tuple[int, dict[str, int]]:
    """Number of tiles and their shape; narrow rows share a program, which then reduces them side by side."""
    block = next_power_of_two(hidden)
    per_tile = max(1, 4 * 32 * ELEMENTS_PER_THREAD // block)
    warps = min(32, max(4, block // (32 * ELEMENTS_PER_THREAD)))
    return triton.cdiv(rows, per_tile), {"HIDDEN": hidden, "ROWS": per_tile, "BLOCK": block, "num_warps": warps}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=_result_dtype(x, weight, round_first))
    order = _row_order(y)
    if order is None or _supports(x, weight) is not None:
        return _reference(x, weight, eps, offset, round_first)
    rstd = torch.empty_like(x[..., 0], dtype=torch.float32)
    if y.numel():
        rows = _rows(x, order)
        tiles, tile = _tiling(*rows.shape)
        launch: Any = _forward_kernel[(tiles,)]
        scalars = len(rows), rows.stride(0), eps, offset
        launch(rows, weight.contiguous(), y, rstd, *scalars, ROUND_FIRST=round_first, **tile)
    return y, rstd


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    grad_x = torch.empty_like(x)
    order = _row_order(grad_x)
    if order is None or not x.numel() or _supports(x, weight) is not None:
        return _reference_backward(grad, x, weight, rstd, eps, offset, round_first, needs)
    need_x, need_weight = needs
    tiles, tile = _tiling(math.prod(x.shape[:-1]), x.shape[-1])
    programs = min(tiles, PROGRAMS_PER_PROCESSOR * _processors(x.device)) if need_weight else tiles
    partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if need_weight else None
    if any(needs):
        grad, x, rstd = _rows(grad, order), _rows(x, order), rstd.permute(order[:-1]).contiguous()
        launch: Any = _backward_kernel[(programs,)]
        tensors = grad, x, weight.contiguous(), rstd, grad_x, partial
        scalars = len(x), grad.stride(0), x.stride(0), offset
        launch(*tensors, *scalars, NEED_X=need_x, NEED_WEIGHT=need_weight, **tile)
    grad_weight = partial.sum(0).to(weight.dtype) if partial is not None else None
    return grad_x if need_x else None, grad_weight


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    if x.dim() == 0 or weight.dim() != 1 or not statically_known_true(weight.shape[0] == x.shape[-1]):
        return f"the weight's shape {tuple(weight.shape)} is not the last dimension of x {tuple(x.shape)}"
    kernel_dtypes = torch.bfloat16, torch.float16, torch.float32
    return too_wide(x, MAX_HIDDEN) or dtype_is(x, *kernel_dtypes) or dtype_is(weight, *kernel_dtypes)


rms_norm = operator(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool round_first) -> (Tensor y, Tensor rstd)",
    reference=_reference,
    reference_backward=_reference_backward,
    forward=_forward,
    backward=_backward,
    saves="x weight rstd",
    differentiable="x weight",
    gradients_of="y",
    supports=_supports,
    flops=lambda x, *_: 4 * x.numel(),
    backward_flops=lambda x, *_: 9 * x.numel(),
)
