"""Rotary position embedding in the half-rotation layout, queries and keys together: y = x · cos + rotate_half(x) · sin.

Su et al. 2021, arXiv:2104.09864, in the layout of GPT-NeoX and Llama: rotate_half((x1, x2)) = (-x2, x1). q: [batch,
query heads, sequence, head size]; k: the same with its own number of heads; cos, sin: [batch or 1, sequence, head
size]. Computed in float32 and rounded once, to the promoted dtype of q and cos. The two halves of cos and sin are not
taken to be equal.

Either direction moves 2 values per element of q and k; the tables are read once for all heads of a position. For 8B
shapes (2 x 2048 positions, 32 and 8 heads of 128) that is 84 MB, or 0.028 ms at the 2.97 TB/s that an H100 copies with.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .operator import dtype_is, next_power_of_two, operator

WIDEST = 512
TILE = 4096
"""Elements of one half that a program rotates: some positions, each with some heads."""


# -- reference ---------------------------------------------------------------------------------------------------------


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(torch.result_type(x, cos), torch.float32)
    c, s = cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)
    x_ = x.to(wide)
    first, second = x_.split(x.shape[-1] // 2, -1)
    y = x_ * c + torch.cat((-second, first), -1) * s
    return _laid_out(y.to(torch.result_type(x, cos)))


def _reference_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    return tuple(_rotated_back(g, cos, sin) if need else None for g, need in zip((grad_q, grad_k), needs, strict=True))


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    c, s = cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)
    g = grad.to(wide)
    # The transpose of rotate_half: (g1, g2) -> (g2, -g1), of the gradient times sin.
    first, second = (g * s).split(grad.shape[-1] // 2, -1)
    return _laid_out((g * c + torch.cat((second, -first), -1)).to(grad.dtype))


def _laid_out(x: Tensor) -> Tensor:
    """The values in [batch, sequence, heads, head size] memory, as projections leave them and attention reads them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate(
    x, y, c1, c2, s1, s2, batch, position, inside, heads, x_batch, x_head, x_position, length,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of a block of positions, HEADS at a time. Memory of y is [batch, position, head, size]."""
    column = tl.arange(0, WIDTH)[None, None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[None, :, None]
        mask = inside & (head < heads) & (column < HALF)
        source = x + batch * x_batch + position * x_position + head * x_head + column
        target = y + ((batch * length + position) * heads + head) * (2 * HALF) + column
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            rotated_first = first * c1 + second * s2
            rotated_second = second * c2 - first * s1
        else:
            rotated_first = first * c1 - second * s1
            rotated_second = second * c2 + first * s2
        tl.store(target, rotated_first.to(y.dtype.element_ty), mask=mask)
        tl.store(target + HALF, rotated_second.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    q, k, cos, sin, q_out, k_out, length, q_heads, k_heads,
    q_batch, q_head, q_position, k_batch, k_head, k_position, cos_batch, cos_position, sin_batch, sin_position,
    BACKWARD: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
    HALF: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, POSITIONS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None, None]
    inside = position < length
    column = tl.arange(0, WIDTH)[None, None, :]
    mask = inside & (column < HALF)
    c = cos + batch * cos_batch + position * cos_position + column
    s = sin + batch * sin_batch + position * sin_position + column
    c1 = tl.load(c, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(c + HALF, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(s, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(s + HALF, mask=mask, other=0.0).to(tl.float32)
    if NEED_Q:
        _rotate(
            q, q_out, c1, c2, s1, s2, batch, position, inside, q_heads, q_batch, q_head, q_position, length,
            BACKWARD, HALF, HEADS, WIDTH,
        )  # fmt: skip
    if NEED_K:
        _rotate(
            k, k_out, c1, c2, s1, s2, batch, position, inside, k_heads, k_batch, k_head, k_position, length,
            BACKWARD, HALF, HEADS, WIDTH,
        )  # fmt: skip


# -- launch ------------------------------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = _launch(q, k, cos, sin, torch.result_type(q, cos), [True, True], backward=False)
    assert q_out is not None
    assert k_out is not None
    return q_out, k_out


def _backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    return _launch(grad_q, grad_k, cos, sin, grad_q.dtype, needs, backward=True)


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, needs: list[bool], *, backward: bool
) -> tuple[Tensor | None, ...]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    outputs = [_empty(x, dtype) if need else None for x, need in zip((q, k), needs, strict=True)]
    batch, _, length, size = q.shape
    if q.numel() + k.numel() and any(needs):
        width = next_power_of_two(size // 2)
        heads = min(next_power_of_two(max(q.shape[1], k.shape[1])), max(1, TILE // width))
        positions = max(1, min(16, TILE // (width * heads)))
        launch: Any = _kernel[(batch * triton.cdiv(length, positions),)]
        launch(
            q, k, cos, sin, *outputs, length, q.shape[1], k.shape[1], *q.stride()[:3], *k.stride()[:3],
            *_table_strides(cos), *_table_strides(sin), BACKWARD=backward, NEED_Q=needs[0], NEED_K=needs[1],
            HALF=size // 2, POSITIONS=positions, HEADS=heads, WIDTH=width, num_warps=8,
        )  # fmt: skip
    return tuple(outputs)


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Strides over batch (0 where one table serves all) and position."""
    return (0 if table.shape[0] == 1 else table.stride(0)), table.stride(1)


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, length, size = x.shape
    return torch.empty((batch, length, heads, size), dtype=dtype, device=x.device).transpose(1, 2)


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or sin.dim() != 3:
        return "q and k need four dimensions, cos and sin three"
    size = q.shape[-1]
    if not isinstance(size, int):
        return "the head size is symbolic"
    if size % 2 or size > WIDEST:
        return f"the head size {size} is odd or above {WIDEST}"
    if q.dtype != k.dtype:
        return f"q is {q.dtype} and k is {k.dtype}"
    if cos.dtype != sin.dtype:
        return f"cos is {cos.dtype} and sin is {sin.dtype}"
    batch, _, length, _ = q.shape
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.shape[-1] == size and statically_known_true(table.shape[1] == length)
        if not fits or not (
            statically_known_true(table.shape[0] == 1) or statically_known_true(table.shape[0] == batch)
        ):
            return f"{name} {tuple(table.shape)} does not fit q {tuple(q.shape)}"
    if not (statically_known_true(k.shape[0] == batch) and statically_known_true(k.shape[2] == length)):
        return f"q {tuple(q.shape)} and k {tuple(k.shape)} have different batches or lengths"
    floating = torch.bfloat16, torch.float16, torch.float32
    return dtype_is(q, *floating) or dtype_is(cos, *floating)


rope = operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q_out, Tensor k_out)",
    reference=_reference,
    reference_backward=_reference_backward,
    forward=_forward,
    backward=_backward,
    saves="cos sin",
    differentiable="q k",
    gradients_of="q_out k_out",
    supports=_supports,
    flops=lambda q, k, *_: 3 * (q.numel() + k.numel()),
    backward_flops=lambda q, k, *_: 3 * (q.numel() + k.numel()),
)
