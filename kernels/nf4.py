"""NF4, the 4-bit weights of QLoRA, unpacked: weight[i] = NF4[code[i]] * absmax[i // block].

Dettmers et al. 2023, arXiv:2305.14314, in the layout of bitsandbytes: two codes per byte, the high nibble first, row
after row without gaps. A code is the index of one of 16 quantiles of the normal distribution, and each block of weights
has one scale. Under double quantisation the scales are codes themselves: nested_code[absmax] * nested_absmax[i // block
// nested_block] + nested_offset. Everything is float32 and rounded where bitsandbytes rounds, so the weights are its
own, bit for bit.

The unpacked weight is meant to live for one product: it costs less to unpack again than to keep. A weight reads 0.5
bytes and writes 2 (bfloat16), beside 1/64 byte of scale: 8192 x 28672 move 0.59 GB, or 0.20 ms at the 2.97 TB/s that
an H100 copies with (bitsandbytes' two kernels reach 1.86 TB/s). At that rate a weight has 27 instructions; it takes 11,
because the table is read from shared memory. A tree of selections would take 23, most of them at half rate.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .launch import Fresh, Launch, by_layout
from .operator import operator

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the 16 codes, float32 (appendix E of the paper)."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights per scale: the sizes that bitsandbytes has, each of which divides what one program unpacks."""
GROUPS = 512
"""Groups of eight weights per program: four per thread, each one 32-bit load and (in bfloat16) one 128-bit store."""
WARPS = 4


# -- reference ---------------------------------------------------------------------------------------------------------


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two weights of every byte, float32 [256, 2]."""
    table = torch.tensor(NF4, device=device)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=-1)


def _bytes(packed: Tensor) -> Tensor:
    """The codes as one row of bytes, whatever dtype they are stored as."""
    return packed.reshape(-1).view(torch.uint8)


def _reference(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    rows: int,
    columns: int,
    block: int,
    nested_block: int,
    dtype: torch.dtype,
) -> Tensor:
    scale = absmax
    if nested_code is not None and nested_absmax is not None and nested_offset is not None:
        nested_scale = nested_absmax.repeat_interleave(nested_block)[: absmax.numel()]
        scale = nested_code[absmax.int()] * nested_scale + nested_offset
    values = F.embedding(_bytes(packed).int(), _pairs(packed.device)).view(-1)[: rows * columns]
    return (values * scale.repeat_interleave(block)[: rows * columns]).to(dtype).view(rows, columns)


def _fake(packed: Tensor, *args: Any) -> Tensor:
    *_, rows, columns, _, _, dtype = args
    return torch.empty((rows, columns), dtype=dtype, device=packed.device)


# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _nf4_kernel(
    packed,
    absmax,
    nested_code,
    nested_absmax,
    nested_offset,
    weight,
    n,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    # Positions are 64-bit scalars, the lanes 32-bit. A group is eight weights: four bytes, and one scale.
    start = tl.program_id(0).to(tl.int64) * (8 * GROUPS)
    left = tl.minimum(n - start, 8 * GROUPS).to(tl.int32)
    group = 8 * tl.arange(0, GROUPS)
    byte = group[:, None] // 2 + tl.arange(0, 4)[None, :]
    position = group[:, None] + tl.arange(0, 8)[None, :]

    block = tl.program_id(0) * (8 * GROUPS // BLOCK) + group // BLOCK
    scale = tl.load(absmax + block, mask=None if EVEN else group < left)
    if NESTED:
        # The mask spares no lane the lookup: whatever such a lane holds, it is a code.
        nested_scale = tl.load(nested_absmax + block // NESTED_BLOCK, mask=None if EVEN else group < left)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested_scale + tl.load(nested_offset)

    # The bytes' own layout serves the store as well: four bytes of a thread become its eight weights.
    pair = tl.load(packed + start // 2 + byte, mask=None if EVEN else 2 * byte < left)
    code = tl.reshape(tl.join(pair >> 4, pair & 15), (8 * GROUPS,)).to(tl.int32)
    index = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):  # pyright: ignore[reportGeneralTypeIssues]
        table = tl.where(index == i, TABLE[i], table)
    value = tl.reshape(tl.gather(table, code, 0), (GROUPS, 8))
    tl.store(weight + start + position, value * scale[:, None], mask=None if EVEN else position < left)


@by_layout
def _launch(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    rows: int,
    columns: int,
    block: int,
    nested_block: int,
    dtype: torch.dtype,
) -> Launch:
    n, scales = rows * columns, (absmax, nested_code, nested_absmax, nested_offset)
    return Launch(
        _nf4_kernel,
        triton.cdiv(n, 8 * GROUPS),
        device=packed.device,
        results=[Fresh.contiguous((rows, columns), dtype)],
        scalars=(n,),
        constants={
            "TABLE": NF4,
            "BLOCK": block,
            "NESTED_BLOCK": nested_block,
            "NESTED": nested_code is not None,
            "GROUPS": GROUPS,
            "EVEN": n % (8 * GROUPS) == 0,
        },
        copies=(
            None if packed.is_contiguous() and packed.dtype == torch.uint8 else _bytes,
            *(None if x is None or x.is_contiguous() else Tensor.contiguous for x in scales),
        ),
        num_warps=WARPS,
        enable_fp_fusion=False,  # bitsandbytes rounds the nested scale's product before it adds the offset
    )


def _forward(packed: Tensor, *others: Any) -> Any:
    return _launch(packed, *others)(packed, *others[:4])[0]


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    rows: int,
    columns: int,
    block: int,
    nested_block: int,
    dtype: torch.dtype,
) -> str | None:
    if not all(isinstance(size, int) for size in (rows, columns, block, nested_block)):
        return "the weight's sizes are symbolic"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the weight would be {dtype}"
    if block not in BLOCKS:
        return f"{block} weights share a scale, which is none of {', '.join(map(str, BLOCKS))}"
    if not statically_known_true(2 * packed.numel() * packed.element_size() >= rows * columns):
        return f"{tuple(packed.shape)} of {packed.dtype} do not hold {rows} x {columns} codes of 4 bits"
    blocks = triton.cdiv(rows * columns, block)
    if nested_code is None and nested_absmax is None and nested_offset is None:
        parts = {"absmax": (absmax, torch.float32, blocks)}
    elif nested_code is None or nested_absmax is None or nested_offset is None:
        return "a part of the double quantisation is missing"
    else:
        parts = {
            "absmax": (absmax, torch.uint8, blocks),
            "nested_code": (nested_code, torch.float32, 256),
            "nested_absmax": (nested_absmax, torch.float32, triton.cdiv(blocks, nested_block)),
            "nested_offset": (nested_offset, torch.float32, 1),
        }
    for name, (x, expected, count) in parts.items():
        if x.dtype != expected:
            return f"{name} is {x.dtype}"
        if not statically_known_true(x.numel() == count):
            return f"{name} has {x.numel()} values where {count} belong"
    return None


nf4_dequantize = operator(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, Tensor? nested_offset, "
    "int rows, int columns, int block, int nested_block, ScalarType dtype) -> (Tensor weight)",
    reference=_reference,
    fake=_fake,
    forward=_forward,
    supports=_supports,
    flops=lambda packed, absmax, code, nested, offset, rows, columns, *_: 2 * rows * columns,
)
