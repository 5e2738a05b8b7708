"""Rotary position embedding of queries and keys, y = x * cos + rotate_half(x) * sin.

Su et al. 2021, arXiv:2104.09864, in the layout of GPT-NeoX and Llama: with x = (x1, x2), rotate_half(x) = (-x2, x1).
q: [batch, heads, length, width], k: [batch, kv_heads, length, width]; cos, sin: [batch or 1, length, width] or [length,
width]. The halves of cos and sin, (c1, c2) and (s1, s2), need not be equal:

    y1 = x1 * c1 - x2 * s1,    dx1 = dy1 * c1 + dy2 * s2,
    y2 = x2 * c2 + x1 * s2;    dx2 = dy2 * c2 - dy1 * s1.

The arithmetic is float32 (float64 in float64), rounded once to the promotion of q's and cos's dtypes, which is also the
dtype of the gradients; autograd brings them to q's. Results lie in memory as an elementwise operation would leave them,
so the [batch, length, heads, width] that a projection makes stays what it is, forward and backward.

Either direction reads and writes q and k once: for 2 x 2048 positions of 32 + 8 heads of 128 in bf16 that is 84 MB, at
least 28 us at 2.97 TB/s (H100 copy) and 20 us at 4.3 TB/s (H200). A program rotates all heads of one position: cos and
sin are read once, and its loads are one piece of memory, here of 10 KB.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .operator import next_power_of_two, operator
from .reasons import dtype_is

MAX_WIDTH = 512

TILE = 4096
"""Elements that a program holds at a time: all heads of a position, or as many as fit."""

ELEMENTS_PER_THREAD = 32
"""Both halves together, 64 bytes of bf16 in flight per thread."""


# -- reference ---------------------------------------------------------------------------------------------------------


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    half = x.shape[-1] // 2
    return wide[..., :half], wide[..., half:]


def _joined(first: Tensor, second: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of the halves, in the order of memory of an elementwise result."""
    return torch.empty_like(like, dtype=dtype).copy_(torch.cat((first, second), -1))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), (c1, c2), (s1, s2) = _halves(x), _halves(cos.unsqueeze(-3)), _halves(sin.unsqueeze(-3))
    return _joined(x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, x, torch.promote_types(x.dtype, cos.dtype))


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (g1, g2), (c1, c2), (s1, s2) = _halves(grad), _halves(cos.unsqueeze(-3)), _halves(sin.unsqueeze(-3))
    return _joined(g1 * c1 + g2 * s2, g2 * c2 - g1 * s1, grad, grad.dtype)


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _reference_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    return tuple(_rotated_back(g, cos, sin) if need else None for g, need in zip((grad_q, grad_k), needs, strict=True))


# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_halves(table, HALF: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    first = tl.load(table + column, mask=column < HALF, other=0.0)
    second = tl.load(table + HALF + column, mask=column < HALF, other=0.0)
    return first.to(tl.float32)[None, :], second.to(tl.float32)[None, :]


