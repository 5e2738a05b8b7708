"""The kernel of losses in chunks: one program reduces one row of logits and overwrites it by its gradient.

In the first sweep over the row, each lane keeps the maximum and the sum of exponentials of what it has read; the lanes
are combined once, at the end. The second sweep finds the row in the L2 cache as long as the rows in flight (a few per
multiprocessor, 256 KB each at 128256 in bf16) fit there.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
"""Logits read at a time. At 16 per thread, two 128-bit loads are in flight and no accumulator spills."""
WARPS = 8

_LOWEST = tl.constexpr(-3.0e38)
"""The maximum of nothing: finite, because the difference of two infinities is NaN."""


@triton.jit
def _tanh(x):
    # exp(-2|x|) cannot overflow. The difference cancels near 0, to an absolute error of one rounding of 1.
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def cross_entropy_kernel(
    logits,
    labels,
    losses,
    entropies,
    top1s,
    loss_unit,
    entropy_unit,
    vocabulary,
    stride,
    ignore_index,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    UNIT_PER_ROW: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss, entropy and largest logit of a row, and their gradient with respect to the raw logits, in place.

    Args:
        logits: [rows, vocabulary], ``stride`` elements apart; with GRADIENT overwritten by scale · softcap' ·
            ((p - onehot) · loss_unit - p (log p + entropy) · entropy_unit). The gaps between rows are written to as
            well: with a stride that is a multiple of 16, all accesses are of 128 bits whatever the vocabulary.
        labels: int64 [rows]. losses: float32 [rows]; 0 where the label is ``ignore_index``, NaN if it is out of range.
        entropies, top1s: float32 and int64 [rows], with STATISTICS.
        loss_unit: float32 in memory, one number, or with UNIT_PER_ROW one of each row.
        entropy_unit: likewise, with ENTROPY_GRADIENT, which takes UNIT_PER_ROW and STATISTICS.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    counts = label != ignore_index
    lane = tl.arange(0, BLOCK)

    in_range = (label >= 0) & (label < vocabulary)
    target = tl.where(in_range, label, 0).to(tl.int32)
    # Read before any thread can overwrite it: the reductions below synchronise the block.
    at_label = tl.load(logits + target).to(tl.float32) * scale
    if CAPPED:
        at_label = softcap * _tanh(at_label / softcap)

    highest = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # Σ exp(x - highest)
    weighted = tl.zeros([BLOCK], tl.float32)  # Σ exp(x - highest) (x - highest)
    position = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tl.where(counts | STATISTICS, vocabulary, 0), BLOCK):
        column = start + lane
        x = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32) * scale
        if CAPPED:
            x = softcap * _tanh(x / softcap)
        x = tl.where(column < vocabulary, x, float("-inf"))
        difference = x - highest
        higher = difference > 0
        e = tl.exp(-tl.abs(difference))  # one of the two exponentials is 1
        if STATISTICS:
            # exp(-inf) (-inf) is NaN and counts as nothing.
            shifted = tl.where(higher, e * (weighted - total * difference), weighted)
            weighted = tl.where(higher | (e == 0), shifted, weighted + e * difference)
            position = tl.where(higher, column, position)
        total = tl.where(higher, total * e + 1, total + e)
        highest = tl.where(higher, x, highest)

    top = tl.max(highest, axis=0)
    rescale = tl.exp(highest - top)
    sum_exp = tl.sum(total * rescale, axis=0)
    share = tl.fdiv(1.0, sum_exp)
    log_sum = tl.log(sum_exp)
    loss = tl.where(in_range, top - at_label + log_sum, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if STATISTICS:
        entropy = log_sum - tl.sum((weighted + total * (highest - top)) * rescale, axis=0) * share
        tl.store(entropies + row, entropy)
        tl.store(top1s + row, tl.min(tl.where(highest == top, position, vocabulary), axis=0))
    if GRADIENT:
        if UNIT_PER_ROW:
            loss_unit += row
        if counts | ENTROPY_GRADIENT:
            unit = tl.where(in_range, tl.load(loss_unit) * scale, float("nan"))
            unit = tl.where(counts, unit, 0.0)
            if ENTROPY_GRADIENT:
                spread = tl.load(entropy_unit + row) * scale
            for start in range(0, vocabulary, BLOCK):
                column = start + lane
                x = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32) * scale
                slope = 1.0
                if CAPPED:
                    t = _tanh(x / softcap)
                    x = softcap * t
                    slope = 1 - t * t
                p = tl.exp(x - top) * share
                gradient = tl.where(column == target, p - 1, p) * unit
                if ENTROPY_GRADIENT:  # where p is 0, log p may be infinite
                    gradient -= tl.where(p > 0, p * (x - top - log_sum + entropy), 0.0) * spread
                tl.store(logits + column, gradient * slope, mask=column < stride)
        else:
            for start in range(0, vocabulary, BLOCK):
                column = start + lane
                tl.store(logits + column, tl.zeros([BLOCK], tl.float32), mask=column < stride)
