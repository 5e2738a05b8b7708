"""What backward of adapted layers wants of its large matrices, from one reading of each.

An adapter of rank r (LoRA: Hu et al. 2021, arXiv:2106.09685) multiplies activations of thousands of columns with
matrices of r columns. Such products are bound by reading the activations, and a library reads them once for each. Here
[M, N] is a large matrix, rows are tokens, and all else is thin:

* ``up_products``: with y = x Wᵀ + scale · xa Bᵀ, the gradients dxa = scale · dy B and dB = scale · dyᵀ xa of up to
  three layers that read one input (their xa are columns of one matrix, and so are their dxa);
* ``down_product``: dA = dxaᵀ x, where x may be given as what it was before its norm, x = z · rstd · (weight + offset):
  dA = (rstd · dxa)ᵀ z · (weight + offset), which spares making the norm again;
* ``glu_products``: all that a gated MLP wants of its widest matrices. With h = act(gate) · up and dh the gradient of
  h: dgate and dup, the dxa and dB of the layers that made gate and up, and the dA of the layer that read h. h is
  never in memory.

A program holds a block of columns and walks down some of the rows. What is summed over rows stays in its registers
and is written once (of a gated MLP once for every 8192 rows, added to what those before have left there); what is
summed over columns, which other programs hold, is written for each block. These partial sums are float32, and a second
kernel adds them in a fixed order. Traffic beside one reading of the large matrices is 2 · 4 R / BLOCK_N bytes an
element for the sums over columns (R: the rank rounded up to 16 or 32), which the cache takes most of: 0.5 of 2 bytes at
rank 16. For a 4096 x 14336 MLP in bf16, five large matrices move in place of thirteen: 0.59 GB, 0.20 ms at 2.97 TB/s
(H100 copy), in place of 1.53 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Fresh, Launch, by_layout, is_interpreted
from .low_rank_product import _multiprocessors
from .reasons import small_card
from .thin_products_triton import glu_kernel, products_kernel, sums_kernel

WIDEST = 32
"""Ranks above this gain nothing: the partial sums move as much as another reading of the matrix."""
MOST = 3
"""Layers at once."""
ROWS_AT_ONCE = 8192
"""Of a gated MLP: its sums over columns take half as much memory as one of its matrices."""


class Tiling(NamedTuple):
    """How a kernel walks."""

    rows: int
    columns: int
    warps: int
    per_processor: int
    """Programs that are started for each multiprocessor."""
    stages: int = 2


# The fastest of nine (up, down) and nineteen (glu) on an H100, 4096 tokens, see benchmarks/NOTES.md.
UP = Tiling(64, 256, warps=8, per_processor=2)
DOWN = Tiling(64, 128, warps=4, per_processor=4, stages=3)
GLU = Tiling(32, 128, warps=4, per_processor=4, stages=3)


# -- launch ------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One result of the second kernel: ``count`` partial sums of [rows, R], ``stride`` apart, become [rows, rank]."""

    start: int
    stride: int
    count: int
    rows: int
    rank: int
    row_pitch: int
    column_pitch: int
    scale: float = 1.0


class _Walk(NamedTuple):
    """How the matrices are cut into programs, and where their partial sums lie."""

    tiling: Tiling
    blocks: tuple[int, ...]
    """Of columns, by matrix."""
    span: int
    """Rows of a program."""
    splits: int
    R: int

    @property
    def programs(self) -> int:
        return sum(self.blocks) * self.splits

    def over_rows(self, kinds: int = 1) -> int:
        """Elements of what is summed over rows, for so many results."""
        return kinds * self.splits * sum(self.blocks) * self.tiling.columns * self.R

    def over_columns(self, rows: int, kinds: int = 1) -> int:
        """Elements of what is summed over columns."""
        return kinds * sum(self.blocks) * rows * self.R


