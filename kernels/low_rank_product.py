"""Matrix products and a low-rank update in one accumulator: y = a b [+ a₂ b₂ + a₃ b₃] + p q + bias, rounded once.

a: [M, K]; b: [K, N]; p: [M, rank]; q: [rank, N]; bias: [N] or None; all bfloat16 or all float16; y: [M, N]. This is a
LoRA layer (Hu et al. 2021, arXiv:2106.09685) with the scale folded into p: forward a = x, b = Wᵀ, p = scale · x Aᵀ,
q = Bᵀ; the gradient of x has a = dy, b = W, p = scale · dy B, q = A. Where layers share x, as queries, keys and values
do, its gradient is a sum over them, and their products share the accumulator too. A library's product rounds a b before
it adds what another product made, and so loses updates below half a unit in the last place, as eager PEFT does.

The update needs no product of its own, because a b + p q = [a p] [b; q]: the loop over K runs on into p and q. The two
concatenations are never made, a step only picks which matrices it reads from (a₂ and b₂ likewise). On Hopper a step is
a pair of copies by the tensor memory accelerator, which fills with zeros what lies outside a matrix, so rank, K, M and
N need fit no tile, and the choice is one select of a descriptor's address.

Cost: 2 M N (K + rank rounded up to 64) operations, that is 1.6% above the plain product for K = 4096 and a rank up to
64, and no traffic besides p and q. With a library the small product is written and read again: 0.27 GB or 0.09 ms for
4096 x 4096 x 14336 on an H100 (2.97 TB/s), beside 0.67 ms for the product. Expected on Hopper, where the operands of
the next tile are under way while a tile is written: at least 97% of cuBLAS's plain product.

Elsewhere, and for matrices that the accelerator cannot address, pointers do the same arithmetic, more slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Fresh, Launch, Tile, address, by_layout
from .low_rank_product_triton import _descriptor_kernel, _pointer_kernel
from .reasons import dtype_is

BLOCK_K = 64
"""128 bytes, the widest row that the accelerator swizzles: four tensor-core instructions deep."""
GROUP = 8
"""Rows of tiles that are walked together."""


class Tiling(NamedTuple):
    """How the descriptor kernel cuts y. Shared memory and registers are those of sm_90, without spills."""

    rows: int
    columns: int
    warps: int
    stages: int
    """Steps of operands in shared memory: one is being multiplied, the others are on their way."""
    halves: bool
    """Whether a tile is stored in two halves, which leaves shared memory for another stage."""
    flatten: bool
    """Whether the operands of the next tile are fetched while a tile is stored."""
    resident: int
    """Programs that a multiprocessor holds at a time."""
    rate: float
    """Speed relative to the best where the tiles fill the device evenly, estimated from the instructions' operand
    traffic. All tilings add in the same order, so the choice changes no bit of the result."""


# Two warpgroups share 128 x 256, the largest instruction (m64n256k16) twice: 128 accumulators a thread, 160 registers.
TILINGS = (
    Tiling(128, 256, warps=8, stages=3, halves=False, flatten=True, resident=1, rate=1.0),  # 208 KiB
    Tiling(128, 256, warps=8, stages=4, halves=True, flatten=True, resident=1, rate=0.99),  # 224 KiB
    Tiling(128, 256, warps=8, stages=3, halves=False, flatten=False, resident=1, rate=0.97),
    Tiling(256, 128, warps=8, stages=3, halves=False, flatten=True, resident=1, rate=0.97),
    Tiling(128, 128, warps=4, stages=3, halves=True, flatten=True, resident=2, rate=0.9),  # 112 KiB
    Tiling(128, 128, warps=4, stages=3, halves=True, flatten=False, resident=2, rate=0.9),
    Tiling(64, 128, warps=4, stages=4, halves=False, flatten=True, resident=2, rate=0.75),  # 112 KiB
)

POINTER_TILE = {"BM": 128, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 4}
"""64 KiB of shared memory: for every device."""


# -- launch ------------------------------------------------------------------------------------------------------------


Pair = tuple[Tensor, Tensor]
Copies = Sequence[Callable[[Tensor], Tensor] | None]
MOST_PAIRS = 3


class Operands(NamedTuple):
    """The matrices as they lie in memory, rows of neighbours; b, b₂, b₃ and q are their transposes where transposed."""

    pairs: tuple[Pair, ...]
    """a and b, a₂ and b₂, a₃ and b₃; at most MOST_PAIRS."""
    p: Tensor
    q: Tensor
    bias: Tensor | None
    transposed: bool

    def sizes(self) -> tuple[int, int, tuple[int, ...], int]:
        """M, N, each pair's K, and rank."""
        (a, b), *_ = self.pairs
        return (
            a.shape[0],
            b.shape[0 if self.transposed else 1],
            tuple(a.shape[1] for a, _ in self.pairs),
            self.p.shape[1],
        )

    def tensors(self) -> list[Tensor | None]:
        """a, b, a₂, b₂, a₃, b₃, p, q, bias; None for what is not there."""
        absent = [None, None] * (MOST_PAIRS - len(self.pairs))
        return [*(x for pair in self.pairs for x in pair), *absent, self.p, self.q, self.bias]

    def result(self) -> Fresh:
        M, N, _, _ = self.sizes()
        return Fresh.contiguous((M, N), self.p.dtype)

    def numbers(self) -> list[int]:
        """M, N, K, K₂, K₃, rank; 0 for a pair that is not there."""
        M, N, depths, rank = self.sizes()
        return [M, N, *depths, *[0] * (MOST_PAIRS - len(depths)), rank]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes microseconds


