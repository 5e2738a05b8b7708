"""The kernels of :mod:`capped_attention`: out by blocks of queries, dq likewise, dk and dv by blocks of keys.

Each reads its operands where they lie, rows of contiguous channels; products are made by the tensor cores in the
operands' dtype and added in float32, everything else is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_entropy_triton import _tanh
from .low_rank_product_triton import INTERPRETED

# -- in kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    if INTERPRETED:  # there bfloat16 is stored as integers, and multiplied as such
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _rows(base, position, stride, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [positions, BLOCK] of a matrix whose columns lie side by side; zeros outside."""
    column = tl.arange(0, BLOCK)
    inside = (position < length)[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + position.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(base, position, stride, values, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = (position < length)[:, None] & (column < WIDTH)[None, :]
    tl.store(base + position.to(tl.int64)[:, None] * stride + column[None, :], values, mask=inside)


@triton.jit
def _sees(query, key, start, length, window, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """[queries, keys]; ``start`` is read with documents only."""
    visible = (key[None, :] <= query[:, None]) & (query < length)[:, None]
    if WINDOW:
        visible = visible & (key[None, :] > query[:, None] - window)
    if DOCUMENTS:
        visible = visible & (key[None, :] >= start[:, None])
    return visible


@triton.jit
def _first_key(starts, first_query, window, KEYS: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The block of keys in which the first key lies that queries from ``first_query`` on see."""
    first = 0
    if WINDOW:
        first = tl.maximum(first, first_query - window + 1)
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(starts + first_query))
    return first // KEYS * KEYS


# -- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    q, k, v, starts, out, lse, length, heads, group,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    scale, window, cap,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first_query = tl.program_id(0) * QUERIES
    query = first_query + tl.arange(0, QUERIES)
    starts += batch * length
    start = tl.load(starts + query, mask=query < length, other=0) if DOCUMENTS else query
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    q_tile = _rows(q + batch * q_batch + head * q_head, query, q_row, length, WIDTH, BLOCK)

    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    product = tl.zeros((QUERIES, V_BLOCK), tl.float32)
    first = _first_key(starts, first_query, window, KEYS, WINDOW, DOCUMENTS)
    for first_key in range(first, tl.minimum(first_query + QUERIES, length), KEYS):
        key = first_key + tl.arange(0, KEYS)
        k_tile = _rows(k, key, k_row, length, WIDTH, BLOCK)
        scores = _tanh(_dot(q_tile, k_tile.T, PRECISION) * (scale / cap)) * cap
        scores = tl.where(_sees(query, key, start, length, window, WINDOW, DOCUMENTS), scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # no key was visible so far
        weights = tl.exp(scores - level[:, None])
        shrink = tl.exp(largest - level)
        v_tile = _rows(v, key, v_row, length, CHANNELS, V_BLOCK)
        product = product * shrink[:, None] + _dot(weights.to(v_tile.dtype), v_tile, PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = higher
    total = tl.where(query < length, total, 1.0)
    row = heads * CHANNELS
    out += batch * length * row + head * CHANNELS
    _store_rows(out, query, row, product / total[:, None], length, CHANNELS, V_BLOCK)
    lse += (batch * heads + head) * length
    tl.store(lse + query, largest + tl.log(total), mask=query < length)


@triton.jit
def _slopes(
    q_tile, k_tile, v_tile, grad_tile, query, key, start, lse, delta, length, scale, window, cap,
    WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities [queries, keys] and the gradient of the products, less the factor ``scale``."""
    capped = _tanh(_dot(q_tile, k_tile.T, PRECISION) * (scale / cap))
    visible = _sees(query, key, start, length, window, WINDOW, DOCUMENTS)
    weights = tl.where(visible, tl.exp(capped * cap - lse[:, None]), 0.0)
    of_weights = _dot(grad_tile, v_tile.T, PRECISION)
    return weights, weights * (of_weights - delta[:, None]) * (1 - capped * capped)


@triton.jit
def queries_kernel(
    grad, q, k, v, starts, lse, delta, dq, length, heads, group,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    scale, window, cap,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first_query = tl.program_id(0) * QUERIES
    query = first_query + tl.arange(0, QUERIES)
    starts += batch * length
    start = tl.load(starts + query, mask=query < length, other=0) if DOCUMENTS else query
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    q_tile = _rows(q + batch * q_batch + head * q_head, query, q_row, length, WIDTH, BLOCK)
    grad_tile = _rows(grad + batch * g_batch + head * g_head, query, g_row, length, CHANNELS, V_BLOCK)
    statistic = (batch * heads + head) * length + query
    lse_ = tl.load(lse + statistic, mask=query < length, other=0.0)
    delta_ = tl.load(delta + statistic, mask=query < length, other=0.0)

    product = tl.zeros((QUERIES, BLOCK), tl.float32)
    first = _first_key(starts, first_query, window, KEYS, WINDOW, DOCUMENTS)
    for first_key in range(first, tl.minimum(first_query + QUERIES, length), KEYS):
        key = first_key + tl.arange(0, KEYS)
        k_tile = _rows(k, key, k_row, length, WIDTH, BLOCK)
        v_tile = _rows(v, key, v_row, length, CHANNELS, V_BLOCK)
        _, slope = _slopes(
            q_tile, k_tile, v_tile, grad_tile, query, key, start, lse_, delta_, length, scale, window, cap,
            WINDOW, DOCUMENTS, PRECISION,
        )  # fmt: skip
        product += _dot(slope.to(k_tile.dtype), k_tile, PRECISION)
    row = heads * WIDTH
    _store_rows(dq + batch * length * row + head * WIDTH, query, row, product * scale, length, WIDTH, BLOCK)


@triton.jit
def keys_kernel(
    grad, q, k, v, starts, lse, delta, dk, dv, length, heads, group,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    scale, window, cap,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    first_key = tl.program_id(0) * KEYS
    key = first_key + tl.arange(0, KEYS)
    starts += batch * length
    k_tile = _rows(k + batch * k_batch + kv_head * k_head, key, k_row, length, WIDTH, BLOCK)
    v_tile = _rows(v + batch * v_batch + kv_head * v_head, key, v_row, length, CHANNELS, V_BLOCK)

    k_product = tl.zeros((KEYS, BLOCK), tl.float32)
    v_product = tl.zeros((KEYS, V_BLOCK), tl.float32)
    stop = length
    if WINDOW:
        stop = tl.minimum(length, first_key + KEYS + window - 1)
    for member in range(group):
        head = kv_head * group + member
        q_ = q + batch * q_batch + head * q_head
        grad_ = grad + batch * g_batch + head * g_head
        for first_query in range(first_key // QUERIES * QUERIES, stop, QUERIES):
            # Documents follow one another: when the first query is past these keys, so are all that follow it.
            seen = tl.load(starts + first_query) < first_key + KEYS if DOCUMENTS else True
            if seen:
                query = first_query + tl.arange(0, QUERIES)
                start = tl.load(starts + query, mask=query < length, other=0) if DOCUMENTS else query
                q_tile = _rows(q_, query, q_row, length, WIDTH, BLOCK)
                grad_tile = _rows(grad_, query, g_row, length, CHANNELS, V_BLOCK)
                statistic = (batch * heads + head) * length + query
                lse_ = tl.load(lse + statistic, mask=query < length, other=0.0)
                delta_ = tl.load(delta + statistic, mask=query < length, other=0.0)
                weights, slope = _slopes(
                    q_tile, k_tile, v_tile, grad_tile, query, key, start, lse_, delta_, length, scale, window, cap,
                    WINDOW, DOCUMENTS, PRECISION,
                )  # fmt: skip
                v_product += _dot(weights.to(grad_tile.dtype).T, grad_tile, PRECISION)
                k_product += _dot(slope.to(q_tile.dtype).T, q_tile, PRECISION)
    row = kv_heads * WIDTH
    _store_rows(dk + batch * length * row + kv_head * WIDTH, key, row, k_product * scale, length, WIDTH, BLOCK)
    row = kv_heads * CHANNELS
    _store_rows(dv + batch * length * row + kv_head * CHANNELS, key, row, v_product, length, CHANNELS, V_BLOCK)