def _walk(tiling: Tiling, rows: int, widths: Sequence[int], ranks: Sequence[int], device: torch.device) -> _Walk:
    R = max(16, 1 << (max(ranks) - 1).bit_length())
    if R > WIDEST:
        tiling = tiling._replace(columns=tiling.columns * WIDEST // R)  # as many sums in registers
    blocks = tuple(-(-width // tiling.columns) for width in widths)
    wanted = max(1, tiling.per_processor * _multiprocessors(device) // sum(blocks))
    span = -(-rows // (wanted * tiling.rows)) * tiling.rows
    return _Walk(tiling, blocks, span, -(-rows // span), R)


SUM_BLOCK, SUM_AT_ONCE = 256, 8


def _summing(parts: Sequence[_Part], R: int, device: torch.device) -> Launch:
    """The second kernel: called with the partial sums and as many tensors to fill as it has places for."""
    sums: list[int] = []
    programs = 0
    for part in parts:
        begin, size = programs, part.rows * R
        programs += -(-size // SUM_BLOCK)
        sums += [begin, programs, part.start, part.stride, part.count, size, part.rank, part.row_pitch]
        sums += [part.column_pitch]
    return Launch(
        sums_kernel,
        programs,
        device=device,
        results=[],
        scalars=(tuple(sums), tuple(float(part.scale) for part in parts)),
        constants={"BLOCK": SUM_BLOCK, "R": R, "AT_ONCE": SUM_AT_ONCE, "FIELDS": len(sums) // len(parts)},
        num_warps=4,
    )


def _filled(launch: Launch, partials: Tensor | None, outs: Sequence[Tensor]) -> None:
    launch(partials, *outs, *[None] * (2 * MOST - len(outs)))


def _padded(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (MOST - len(tensors))]


def _pitch(x: Tensor | None) -> int:
    """Elements from row to row, where rows are read as they lie or copied."""
    if x is None:
        return 0
    return x.stride(0) if _lies_in_rows(x) else x.shape[1]


def _lies_in_rows(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _copies(*matrices: Tensor | None) -> list[Any]:
    return [None if x is None or _lies_in_rows(x) else Tensor.contiguous for x in matrices]


def _numbers(xs: Sequence[Tensor | None], position: int) -> list[int]:
    return [0 if x is None else x.shape[position] for x in xs]


@by_layout
def _up_launches(scales: tuple[float, ...], xa: Tensor, *matrices: Tensor | None) -> tuple[Launch, Launch]:
    """For the gradients of y, and the B, each padded with None."""
    dys, Bs = matrices[:MOST], matrices[MOST:]
    rows, device = xa.shape[0], xa.device
    widths, ranks = [n for n in _numbers(dys, 1) if n], _numbers(Bs, 1)
    walk = _walk(UP, rows, widths, ranks, device)
    over_rows, all_columns = walk.over_rows(), sum(walk.blocks) * walk.tiling.columns
    first = Launch(
        products_kernel,
        walk.programs,
        device=device,
        results=[Fresh.contiguous((over_rows + walk.over_columns(rows),), torch.float32)],
        scalars=[
            *(rows, *_numbers(dys, 1), *map(_pitch, dys), _pitch(xa), *map(_pitch, Bs), *ranks),
            *(sum(walk.blocks), walk.span, over_rows, 0.0),
        ],
        constants={"BM": walk.tiling.rows, "BN": walk.tiling.columns, "R": walk.R},
        copies=[*_copies(*dys, xa, *Bs), None, None],
        num_warps=walk.tiling.warps,
        num_stages=walk.tiling.stages,
    )
    parts, block = [], 0
    for count, rank, scale in zip(walk.blocks, ranks, scales, strict=False):
        start, stride = over_rows + block * rows * walk.R, rows * walk.R
        parts.append(_Part(start, stride, count, rows, rank, sum(ranks), 1, scale))
        block += count
    block = 0
    for count, width, rank, scale in zip(walk.blocks, widths, ranks, scales, strict=False):
        start, stride = block * walk.tiling.columns * walk.R, all_columns * walk.R
        parts.append(_Part(start, stride, walk.splits, width, rank, rank, 1, scale))
        block += count
    return first, _summing(parts, walk.R, device)


@by_layout
def _down_launches(
    offset: float, dxa: Tensor, x: Tensor, rstd: Tensor | None, weight: Tensor | None
) -> tuple[Launch, Launch]:
    (rows, width), rank, device = x.shape, dxa.shape[1], x.device
    walk = _walk(DOWN, rows, [width], [rank], device)
    first = Launch(
        products_kernel,
        walk.programs,
        device=device,
        results=[Fresh.contiguous((walk.over_rows(),), torch.float32)],
        scalars=[
            *(rows, width, 0, 0, _pitch(x), 0, 0, _pitch(dxa), 0, 0, 0, rank, 0, 0),
            *(sum(walk.blocks), walk.span, 0, float(offset)),
        ],
        constants={"BM": walk.tiling.rows, "BN": walk.tiling.columns, "R": walk.R},
        copies=[*_copies(x, None, None, dxa, None, None, None), None, None],
        num_warps=walk.tiling.warps,
        num_stages=walk.tiling.stages,
    )
    stride = walk.blocks[0] * walk.tiling.columns * walk.R
    return first, _summing([_Part(0, stride, walk.splits, width, rank, 1, width)], walk.R, device)


def _glu_walk(rows: int, matrices: Sequence[Tensor]) -> _Walk:
    """How rows are walked, so many at a time."""
    _, gate, _, dxa_down, _, B1, B2 = matrices
    ranks = [dxa_down.shape[1], B1.shape[1], B2.shape[1]]
    return _walk(GLU, min(rows, ROWS_AT_ONCE), [gate.shape[1]], ranks, gate.device)


@by_layout
def _glu_launches(act: int, scales: tuple[float, ...], first: bool, total: int, *tensors: Tensor) -> Sequence[Launch]:
    """For a chunk of ``total`` rows: the activation's kernel, what sums over columns, and what sums over all rows."""
    *matrices, _, _, _ = tensors
    (rows, width), device = matrices[1].shape, matrices[1].device
    rank_down, rank1, rank2 = (x.shape[1] for x in (matrices[3], *matrices[5:]))
    walk = _glu_walk(total, matrices)
    (blocks,), R, splits = walk.blocks, walk.R, walk.splits
    stride, each = blocks * walk.tiling.columns * R, rows * R
    over_rows = 3 * splits * stride
    kernel = Launch(
        glu_kernel,
        blocks * -(-rows // walk.span),
        device=device,
        results=[],
        scalars=[
            *(rows, width, *map(_pitch, matrices), rank_down, rank1, rank2),
            *(blocks, walk.span, splits, over_rows),
        ],
        constants={"ACT": act, "ADD": not first, "BM": walk.tiling.rows, "BN": walk.tiling.columns, "R": R},
        copies=[*_copies(*matrices), None, None, None],
        num_warps=walk.tiling.warps,
        num_stages=walk.tiling.stages,
    )
    columns = [
        _Part(over_rows, each, blocks, rows, rank1, rank1 + rank2, 1, scales[0]),
        _Part(over_rows + blocks * each, each, blocks, rows, rank2, rank1 + rank2, 1, scales[1]),
    ]
    over_all = [
        _Part(0, stride, splits, width, rank1, rank1, 1, scales[0]),
        _Part(splits * stride, stride, splits, width, rank2, rank2, 1, scales[1]),
        _Part(2 * splits * stride, stride, splits, width, rank_down, 1, width),
    ]
    return kernel, _summing(columns, R, device), _summing(over_all, R, device)


def up_workspace(rows: int, widths: Sequence[int], ranks: Sequence[int]) -> int:
    """Bytes of ``up_products``' sums over columns, for matrices [rows, widthᵢ]; 0 where a library makes them."""
    if not ranks or max(ranks) > WIDEST:
        return 0
    return 4 * max(16, 1 << (max(ranks) - 1).bit_length()) * rows * sum(-(-width // UP.columns) for width in widths)


# -- the products ------------------------------------------------------------------------------------------------------


def unsupported(x: Tensor, *ranks: int) -> str | None:
    """None where these products may be asked for, else the reason."""
    if not x.is_cuda and not is_interpreted():
        return f"{x.device} has no Triton"
    if reason := small_card(x):
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype} is neither bfloat16 nor float16"
    if not all(0 < rank <= WIDEST for rank in ranks):
        return f"a rank of {ranks} is not between 1 and {WIDEST}"
    return None


def up_products(
    dys: Sequence[Tensor], xa: Tensor, Bs: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """dxaᵢ = scaleᵢ · dyᵢ Bᵢ and dBᵢ = scaleᵢ · dyᵢᵀ xaᵢ of at most three layers, each dy read once.

    Args:
        dys: [M, Nᵢ], the gradients of the layers' outputs.
        xa: [M, ranks], the layers' xaᵢ beside each other.
        Bs: [Nᵢ, rankᵢ]; ``unsupported`` says which ranks there may be.
        scales: one for each layer.

    Returns:
        dxa: [M, ranks], as xa, and the dBᵢ: [Nᵢ, rankᵢ]; each rounded once.
    """
    first, second = _up_launches(tuple(scales), xa, *_padded(dys), *_padded(Bs))
    (partials,) = first(*_padded(dys), xa, *_padded(Bs), None, None)
    dxa, dBs = xa.new_empty(xa.shape), [B.new_empty(B.shape) for B in Bs]
    _filled(second, partials, [*dxa.split([B.shape[1] for B in Bs], 1), *dBs])
    return dxa, dBs


def down_product(
    dxa: Tensor, x: Tensor, rstd: Tensor | None = None, weight: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """dA = dxaᵀ x, or dxaᵀ (x · rstd · (weight + offset)) where a norm made the layers' input of x.

    Args:
        dxa: [M, ranks], at most 128 of them.
        x: [M, N].
        rstd: [M], float32, or None; the rounding of rstd · dxa takes the place of that of the norm.
        weight: [N] or None, which is a factor of 1, or of ``offset`` where there is an rstd.
        offset: added to the weight.

    Returns:
        [ranks, N].
    """
    first, second = _down_launches(offset, dxa, x, rstd, weight)
    (partials,) = first(x, None, None, dxa, None, None, None, rstd, weight)
    dA = x.new_empty(dxa.shape[1], x.shape[1])
    _filled(second, partials, [dA])
    return dA


def glu_products(
    dh: Tensor, gate: Tensor, up: Tensor, act: int, dxa_down: Tensor, xa: Tensor, Bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    """All of backward that reads h = act(gate) · up, its gradient, or those of gate and up.

    Args:
        dh, gate, up: [M, N], one dtype.
        act: as ``glu`` numbers activations.
        dxa_down: [M, rank], the gradient of the xa of the layer that reads h, its scale applied.
        xa: [M, ranks], of the layers that made gate and up, beside each other.
        Bs: theirs, [N, rankᵢ].
        scales: theirs.

    Returns:
        dgate and dup: [M, N]; dxa: [M, ranks]; the dBᵢ: [N, rankᵢ]; and the dA of the layer that reads h: [rank, N].
    """
    matrices = (dh, gate, up, dxa_down, xa, *Bs)
    rows = gate.shape[0]
    walk = _glu_walk(rows, matrices)
    dgate, dup, dxa = gate.new_empty(gate.shape), up.new_empty(up.shape), xa.new_empty(xa.shape)
    dBs, dA = [B.new_empty(B.shape) for B in Bs], gate.new_empty(dxa_down.shape[1], gate.shape[1])
    in_chunk = walk.over_columns(min(rows, ROWS_AT_ONCE), kinds=2)
    partials = gate.new_empty(walk.over_rows(3) + in_chunk, dtype=torch.float32)
    for start in range(0, rows, ROWS_AT_ONCE):
        *by_row, of_dxa = (
            x.narrow(0, start, min(ROWS_AT_ONCE, rows - start)) for x in (*matrices[:5], dgate, dup, dxa)
        )
        tensors = (*by_row[:5], *Bs, *by_row[5:], partials)
        kernel, over_columns, over_rows = _glu_launches(act, tuple(scales), start == 0, rows, *tensors)
        kernel(*tensors)
        _filled(over_columns, partials, of_dxa.split([B.shape[1] for B in Bs], 1))
        if start + ROWS_AT_ONCE >= rows:
            _filled(over_rows, partials, [*dBs, dA])
    return dgate, dup, dxa, dBs, dA
