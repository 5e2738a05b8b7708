"""Attention of the newest token of each of many sequences, whose keys and values lie in pages.

out = softmax(q kT * scale) v over the ``lengths[row]`` keys that precede the query in its sequence, and its own. Pages
and tables: Kwon et al. 2023, arXiv:2309.06180; the context cut into slices that are computed at the same time and then
merged by their denominators: Dao et al. 2023, Flash-Decoding.

q: [batch, heads, 1, width]; k, v: [batch, kv_heads, 1, width or channels], the query's own, which are in no page yet:
nothing is written here. keys: [pages, kv_heads, page, width], values: [pages, kv_heads, page, channels]: what all
sequences share. tables: int32 [batch, most pages], of each sequence its pages in order; entries behind its last one
are not read. lengths: int32 [batch]. window: the query sees as many keys, its own included, or all (None). cap: scores
are cap tanh(score / cap), Gemma 2's (arXiv:2408.00118), or as they are (None). Consecutive groups of query heads share
a key head. Returns out, [batch, heads, 1, channels], and lse, the logarithm of the denominator, natural, float32
(float64 in float64), [batch, heads, 1].

A step of decoding reads every key and value once and computes next to nothing: what counts is that all of the card
reads. Sequences times key heads are often fewer than it has processors, so contexts are cut into as many slices as fill
it; where they are not, there is one slice, and nothing to merge.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import attention as plain
from .operator import next_power_of_two, operator
from .paged_attention_triton import decode_kernel, merge_kernel
from .reasons import dtype_is

WIDEST = 256
"""Of a head: a tile of queries, one of keys and one of values are on the chip at a time."""
MOST_SLICES = 64
_LEAST_KEYS = 128
"""Of a slice, where slices are what fills the card."""
_PROGRAMS_PER_PROCESSOR = 2

# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gathered(own: Tensor, pages: Tensor, tables: Tensor) -> Tensor:
    """[batch, kv_heads, 1 + most keys, width]: the query's own first."""
    found = pages[tables.long()].transpose(2, 3).flatten(1, 2).transpose(1, 2)
    return torch.cat([own, found], dim=2)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    scores = _wide(q) @ plain.per_query_head(_gathered(k, keys, tables), q).transpose(-1, -2) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    position = torch.arange(scores.shape[-1], device=q.device) - 1  # -1 stands for the query's own
    visible = position < lengths[:, None]
    if window is not None:
        visible = visible & ((position > lengths[:, None] - window) | (position < 0))
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    # What lies behind a sequence's end may be anything, NaN too.
    gathered = _gathered(v, values, tables).masked_fill(~visible[:, None, :, None], 0.0)
    out = torch.softmax(scores, dim=-1) @ plain.per_query_head(gathered, q)
    return out.to(q.dtype).contiguous(), torch.logsumexp(scores, dim=-1).contiguous()


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, tables: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """What the reference returns, without its matrix of gathered keys."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


# -- launch ------------------------------------------------------------------------------------------------------------


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _slices(q: Tensor, keys: Tensor, tables: Tensor) -> int:
    """Into how many slices a context is cut; the same for all lengths, as a captured launch has to be."""
    if q.device.type != "cuda":
        return 1
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * _processors(q.device), q.shape[0] * keys.shape[1])
    longest = tables.shape[1] * keys.shape[2]
    return max(1, min(wanted, triton.cdiv(longest, _LEAST_KEYS), MOST_SLICES))


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def in_slices(
    slices: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    """The kernel, with every context cut into that many slices. Other arguments as of the operator."""
    (batch, heads, _, width), channels, kv_heads = q.shape, values.shape[3], keys.shape[1]
    q, k, v, keys, values = map(_readable, (q, k, v, keys, values))
    block, v_block = (max(16, next_power_of_two(size)) for size in (width, channels))
    large = max(block, v_block) > 128 or q.element_size() > 2
    out = torch.empty(batch, heads, 1, channels, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device)
    part_out, part_lse = out, lse
    if slices > 1:
        part_out = torch.empty(slices, batch, heads, channels, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(slices, batch, heads, dtype=torch.float32, device=q.device)
    launch: Any = decode_kernel[batch * kv_heads, slices]
    launch(
        q, k, v, keys, values, tables, lengths, part_out, part_lse, batch, kv_heads, heads // kv_heads,
        tables.stride(0), *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        *keys.stride()[:3], *values.stride()[:3], scale, window or 0, cap or 0.0,
        WIDTH=width, CHANNELS=channels, BLOCK=block, V_BLOCK=v_block, PAGE=keys.shape[2],
        ROWS=max(16, next_power_of_two(heads // kv_heads)), KEYS=32 if large else 64,
        WINDOW=window is not None, CAPPED=cap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2 if large else 3,
    )  # fmt: skip
    if slices > 1:
        launch = merge_kernel[(batch * heads,)]
        launch(
            part_out, part_lse, out, lse, batch * heads, slices,
            CHANNELS=channels, V_BLOCK=v_block, PARTS=next_power_of_two(slices), num_warps=4,
        )  # fmt: skip
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, tables: Tensor, *rest: Any) -> Any:
    if q.numel() == 0 or q.dtype == torch.float64:
        return _reference(q, k, v, keys, values, tables, *rest)
    return in_slices(_slices(q, keys, tables), q, k, v, keys, values, tables.contiguous(), *rest)


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
) -> str | None:
    if any(x.dim() != 4 for x in (q, k, v, keys, values)):
        return "q, k, v, keys and values have to have four dimensions"
    if not statically_known_true(q.shape[2] == 1):
        return f"there is one query for each sequence, not {q.shape[2]}"
    if len({x.dtype for x in (q, k, v, keys, values)}) > 1:
        return f"q, k, v, keys and values differ in dtype: {', '.join(str(x.dtype) for x in (q, k, v, keys, values))}"
    if not (tables.dtype == lengths.dtype == torch.int32):
        return f"tables and lengths have to be int32, not {tables.dtype} and {lengths.dtype}"
    if not statically_known_true(q.shape[1] % keys.shape[1] == 0):
        return f"{q.shape[1]} query heads are no multiple of {keys.shape[1]} key heads"
    if any(not isinstance(x.shape[3], int) or x.shape[3] > WIDEST for x in (q, values)):
        return f"the heads of q and v are {q.shape[3]} and {values.shape[3]} wide, the kernel takes at most {WIDEST}"
    if (cap is not None and cap <= 0) or (window is not None and window < 1):
        return f"cap {cap} and window {window} have to be positive"
    allowed = (torch.bfloat16, torch.float16, torch.float32)
    return dtype_is(q, *allowed) if q.device.type == "cuda" else dtype_is(q, *allowed, torch.float64)


def _operations(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, tables: Tensor, *rest: Any) -> Any:
    longest = tables.shape[1] * keys.shape[2]
    return 2 * q.shape[0] * q.shape[1] * longest * (q.shape[3] + values.shape[3])


paged_attention = operator(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor tables, Tensor lengths,"
    " float scale, int? window, float? cap) -> (Tensor out, Tensor lse)",
    reference=_reference,
    forward=_forward,
    supports=_supports,
    flops=_operations,
    fake=_shapes,
)