def _operands(a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None, also: Sequence[Pair] = ()) -> Operands:
    transposed = b.stride(0) == 1 and b.stride(1) != 1
    right = [b, *(b for _, b in also), q]
    if transposed:
        right = [x.t() for x in right]
    left = [a, *(a for a, _ in also)]
    pairs = tuple((_rows(x), _rows(w)) for x, w in zip(left, right, strict=False))
    # Only p and q are worth a copy to make them addressable: they are small, and all ranks then run one kernel.
    dense = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    return Operands(pairs, _aligned_rows(p), _aligned_rows(right[-1]), dense, transposed)


def _rows(x: Tensor) -> Tensor:
    """x with neighbours along the last dimension and no row on top of another (expanded gradients have them so)."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _addressable(x: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes: the accelerator's rule, and that of the widest loads."""
    return address(x) % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _aligned_rows(x: Tensor) -> Tensor:
    x = _rows(x)
    return x if _addressable(x) else F.pad(x, (0, -x.shape[1] % 8)).narrow(1, 0, x.shape[1])


def _by_descriptors(operands: Operands, tiling: Tiling, copies: Copies = ()) -> Launch:
    """The product by the tensor memory accelerator. K and rank are not zero."""
    numbers, y = operands.numbers(), operands.result()
    bm, bn = tiling.rows, tiling.columns
    blocks = (bm, BLOCK_K), (bn, BLOCK_K) if operands.transposed else (BLOCK_K, bn)
    *matrices, _ = operands.tensors()
    tiles = [
        None if x is None else Tile(tuple(x.shape), x.stride(), blocks[i % 2]) for i, x in enumerate(matrices)
    ]  # fmt: skip
    count = _ceil(numbers[0], bm) * _ceil(numbers[1], bn)
    return Launch(
        _descriptor_kernel,
        min(count, tiling.resident * _multiprocessors(operands.p.device)),
        device=operands.p.device,
        results=[y],
        scalars=numbers,
        constants={
            "TRANSPOSED": operands.transposed,
            "BM": bm,
            "BN": bn,
            "BK": BLOCK_K,
            "GROUP": GROUP,
            "HALVES": tiling.halves,
            "FLATTEN": tiling.flatten,
        },
        copies=copies,
        tiles=[*tiles, None, Tile(y.shape, y.stride, (bm, bn // 2 if tiling.halves else bn))],
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def _by_pointers(operands: Operands, copies: Copies = ()) -> Launch:
    """The product on any device. K and rank are not zero."""
    numbers, tile = operands.numbers(), POINTER_TILE
    *matrices, _ = operands.tensors()
    return Launch(
        _pointer_kernel,
        _ceil(numbers[0], tile["BM"]) * _ceil(numbers[1], tile["BN"]),
        device=operands.p.device,
        results=[operands.result()],
        scalars=[*numbers, *(0 if x is None else x.stride(0) for x in matrices)],
        constants={
            "TRANSPOSED": operands.transposed,
            "BM": tile["BM"],
            "BN": tile["BN"],
            "BK": tile["BK"],
            "GROUP": GROUP,
        },
        copies=copies,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; two of the interpreter's, so that each goes through several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


# -- choice of a tiling ------------------------------------------------------------------------------------------------


@functools.cache
def _estimated(M: int, N: int, multiprocessors: int) -> Tiling:
    """The tiling whose busiest multiprocessor is done first; of equals the first."""

    def cost(tiling: Tiling) -> float:
        tiles = _ceil(M, tiling.rows) * _ceil(N, tiling.columns)
        return _ceil(tiles, multiprocessors) * tiling.rows * tiling.columns / tiling.rate

    return min(TILINGS, key=cost)


# -- the product -------------------------------------------------------------------------------------------------------


def unsupported(
    a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None = None, also: Sequence[Pair] = ()
) -> str | None:
    """None when ``low_rank_product`` takes these arguments, else the reason."""
    if reason := dtype_is(a, torch.bfloat16, torch.float16):
        return reason
    if len(also) >= MOST_PAIRS:
        return f"{1 + len(also)} products at once, at most {MOST_PAIRS} are"
    (M, K), N, rank = a.shape, b.shape[1], p.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "b": (b, (K, N)),
        "p": (p, (M, rank)),
        "q": (q, (rank, N)),
        "the bias": (bias, (N,)),
    }
    for i, (a_, b_) in enumerate(also, 2):
        expected |= {f"a{i}": (a_, (M, a_.shape[1])), f"b{i}": (b_, (a_.shape[1], N))}
    for name, (x, _) in expected.items():
        if x is not None and (x.dtype != a.dtype or x.device != a.device):
            return f"{name} is {x.dtype} on {x.device} and a is {a.dtype} on {a.device}"
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            return f"{name} is {tuple(x.shape)} where {shape} is expected"
    if rank == 0 or any(a_.shape[1] == 0 for a_ in (a, *(a_ for a_, _ in also))):
        return "K and the rank must not be zero"
    return None


def low_rank_product(
    a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None = None, also: Sequence[Pair] = ()
) -> Tensor:
    """a b + p q + bias with one float32 accumulator and one rounding; a fresh, contiguous tensor. No autograd.

    Args:
        a: [M, K], bfloat16 or float16 like all others. Fast when its rows lie in memory as such, at any pitch.
        b: [K, N], or the transpose of an [N, K] matrix; other layouts of a and b are copied.
        p: [M, rank], with any scale folded in.
        q: [rank, N]. Best in the order of b; p and q are copied where their rows do not start at multiples of 16 bytes.
        bias: [N] or None.
        also: up to two more pairs, [M, Kᵢ] and [Kᵢ, N], whose products are added. Best in the order of b.

    Raises:
        ValueError: for other dtypes, and where shapes do not fit (``unsupported`` says so beforehand).
    """
    others = [x for pair in also for x in pair]
    launch = _launch(a, b, p, q, bias, *others)
    absent = [None] * (2 * MOST_PAIRS - 2 - len(others))
    y = launch(a, b, *others, *absent, p, q, bias)[0]
    assert y is not None
    return y


@by_layout
def _launch(a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None, *others: Tensor) -> Launch:
    """For the matrices in the order of the kernel."""
    also = list(zip(others[::2], others[1::2], strict=True))
    if reason := unsupported(a, b, p, q, bias, also):
        raise ValueError(f"low_rank_product: {reason}")
    operands = _operands(a, b, p, q, bias, also)
    M, N, _, _ = operands.sizes()
    given = Operands(((a, b), *also), p, q, bias, operands.transposed).tensors()
    copies = [
        None if x is None or y is None or x.data_ptr() == y.data_ptr() else _copier(i, operands.transposed)
        for i, (x, y) in enumerate(zip(given, operands.tensors(), strict=True))
    ]
    if (
        _is_hopper(a.device)
        and all(_addressable(x) for pair in operands.pairs for x in pair)
        and N * a.element_size() % 16 == 0
    ):
        return _by_descriptors(operands, _estimated(M, N, _multiprocessors(a.device)), copies)
    return _by_pointers(operands, copies)


def _copier(index: int, transposed: bool) -> Callable[[Tensor], Tensor]:
    """What makes an operand of the argument at that place, as ``_operands`` does."""
    if index == 2 * MOST_PAIRS + 2:
        return Tensor.contiguous  # the bias
    rows = _aligned_rows if index >= 2 * MOST_PAIRS else _rows
    return (lambda x: rows(x.t())) if transposed and index % 2 else rows