@triton.jit
def _rotate_heads(
    x,
    y,
    x_stride,
    y_stride,
    c1,
    c2,
    s1,
    s2,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate HEADS vectors, TILE_HEADS at a time. Strides are those between heads."""
    column = tl.arange(0, BLOCK)[None, :]
    for start in range(0, HEADS, TILE_HEADS):
        head = (start + tl.arange(0, TILE_HEADS)).to(tl.int64)[:, None]
        inside = (head < HEADS) & (column < HALF)
        source, target = x + head * x_stride + column, y + head * y_stride + column
        x1 = tl.load(source, mask=inside).to(tl.float32)
        x2 = tl.load(source + HALF, mask=inside).to(tl.float32)
        tl.store(target, x1 * c1 - x2 * s1, mask=inside)
        tl.store(target + HALF, x2 * c2 + x1 * s2, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    length,
    q_strides,
    k_strides,
    q_out_strides,
    k_out_strides,
    cos_strides,
    sin_strides,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BACKWARD: tl.constexpr,
    HALF: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Strides are (batch, head, position) of q, k and their results, (batch, position) of cos and sin.

    A result that is None is not wanted.
    """
    batch = (tl.program_id(0) // length).to(tl.int64)
    position = (tl.program_id(0) % length).to(tl.int64)
    c1, c2 = _load_halves(cos + batch * cos_strides[0] + position * cos_strides[1], HALF, BLOCK)
    s1, s2 = _load_halves(sin + batch * sin_strides[0] + position * sin_strides[1], HALF, BLOCK)
    if BACKWARD:  # the transpose of the 2 x 2 matrix ((c1, -s1), (s2, c2))
        s1, s2 = -s2, -s1
    if q_out is not None:
        x = q + batch * q_strides[0] + position * q_strides[2]
        y = q_out + batch * q_out_strides[0] + position * q_out_strides[2]
        _rotate_heads(x, y, q_strides[1], q_out_strides[1], c1, c2, s1, s2, Q_HEADS, HALF, Q_TILE, BLOCK)
    if k_out is not None:
        x = k + batch * k_strides[0] + position * k_strides[2]
        y = k_out + batch * k_out_strides[0] + position * k_out_strides[2]
        _rotate_heads(x, y, k_strides[1], k_out_strides[1], c1, c2, s1, s2, K_HEADS, HALF, K_TILE, BLOCK)


# -- launch ------------------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    q: Tensor, k: Tensor, q_out: Tensor | None, k_out: Tensor | None, cos: Tensor, sin: Tensor, backward: bool
) -> bool:
    """Rotate q and k (or their gradients) into the outputs that are wanted; False where the kernel does not apply."""
    outputs = q_out, k_out
    if any(y is not None and y.stride(-1) != 1 for y in outputs) or _supports(q, k, cos, sin) is not None:
        return False
    batch, q_heads, length, width = q.shape
    k_heads, half = k.shape[1], width // 2
    if batch * length == 0 or outputs == (None, None):
        return True
    q, k = _dense(q), _dense(k)
    cos, sin = (_dense(table.expand(batch, length, width)) for table in (cos, sin))
    block = next_power_of_two(half)
    q_tile, k_tile = (min(next_power_of_two(heads), max(1, TILE // (2 * block))) for heads in (q_heads, k_heads))
    warps = triton.cdiv(max(q_tile, k_tile) * 2 * block, 32 * ELEMENTS_PER_THREAD)
    strides = [x.stride()[:-1] if x is not None else (0, 0, 0) for x in (q, k, *outputs, cos, sin)]
    kernel: Any = _kernel
    kernel[(batch * length,)](
        *(q, k, *outputs, cos, sin, length, *strides),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        Q_TILE=q_tile,
        K_TILE=k_tile,
        HALF=half,
        BLOCK=block,
        BACKWARD=backward,
        num_warps=warps,
    )
    return True


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    q_out, k_out = torch.empty_like(q, dtype=dtype), torch.empty_like(k, dtype=dtype)
    if not _launch(q, k, q_out, k_out, cos, sin, backward=False):
        return _reference(q, k, cos, sin)
    return q_out, k_out


def _backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    dq, dk = (torch.empty_like(g) if need else None for g, need in zip((grad_q, grad_k), needs, strict=True))
    if not _launch(grad_q, grad_k, dq, dk, cos, sin, backward=True):
        return _reference_backward(grad_q, grad_k, cos, sin, needs)
    return dq, dk


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() not in (2, 3) or sin.dim() != cos.dim():
        return "q and k have to be [batch, heads, length, width], cos and sin [batch or 1, length, width]"
    if q.dtype != k.dtype:
        return f"q is {q.dtype} and k is {k.dtype}"
    if cos.dtype != sin.dtype:
        return f"cos is {cos.dtype} and sin is {sin.dtype}"
    kernel_dtypes = torch.bfloat16, torch.float16, torch.float32
    return dtype_is(q, *kernel_dtypes) or dtype_is(cos, *kernel_dtypes) or _shape_problem(q, k, cos, sin)


def _shape_problem(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    batch, _, length, width = q.shape
    if not isinstance(width, int):
        return "the head size is symbolic"
    if width % 2 or width > MAX_WIDTH:
        return f"the head size is {width}, the kernel takes even ones up to {MAX_WIDTH}"

    def known(*pairs: tuple[Any, Any]) -> bool:
        return all(statically_known_true(a == b) for a, b in pairs)

    if not known((k.shape[0], batch), (k.shape[2], length), (k.shape[3], width)):
        return f"q {tuple(q.shape)} and k {tuple(k.shape)} are not known to differ in the number of heads only"
    for name, table in (("cos", cos), ("sin", sin)):
        fits = known((table.shape[-2], length), (table.shape[-1], width))
        if table.dim() == 3:
            fits = fits and (known((table.shape[0], 1)) or known((table.shape[0], batch)))
        if not fits:
            return f"{name} {tuple(table.shape)} is not known to fit q {tuple(q.shape)}"
    return None


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
    flops=lambda q, k, cos, sin: 3 * (q.numel() + k.numel()),
    backward_flops=lambda q, k, cos, sin: 3 * (q.numel() + k.numel()),
)
