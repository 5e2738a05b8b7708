"""What operators on the rows of a matrix share: which order the rows are taken in, and how a program's tile is read.

A row is a vector along the last dimension, read once and held in registers. Results lie in memory as an elementwise
operation on x would leave them, so the rows are taken in that order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operator import next_power_of_two

MAX_HIDDEN = 65536
"""One row at 32 warps is then 64 float32 values a thread: the last width at which registers hold most of it."""

ELEMENTS_PER_THREAD = 32
"""64 bytes of bf16 in flight per thread and tensor, and registers left for five or six programs per multiprocessor."""

PROGRAMS_PER_PROCESSOR = 4
"""Of a kernel that also sums over rows: as many as its registers allow at once, and few enough partial sums."""


# -- reference ---------------------------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def like(x: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of the values, in x's order of memory as an elementwise operation would leave it."""
    return torch.empty_like(x, dtype=dtype).copy_(values)


def sum_of_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[hidden] of [..., hidden]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).sum(0).to(dtype)


# -- in kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of_rows(start, rows, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row numbers [ROWS], columns [BLOCK], and which elements of the tile exist."""
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    return row, column, inside


@triton.jit
def load_rows(base, row, stride, column, inside):
    """The tile in float32."""
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, row, column, values, inside, HIDDEN: tl.constexpr):
    """Write the tile of a matrix whose rows stand one behind the other."""
    tl.store(base + row[:, None] * HIDDEN + column[None, :], values, mask=inside)


@triton.jit
def load_column_values(base, column, HIDDEN: tl.constexpr):
    """One value for each column, [1, BLOCK] in float32."""
    return tl.load(base + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_partial_sum(partial, total, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum over this program's rows."""
    column = tl.arange(0, BLOCK)
    tl.store(partial + tl.program_id(0) * HIDDEN + column, tl.sum(total, axis=0), mask=column < HIDDEN)


# -- launch ------------------------------------------------------------------------------------------------------------


def row_stride(x: Tensor) -> int | None:
    """Elements from one row (a vector along the last dimension) to the next, or None where no one number says it."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    for (_, stride), (inner_size, inner_stride) in pairwise(outer):
        if stride != inner_size * inner_stride:
            return None
    return outer[-1][1] if outer else x.shape[-1]


def rows_of(order: list[int], *tensors: Tensor | None) -> tuple[list[int], list[Callable[[Tensor], Tensor] | None]]:
    """How to read tensors of one shape with their rows in that order.

    Returns:
        For each the elements from one row to the next (0 for None), and what copies it where no one number says that.
    """
    strides, copies = [], []
    for x in tensors:
        in_place = None if x is None else row_stride(x.permute(order))
        copies.append(None if x is None or in_place is not None else lambda x: x.permute(order).contiguous())
        strides.append(0 if x is None else x.shape[-1] if in_place is None else in_place)
    return strides, copies


def row_order(y: Tensor) -> list[int] | None:
    """The permutation that makes the dense y contiguous, or None if it moves the last dimension."""
    last = y.dim() - 1
    order = [*sorted(range(last), key=y.stride, reverse=True), last]
    return order if y.permute(order).is_contiguous() else None


def tiling(rows: int, hidden: int) -> tuple[int, dict[str, int]]:
    """Number of tiles and their shape; narrow rows share a program, which then reduces them side by side."""
    block = next_power_of_two(hidden)
    per_tile = max(1, 4 * 32 * ELEMENTS_PER_THREAD // block)
    return triton.cdiv(rows, per_tile), {"HIDDEN": hidden, "ROWS": per_tile, "BLOCK": block}


def warps(hidden: int) -> int:
    """Of a program that holds such rows."""
    return min(32, max(4, next_power_of_two(hidden) // (32 * ELEMENTS_PER_THREAD)))


def programs_that_sum(tiles: int, device: torch.device) -> int:
    """How many programs share the tiles when each also writes a sum over its rows."""
    return min(tiles, PROGRAMS_PER_PROCESSOR * _processors(device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
