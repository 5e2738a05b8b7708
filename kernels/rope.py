"""Rotary position embedding, y = x * cos + turn(x) * sin: of queries and keys together, or of one tensor.

Su et al. 2021, arXiv:2104.09864. A head's features are turned in pairs (x1, x2), each by its own angle:

    y1 = x1 * c1 - x2 * s1,    dx1 = dy1 * c1 + dy2 * s2,
    y2 = x2 * c2 + x1 * s2;    dx2 = dy2 * c2 - dy1 * s1.

q, k: [batch, heads, length, width] or [batch, length, heads, width]; the batch may be missing. Pairs are feature i with
i + width / 2, as in GPT-NeoX and Llama, or feature 2i with 2i + 1 where it is ``interleaved`` (GPT-J, Cohere);
``interleaved_out`` says the same of y (DeepSeek reads one order and writes the other). cos and sin broadcast to q and k
as in the formula: of heads and length, the heads are where they have size 1. They hold one value per feature, in y's
order, or one per pair.

The arithmetic is float32 (float64 in float64), rounded once to the promotion of q's and cos's dtypes, or to q's dtype
where the result is ``narrow``. Gradients have the dtype of the results; autograd brings them to q's. Results lie in
memory as an elementwise operation would leave them, so the [batch, length, heads, width] that a projection makes stays
what it is, forward and backward.

Either direction reads and writes q and k once: for 2 x 2048 positions of 32 + 8 heads of 128 in bf16 that is 84 MB, at
least 28 us at 2.97 TB/s (H100 copy) and 20 us at 4.3 TB/s (H200). A program rotates all heads of one position: cos and
sin are read once, and its loads are one piece of memory, here of 10 KB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .launch import Fresh, Launch, by_layout
from .operator import next_power_of_two, operator
from .reasons import dtype_is

MAX_WIDTH = 512

TILE = 4096
"""Elements that a program holds at a time: all heads of a position, or as many as fit."""

ELEMENTS_PER_THREAD = 32
"""Both halves together, 64 bytes of bf16 in flight per thread."""


# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second of each pair of features."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _table(table: Tensor, width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The values for the first and for the second of each pair."""
    table = _wide(table)
    return _pairs(table, interleaved) if table.shape[-1] == width else (table, table)


def _joined(first: Tensor, second: Tensor, like: Tensor, dtype: torch.dtype, interleaved: bool) -> Tensor:
    """A fresh tensor of the pairs, in the order of memory of an elementwise result."""
    y = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.empty_like(like, dtype=dtype).copy_(y)


def _result_dtype(x: Tensor, cos: Tensor, narrow: bool) -> torch.dtype:
    return x.dtype if narrow else torch.promote_types(x.dtype, cos.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, interleaved_out: bool, narrow: bool) -> Tensor:
    x1, x2 = _pairs(_wide(x), interleaved)
    (c1, c2), (s1, s2) = (_table(table, x.shape[-1], interleaved_out) for table in (cos, sin))
    return _joined(x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, x, _result_dtype(x, cos, narrow), interleaved_out)


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, interleaved_out: bool) -> Tensor:
    g1, g2 = _pairs(_wide(grad), interleaved_out)
    (c1, c2), (s1, s2) = (_table(table, grad.shape[-1], interleaved_out) for table in (cos, sin))
    return _joined(g1 * c1 + g2 * s2, g2 * c2 - g1 * s1, grad, grad.dtype, interleaved)


def _reference(inputs: Sequence[Tensor], *others: Any) -> tuple[Tensor, ...]:
    return tuple(_rotated(x, *others) for x in inputs)


