"""The kernels of :mod:`paged_attention`: a slice of each context by one program, and the slices put together.

All query heads that share a key head are one tile, so each key and value is read once. Products are made by the tensor
cores in the operands' dtype and added in float32, everything else is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .capped_attention_triton import _dot
from .cross_entropy_triton import _tanh


@triton.jit
def _scaled(products, scale, cap, CAPPED: tl.constexpr):
    if CAPPED:
        return _tanh(products * (scale / cap)) * cap
    return products * scale


@triton.jit
def decode_kernel(
    q, k, v, keys, values, tables, lengths, out, lse, batch, kv_heads, group, table_row,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    keys_page, keys_head, keys_row, values_page, values_head, values_row,
    scale, window, cap,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Results [slices, batch, heads, ...]; where a slice holds no key, its lse is -inf and its out zero."""
    row, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths + row)
    first = 0
    if WINDOW:  # of the window the query's own position is one
        first = tl.maximum(length - window + 1, 0)
    span = tl.cdiv(tl.cdiv(length - first, parts), KEYS) * KEYS
    begin = first + part * span
    end = tl.minimum(begin + span, length)

    member, column, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, V_BLOCK)
    head = kv_head * group + member
    q_inside = (member < group)[:, None] & (column < WIDTH)[None, :]
    q_tile = tl.load(q + row * q_batch + head[:, None] * q_head + column[None, :], mask=q_inside, other=0.0)

    # The query's own key is not in a page yet: the first slice begins with it.
    own_k = tl.load(k + row * k_batch + kv_head * k_head + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    own_v = tl.load(v + row * v_batch + kv_head * v_head + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    own = _scaled(tl.sum(q_tile.to(tl.float32) * own_k[None, :], 1), scale, cap, CAPPED)
    is_first = part == 0
    largest = tl.where(is_first, own, float("-inf"))
    total = tl.where(is_first, 1.0, 0.0) + tl.zeros((ROWS,), tl.float32)
    product = tl.where(is_first, 1.0, 0.0) * own_v[None, :] + tl.zeros((ROWS, V_BLOCK), tl.float32)

    keys += kv_head * keys_head
    values += kv_head * values_head
    for first_key in range(begin, end, KEYS):
        key = first_key + tl.arange(0, KEYS)
        there = key < end
        page = tl.load(tables + row * table_row + key // PAGE, mask=there, other=0).to(tl.int64)
        place = (key % PAGE).to(tl.int64)
        k_rows = keys + page * keys_page + place * keys_row
        k_inside = there[:, None] & (column < WIDTH)[None, :]
        k_tile = tl.load(k_rows[:, None] + column[None, :], mask=k_inside, other=0.0)
        scores = _scaled(_dot(q_tile, k_tile.T, PRECISION), scale, cap, CAPPED)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(largest - higher)
        v_rows = values + page * values_page + place * values_row
        v_inside = there[:, None] & (channel < CHANNELS)[None, :]
        v_tile = tl.load(v_rows[:, None] + channel[None, :], mask=v_inside, other=0.0)
        product = product * shrink[:, None] + _dot(weights.to(v_tile.dtype), v_tile, PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = higher

    heads = kv_heads * group
    result = (part.to(tl.int64) * batch + row) * heads + head
    some = tl.where(total > 0.0, total, 1.0)
    out_inside = (member < group)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(out + result[:, None] * CHANNELS + channel[None, :], product / some[:, None], mask=out_inside)
    tl.store(lse + result, largest + tl.log(some), mask=member < group)


@triton.jit
def merge_kernel(
    part_out, part_lse, out, lse, results, parts,
    CHANNELS: tl.constexpr, V_BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query of one head: the softmax over its slices, each weighted by its denominator."""
    result = tl.program_id(0).to(tl.int64)
    part, channel = tl.arange(0, PARTS), tl.arange(0, V_BLOCK)
    place = part.to(tl.int64) * results + result
    part_lses = tl.load(part_lse + place, mask=part < parts, other=float("-inf"))
    largest = tl.max(part_lses, 0)  # of the first slice, which is never empty, or more
    weights = tl.exp(part_lses - largest)
    total = tl.sum(weights, 0)
    inside = (part < parts)[:, None] & (channel < CHANNELS)[None, :]
    outs = tl.load(part_out + place[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
    merged = tl.sum(outs * (weights / total)[:, None], 0)
    tl.store(out + result * CHANNELS + channel, merged, mask=channel < CHANNELS)
    tl.store(lse + result, largest + tl.log(total))
