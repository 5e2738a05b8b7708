"""The kernels of low_rank_product.py: what they compute, and how a step picks what it reads, is said there."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def _tile(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile of y.

    Walking a few rows of tiles column by column, the programs that run at one time read few rows of a and few columns
    of b, and find them in the L2 cache.
    """
    per_group = GROUP * columns
    first = index // per_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + index % per_group % height, index % per_group // height


@triton.jit
def _multiply_add(x, w, product):
    if INTERPRETED:  # there bfloat16 is stored as integers, and multiplied as such
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, product)


@triton.jit
def _plus_bias(product, bias, column, N, BN: tl.constexpr):
    if bias is not None:
        n = column + tl.arange(0, BN)
        product += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return product


@triton.jit(do_not_specialize=["M", "N", "K", "K2", "K3", "rank"])
def _descriptor_kernel(
    a,
    b,
    a2,
    b2,
    a3,
    b3,
    p,
    q,
    bias,
    y,
    M,
    N,
    K,
    K2,
    K3,
    rank,
    TRANSPOSED: tl.constexpr,  # b and q lie in memory as [N, K] and [N, rank]
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    end = tl.cdiv(K, BK)  # of the steps through a and b
    end2 = end + tl.cdiv(K2, BK)
    end3 = end2 + tl.cdiv(K3, BK)
    all_steps = end3 + tl.cdiv(rank, BK)
    tl.assume(all_steps > 0)  # or flattening keeps a second kernel for the case of no steps
    first, tiles, programs = tl.program_id(0), rows * columns, tl.num_programs(0)
    for index in tl.range(first, tiles, programs, flatten=FLATTEN):  # pyright: ignore
        row, column = _tile(index, rows, columns, GROUP)
        product = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(all_steps):
            left, right, k = p, q, (step - end3) * BK
            if a3 is not None:  # noqa: SIM102  decided when compiling
                if step < end3:
                    left, right, k = a3, b3, (step - end2) * BK
            if a2 is not None:  # noqa: SIM102
                if step < end2:
                    left, right, k = a2, b2, (step - end) * BK
            if step < end:
                left, right, k = a, b, step * BK
            x = left.load([row * BM, k])
            w = right.load([column * BN, k]).T if TRANSPOSED else right.load([k, column * BN])
            product = _multiply_add(x, w, product)
        product = _plus_bias(product, bias, column * BN, N, BN)
        if HALVES:
            halves = tl.permute(tl.reshape(product, (BM, 2, BN // 2)), (0, 2, 1))
            low, high = tl.split(halves)
            y.store([row * BM, column * BN], low.to(y.dtype))
            y.store([row * BM, column * BN + BN // 2], high.to(y.dtype))
        else:
            y.store([row * BM, column * BN], product.to(y.dtype))


@triton.jit(do_not_specialize=["M"])
def _pointer_kernel(
    a,
    b,
    a2,
    b2,
    a3,
    b3,
    p,
    q,
    bias,
    y,
    M,
    N,
    K,
    K2,
    K3,
    rank,
    a_pitch,
    b_pitch,
    a2_pitch,
    b2_pitch,
    a3_pitch,
    b3_pitch,
    p_pitch,
    q_pitch,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, column = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    # Positions are 64-bit scalars, the lanes 32-bit.
    row, column = (row * BM).to(tl.int64), (column * BN).to(tl.int64)
    m, n, lane = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    in_rows, in_columns = (row + m < M)[:, None], (column + n < N)[None, :]
    end = tl.cdiv(K, BK)
    end2 = end + tl.cdiv(K2, BK)
    end3 = end2 + tl.cdiv(K3, BK)
    all_steps = end3 + tl.cdiv(rank, BK)
    product = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(all_steps):
        left, right, left_pitch, right_pitch, k, depth = p, q, p_pitch, q_pitch, (step - end3) * BK, rank
        if a3 is not None:  # noqa: SIM102  decided when compiling
            if step < end3:
                left, right, left_pitch, right_pitch, k, depth = a3, b3, a3_pitch, b3_pitch, (step - end2) * BK, K3
        if a2 is not None:  # noqa: SIM102
            if step < end2:
                left, right, left_pitch, right_pitch, k, depth = a2, b2, a2_pitch, b2_pitch, (step - end) * BK, K2
        if step < end:
            left, right, left_pitch, right_pitch, k, depth = a, b, a_pitch, b_pitch, step * BK, K
        inside = k + lane < depth
        left += row * left_pitch + k
        x = tl.load(left + m[:, None] * left_pitch + lane[None, :], mask=in_rows & inside[None, :], other=0.0)
        if TRANSPOSED:
            right += column * right_pitch + k
            w = right + n[None, :] * right_pitch + lane[:, None]
        else:
            right += tl.cast(k, tl.int64) * right_pitch + column
            w = right + lane[:, None] * right_pitch + n[None, :]
        product = _multiply_add(x, tl.load(w, mask=in_columns & inside[:, None], other=0.0), product)
    product = _plus_bias(product, bias, column, N, BN)
    y += row * N + column
    tl.store(y + m[:, None] * N + n[None, :], product.to(y.dtype.element_ty), mask=in_rows & in_columns)
