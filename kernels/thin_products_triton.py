"""The kernels of thin_products.py: what a program holds, walks and adds up is said there."""

from __future__ import annotations

import triton
import triton.language as tl

from .glu import _share
from .low_rank_product_triton import INTERPRETED, _multiply_add


@triton.jit
def _dot_over_rows(tile, thin, total):
    return _multiply_add(tl.trans(tile), thin, total)


@triton.jit
def _settled(x):
    """x itself, once: the compiler may not make it again in the layout that a product wants."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _thin(x, row, pitch, rank, M, R: tl.constexpr):
    """Rows of a thin matrix, [BM, R]."""
    r = tl.arange(0, R)
    return tl.load(x + row[:, None] * pitch + r[None, :], mask=(row < M)[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def _place(block, index, rows, BLOCK: tl.constexpr, R: tl.constexpr):
    """Where in partial sums [blocks, rows, R] a tile of rows begins, and its lanes."""
    lanes = tl.arange(0, BLOCK)[:, None] * R + tl.arange(0, R)[None, :]
    return (tl.cast(block, tl.int64) * rows + index) * R, lanes


@triton.jit
def _leave(place, sums, ADD: tl.constexpr):
    if ADD:
        sums += tl.load(place)
    tl.store(place, sums)


@triton.jit(do_not_specialize=["M", "span"])
def products_kernel(
    x1, x2, x3,
    thin,
    B1, B2, B3,
    rstd, weight,
    partials,
    M, N1, N2, N3,
    pitch1, pitch2, pitch3, thin_pitch,
    B1_pitch, B2_pitch, B3_pitch,
    rank1, rank2, rank3,
    blocks, span, over_columns, offset,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    x, B, N, pitch, B_pitch, rank, first, position = x1, B1, N1, pitch1, B1_pitch, rank1, 0, block
    if x2 is not None:  # noqa: SIM102  decided when compiling
        if block >= tl.cdiv(N1, BN):
            x, B, N, pitch, B_pitch, rank, first = x2, B2, N2, pitch2, B2_pitch, rank2, rank1
            position = block - tl.cdiv(N1, BN)
    if x3 is not None:  # noqa: SIM102
        if block >= tl.cdiv(N1, BN) + tl.cdiv(N2, BN):
            x, B, N, pitch, B_pitch, rank, first = x3, B3, N3, pitch3, B3_pitch, rank3, rank1 + rank2
            position = block - tl.cdiv(N1, BN) - tl.cdiv(N2, BN)
    column = position * BN + tl.arange(0, BN)
    inside = column < N
    if B is not None:
        b = _thin(B, column, B_pitch, rank, N, R)
    sums = tl.zeros((BN, R), dtype=tl.float32)
    start = split * span
    for at in range(start, tl.minimum(start + span, M), BM):
        row = at + tl.arange(0, BM)
        base = x + tl.cast(at, tl.int64) * pitch
        tile = tl.load(
            base + tl.arange(0, BM)[:, None] * pitch + column[None, :],
            mask=(row < M)[:, None] & inside[None, :],
            other=0.0,
        )
        t = _thin(thin + first, row, thin_pitch, rank, M, R)
        if rstd is not None:
            t = (t.to(tl.float32) * tl.load(rstd + row, mask=row < M, other=0.0)[:, None]).to(t.dtype)
        sums = _dot_over_rows(tile, t, sums)
        if B is not None:
            begin, lanes = _place(block, at, M, BM, R)
            products = _multiply_add(tile, b, tl.zeros((BM, R), dtype=tl.float32))
            tl.store(partials + over_columns + begin + lanes, products, mask=(row < M)[:, None])
    if weight is not None:
        sums *= (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset)[:, None]
    elif rstd is not None:
        sums *= offset
    begin, lanes = _place(split, block * BN, blocks * BN, BN, R)
    tl.store(partials + begin + lanes, sums)


@triton.jit(do_not_specialize=["M", "span"])
def glu_kernel(
    dh, gate, up,
    dxa_down, xa, B1, B2,
    dgate, dup, partials,
    M, N,
    dh_pitch, gate_pitch, up_pitch, down_pitch, xa_pitch, B1_pitch, B2_pitch,
    rank_down, rank1, rank2,
    blocks, span, splits, over_columns,
    ACT: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """With ADD, what is summed over rows is added to what the rows before have left there."""
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column = block * BN + tl.arange(0, BN)
    inside = column < N
    b1, b2 = _thin(B1, column, B1_pitch, rank1, N, R), _thin(B2, column, B2_pitch, rank2, N, R)
    sums1 = tl.zeros((BN, R), dtype=tl.float32)
    sums2 = tl.zeros((BN, R), dtype=tl.float32)
    sums_down = tl.zeros((BN, R), dtype=tl.float32)
    start = split * span
    for at in range(start, tl.minimum(start + span, M), BM):
        row = at + tl.arange(0, BM)
        lane = tl.arange(0, BM)[:, None]
        there = (row < M)[:, None] & inside[None, :]
        base = tl.cast(at, tl.int64)
        dy = tl.load(dh + base * dh_pitch + lane * dh_pitch + column[None, :], mask=there, other=0.0).to(tl.float32)
        g = tl.load(gate + base * gate_pitch + lane * gate_pitch + column[None, :], mask=there, other=0.0)
        g = g.to(tl.float32)
        u = tl.load(up + base * up_pitch + lane * up_pitch + column[None, :], mask=there, other=0.0).to(tl.float32)
        share, slope = _share(g, ACT)
        kind = dgate.dtype.element_ty
        h = _settled((g * share * u).to(kind))
        dg = _settled((dy * u * (share + g * slope)).to(kind))
        du = _settled((dy * g * share).to(kind))
        tl.store(dgate + base * N + lane * N + column[None, :], dg, mask=there)
        tl.store(dup + base * N + lane * N + column[None, :], du, mask=there)
        sums_down = _dot_over_rows(h, _thin(dxa_down, row, down_pitch, rank_down, M, R), sums_down)
        sums1 = _dot_over_rows(dg, _thin(xa, row, xa_pitch, rank1, M, R), sums1)
        sums2 = _dot_over_rows(du, _thin(xa + rank1, row, xa_pitch, rank2, M, R), sums2)
        begin, lanes = _place(block, at, M, BM, R)
        products = _multiply_add(dg, b1, tl.zeros((BM, R), dtype=tl.float32))
        tl.store(partials + over_columns + begin + lanes, products, mask=(row < M)[:, None])
        begin, lanes = _place(blocks + block, at, M, BM, R)
        products = _multiply_add(du, b2, tl.zeros((BM, R), dtype=tl.float32))
        tl.store(partials + over_columns + begin + lanes, products, mask=(row < M)[:, None])
    begin, lanes = _place(split, block * BN, blocks * BN, BN, R)
    _leave(partials + begin + lanes, sums1, ADD)
    begin, lanes = _place(splits + split, block * BN, blocks * BN, BN, R)
    _leave(partials + begin + lanes, sums2, ADD)
    begin, lanes = _place(2 * splits + split, block * BN, blocks * BN, BN, R)
    _leave(partials + begin + lanes, sums_down, ADD)


@triton.jit
def _sum(
    partials, out, tile, start, stride, count, size, rank, row_pitch, column_pitch, scale,
    BLOCK: tl.constexpr, R: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    element = tile * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, count, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        values = tl.load(
            partials + start + tl.cast(part[:, None], tl.int64) * stride + element[None, :],
            mask=(part < count)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(values, axis=0)
    row, r = element // R, element % R
    tl.store(out + tl.cast(row, tl.int64) * row_pitch + r * column_pitch, total * scale, mask=inside & (r < rank))


@triton.jit
def sums_kernel(
    partials,
    out1, out2, out3, out4, out5, out6,
    sums, scales,
    BLOCK: tl.constexpr, R: tl.constexpr, AT_ONCE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """``sums``: of each output the first program and the one behind its last, then what ``_sum`` takes."""
    program = tl.program_id(0)
    outs = (out1, out2, out3, out4, out5, out6)
    for i in tl.static_range(6):  # pyright: ignore[reportGeneralTypeIssues]
        if outs[i] is not None:
            begin, end = sums[FIELDS * i], sums[FIELDS * i + 1]
            if program >= begin and program < end:
                _sum(
                    partials, outs[i], program - begin,
                    sums[FIELDS * i + 2], sums[FIELDS * i + 3], sums[FIELDS * i + 4], sums[FIELDS * i + 5],
                    sums[FIELDS * i + 6], sums[FIELDS * i + 7], sums[FIELDS * i + 8], scales[i],
                    BLOCK, R, AT_ONCE,
                )  # fmt: skip