def _reference_backward(
    grads: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    interleaved_out: bool,
    narrow: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    layouts = interleaved, interleaved_out
    return tuple(_rotated_back(g, cos, sin, *layouts) if need else None for g, need in zip(grads, needs, strict=True))


# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_table(table, stride, HALF: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr):
    """The values for the first and for the second of each pair, which stand GAP apart."""
    column = tl.arange(0, BLOCK)
    first = tl.load(table + column * STEP * stride, mask=column < HALF, other=0.0)
    second = tl.load(table + (column * STEP + GAP) * stride, mask=column < HALF, other=0.0)
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
    INTERLEAVED: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate HEADS vectors, TILE_HEADS at a time. Strides are those between heads."""
    column = tl.arange(0, BLOCK)[None, :]
    feature = tl.arange(0, 2 * BLOCK)[None, :]
    for start in range(0, HEADS, TILE_HEADS):
        head = (start + tl.arange(0, TILE_HEADS)).to(tl.int64)[:, None]
        source, target, exists = x + head * x_stride, y + head * y_stride, head < HEADS
        if INTERLEAVED:  # one piece of memory, taken apart in registers
            features = tl.load(source + feature, mask=exists & (feature < 2 * HALF), other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(features, [TILE_HEADS, BLOCK, 2]))
        else:
            x1 = tl.load(source + column, mask=exists & (column < HALF), other=0.0).to(tl.float32)
            x2 = tl.load(source + HALF + column, mask=exists & (column < HALF), other=0.0).to(tl.float32)
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
        if INTERLEAVED_OUT:
            features = tl.reshape(tl.join(y1, y2), [TILE_HEADS, 2 * BLOCK])
            tl.store(target + feature, features, mask=exists & (feature < 2 * HALF))
        else:
            tl.store(target + column, y1, mask=exists & (column < HALF))
            tl.store(target + HALF + column, y2, mask=exists & (column < HALF))


@triton.jit(do_not_specialize=["length"])
def _kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    length,
    q_strides,
    k_strides,
    cos_strides,
    sin_strides,
    q_out_strides,
    k_out_strides,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BACKWARD: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    TABLE_STEP: tl.constexpr,
    TABLE_GAP: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Strides are (batch, head, position) of q, k and their results, (batch, position, feature) of cos and sin.

    A result that is None is not wanted.
    """
    batch = (tl.program_id(0) // length).to(tl.int64)
    position = (tl.program_id(0) % length).to(tl.int64)
    cos_row = cos + batch * cos_strides[0] + position * cos_strides[1]
    sin_row = sin + batch * sin_strides[0] + position * sin_strides[1]
    c1, c2 = _load_table(cos_row, cos_strides[2], HALF, BLOCK, TABLE_STEP, TABLE_GAP)
    s1, s2 = _load_table(sin_row, sin_strides[2], HALF, BLOCK, TABLE_STEP, TABLE_GAP)
    if BACKWARD:  # the transpose of the 2 x 2 matrix ((c1, -s1), (s2, c2))
        s1, s2 = -s2, -s1
    # fmt: off
    if q_out is not None:
        x = q + batch * q_strides[0] + position * q_strides[2]
        y = q_out + batch * q_out_strides[0] + position * q_out_strides[2]
        _rotate_heads(x, y, q_strides[1], q_out_strides[1], c1, c2, s1, s2,
                      Q_HEADS, HALF, INTERLEAVED, INTERLEAVED_OUT, Q_TILE, BLOCK)
    if k_out is not None:
        x = k + batch * k_strides[0] + position * k_strides[2]
        y = k_out + batch * k_out_strides[0] + position * k_out_strides[2]
        _rotate_heads(x, y, k_strides[1], k_out_strides[1], c1, c2, s1, s2,
                      K_HEADS, HALF, INTERLEAVED, INTERLEAVED_OUT, K_TILE, BLOCK)
    # fmt: on


# -- launch ------------------------------------------------------------------------------------------------------------


def _four(shape: Sequence[Any]) -> tuple[Any, ...]:
    """The sizes of a tensor with four dimensions."""
    return (*[1] * (4 - len(shape)), *shape)


def _heads_last(cos: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether q and k are [batch, length, heads, width], and not [batch, heads, length, width]."""
    _, first, second, _ = _four(cos.shape)
    if not _known((first,), (1,)):
        return True
    one_position = _known((second,), (1,))  # either dimension may be the heads, as far as cos says
    return one_position and not all(_known((x.shape[-2],), (inputs[0].shape[-2],)) for x in inputs)


def _heads_first(x: Tensor, heads_last: bool) -> Tensor:
    """The view [batch, heads, length, width] of a tensor."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.transpose(1, 2) if heads_last else x


@by_layout
def _launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    interleaved_out: bool,
    dtype: torch.dtype,
    backward: bool,
    need_q: bool,
    need_k: bool,
) -> Launch | None:
    """Of q and k (or their gradients) to what they become; None where the kernel does not apply."""
    inputs = q, k
    results = [Fresh.like(x, dtype) if need else None for x, need in zip(inputs, (need_q, need_k), strict=True)]
    if any(y is not None and y.stride[-1] != 1 for y in results):
        return None
    if _problem(inputs, cos, sin, interleaved, interleaved_out) is not None:
        return None
    heads_last = _heads_last(cos, inputs)
    full = cos.shape[-1] == q.shape[-1]
    read = [x if x.stride(-1) == 1 else torch.empty(x.shape, device="meta") for x in inputs]
    written = [None if y is None else torch.empty_strided(y.shape, y.stride, device="meta") for y in results]
    q, k = (_heads_first(x, heads_last) for x in read)
    batch, q_heads, length, width = q.shape
    k_heads, half = k.shape[1], width // 2
    tables = [_heads_first(table, heads_last)[:, 0].expand(batch, length, -1) for table in (cos, sin)]
    outputs = [None if y is None else _heads_first(y, heads_last) for y in written]
    strides = [(0, 0, 0) if x is None else x.stride()[:3] for x in (q, k, *tables, *outputs)]
    block = next_power_of_two(half)
    q_tile, k_tile = (min(next_power_of_two(heads), max(1, TILE // (2 * block))) for heads in (q_heads, k_heads))
    return Launch(
        _kernel,
        batch * length if need_q or need_k else 0,
        device=cos.device,
        results=results,
        scalars=(length, *strides),
        constants={
            "Q_HEADS": q_heads,
            "K_HEADS": k_heads,
            "Q_TILE": q_tile,
            "K_TILE": k_tile,
            "HALF": half,
            "INTERLEAVED": interleaved_out if backward else interleaved,
            "INTERLEAVED_OUT": interleaved if backward else interleaved_out,
            "TABLE_STEP": 2 if full and interleaved_out else 1,
            "TABLE_GAP": (1 if interleaved_out else half) if full else 0,
            "BLOCK": block,
            "BACKWARD": backward,
        },
        copies=(*(None if x.stride(-1) == 1 else Tensor.contiguous for x in inputs), None, None),
        num_warps=triton.cdiv(max(q_tile, k_tile) * 2 * block, 32 * ELEMENTS_PER_THREAD),
    )


def _forward(
    inputs: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, interleaved_out: bool, narrow: bool
) -> Sequence[Any]:
    q, k = inputs[0], inputs[-1]
    dtype = _result_dtype(q, cos, narrow)
    launch = _launch(q, k, cos, sin, interleaved, interleaved_out, dtype, False, True, len(inputs) == 2)
    if launch is None:
        return _reference(inputs, cos, sin, interleaved, interleaved_out, narrow)
    return launch(q, k, cos, sin)[: len(inputs)]


def _backward(
    grads: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    interleaved_out: bool,
    narrow: bool,
    needs: list[bool],
) -> Sequence[Tensor | None]:
    q, k = grads[0], grads[-1]
    wanted = needs[0], len(grads) == 2 and needs[1]
    launch = _launch(q, k, cos, sin, interleaved, interleaved_out, q.dtype, True, *wanted)
    if launch is None:
        return _reference_backward(grads, cos, sin, interleaved, interleaved_out, narrow, needs)
    return launch(q, k, cos, sin)[: len(grads)]


# -- the operators -----------------------------------------------------------------------------------------------------


def _problem(
    inputs: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, interleaved_out: bool, *_: Any
) -> str | None:
    """Why these cannot be rotated together, or None."""
    q, k = inputs[0], inputs[-1]
    if q.dim() not in (3, 4) or not 2 <= cos.dim() <= q.dim():
        return "what is rotated has to be [batch, heads, length, width], and cos and sin broadcast to it"
    if q.dtype != k.dtype:
        return f"q is {q.dtype} and k is {k.dtype}"
    if cos.dtype != sin.dtype:
        return f"cos is {cos.dtype} and sin is {sin.dtype}"
    kernel_dtypes = torch.bfloat16, torch.float16, torch.float32
    if reason := dtype_is(q, *kernel_dtypes) or dtype_is(cos, *kernel_dtypes):
        return reason
    width, features = q.shape[-1], cos.shape[-1]
    if not isinstance(width, int) or not isinstance(features, int):
        return "the head size is symbolic"
    if width % 2 or width > MAX_WIDTH:
        return f"the head size is {width}, the kernel takes even ones up to {MAX_WIDTH}"
    heads = 2 if _heads_last(cos, inputs) else 1
    sizes, others, table = _four(q.shape), _four(k.shape), _four(cos.shape)[:3]
    if q.dim() != k.dim() or not all(_known((sizes[d],), (others[d],)) for d in range(4) if d != heads):
        return f"q {tuple(q.shape)} and k {tuple(k.shape)} are not known to differ in their heads only"
    if not _known(sin.shape, cos.shape):
        return f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} are not known to have one shape"
    fits = all(_known((t,), (1,)) or _known((t,), (s,)) for t, s in zip(table, sizes, strict=False))
    if not fits or features not in (width, width // 2):
        return f"cos {tuple(cos.shape)} is not known to fit what is rotated, {tuple(q.shape)}"
    if not _known((table[heads],), (1,)):
        return f"cos {tuple(cos.shape)} differs between heads"
    if features == width and interleaved != interleaved_out:
        return "cos and sin have to hold one value per pair where pairs move"
    return None


def _known(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))


rope = operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool interleaved_out, bool narrow)"
    " -> (Tensor q_out, Tensor k_out)",
    reference=lambda q, k, *others: _reference((q, k), *others),
    reference_backward=lambda grad_q, grad_k, *others: _reference_backward((grad_q, grad_k), *others),
    forward=lambda q, k, *others: tuple(_forward((q, k), *others)),
    backward=lambda grad_q, grad_k, *others: tuple(_backward((grad_q, grad_k), *others)),
    saves="cos sin",
    differentiable="q k",
    gradients_of="q_out k_out",
    supports=lambda q, k, *others: _problem((q, k), *others),
    flops=lambda q, k, *_: 3 * (q.numel() + k.numel()),
    backward_flops=lambda q, k, *_: 3 * (q.numel() + k.numel()),
)

rope_of_one = operator(
    "rope_of_one(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool interleaved_out, bool narrow) -> (Tensor y)",
    reference=_rotated,
    reference_backward=lambda grad, *others: _reference_backward((grad,), *others),
    forward=lambda x, *others: _forward((x,), *others)[0],
    backward=lambda grad, *others: tuple(_backward((grad,), *others)),
    saves="cos sin",
    differentiable="x",
    gradients_of="y",
    supports=lambda x, *others: _problem((x,), *others),
    flops=lambda x, *_: 3 * x.numel(),
    backward_flops=lambda x, *_: 3 * x.numel(),
)
"""A rotation without a partner, or one whose result is used before its partner's input is there."""
