"""low_rank_product: both kernels against float64, whatever the sizes and layouts; one rounding; what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import DEVICE
from unsloth.kernels import low_rank_product as module
from unsloth.kernels.low_rank_product import TILINGS, Tiling, low_rank_product

HALVES = [torch.bfloat16, torch.float16]
SMALL = Tiling(64, 128, warps=4, stages=2, halves=True, flatten=False, resident=2, rate=0.5)
"""A tiling that small matrices need several of."""

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def arguments(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    transposed: bool = False,
    with_bias: bool = False,
    update: float = 1.0,
) -> Arguments:
    """a, b, p, q and a bias for (M, K, N, rank); ``update`` is the size of p q beside a b."""
    M, K, N, rank = sizes
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)

    b, q = random(K, N, scale=K**-0.5), random(rank, N, scale=update * rank**-0.5)
    if transposed:
        b, q = (x.T.contiguous().T for x in (b, q))
    return random(M, K), b, random(M, rank), q, random(N) if with_bias else None


def exact(a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None) -> Tensor:
    a, b, p, q = (x.double() for x in (a, b, p, q))
    return a @ b + p @ q + (0 if bias is None else bias.double())


def relative_error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


def assert_rounded_once(y: Tensor, args: Arguments) -> None:
    truth = exact(*args)
    assert y.shape == truth.shape and y.dtype == args[0].dtype and y.is_contiguous()
    truncated = DEVICE == "cpu" and y.dtype == torch.bfloat16  # which is how Triton's interpreter rounds
    assert relative_error(y, truth) <= (2.1 if truncated else 1.05) * relative_error(truth.to(y.dtype), truth)


def run(make: Callable[..., module.Launch], operands: module.Operands, *tiling: Tiling) -> Any:
    return make(operands, *tiling)(*operands.tensors())[0]


@pytest.fixture(params=["pointers", "descriptors"])
def product(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Each of the two kernels, by way of what prepares their operands."""
    if request.param == "pointers":
        return lambda *args: run(module._by_pointers, module._operands(*args))
    if DEVICE == "cuda" and not module._is_hopper(torch.empty(0, device=DEVICE).device):
        pytest.skip("no tensor memory accelerator")
    return lambda *args: run(module._by_descriptors, module._operands(*args), SMALL)


SIZES = [(64, 64, 128, 16), (130, 96, 264, 8), (1, 8, 8, 1), (200, 72, 136, 64), (65, 200, 8, 72)]
"""Sizes of whole tiles, and of parts of them; addressable by the accelerator."""


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_once(product: Callable[..., Tensor], dtype: torch.dtype, transposed: bool, with_bias: bool) -> None:
    for sizes in SIZES:
        args = arguments(sizes, dtype, transposed=transposed, with_bias=with_bias)
        assert_rounded_once(product(*args), args)


@pytest.mark.parametrize("sizes", [(5, 7, 3, 1), (33, 65, 17, 5), (3, 1, 1, 2)])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_sizes_that_the_accelerator_cannot_address(sizes: tuple[int, int, int, int], transposed: bool) -> None:
    args = arguments(sizes, transposed=transposed, with_bias=True)
    assert_rounded_once(low_rank_product(*args), args)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: f"{t.rows}x{t.columns}")
def test_every_tiling_gives_the_same_bits(tiling: Tiling) -> None:
    if DEVICE == "cuda" and not module._is_hopper(torch.empty(0, device=DEVICE).device):
        pytest.skip("no tensor memory accelerator")
    args = arguments((300, 136, 264, 16), with_bias=True)
    operands = module._operands(*args)
    torch.testing.assert_close(
        run(module._by_descriptors, operands, tiling), run(module._by_descriptors, operands, SMALL), rtol=0, atol=0
    )


def test_an_update_below_the_rounding_is_not_lost(product: Callable[..., Tensor]) -> None:
    """Of an update that is 1/5000 of the base product y keeps the mean: rounding noise has none."""
    args = arguments((2048, 64, 64, 8), torch.float16, update=0.0002)
    a, b, p, q = (x.double() for x in args[:4])
    base, update = a @ b, p @ q

    def share_kept(y: Tensor) -> float:
        return float(((y.double() - base) * update).sum() / update.square().sum())

    noise = float((base.half().double() - base).norm() / update.norm() / base.numel() ** 0.5)
    assert abs(share_kept(product(*args)) - 1) < 5 * noise < 0.2
    assert share_kept((args[0] @ args[1]) + (args[2] @ args[3])) < 0.8


def several(sizes: tuple[int, int, int, int], depths: tuple[int, ...], transposed: bool) -> tuple[Arguments, list[Any]]:
    """Arguments, and further pairs of other depths."""
    M, _, N, _ = sizes
    also = [arguments((M, K, N, 1), transposed=transposed)[:2] for K in depths]
    return arguments(sizes, transposed=transposed, with_bias=True), [(a + 1, b) for a, b in also]


@pytest.mark.parametrize("depths", [(64,), (24, 200)], ids=["two", "three"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_several_products_share_the_accumulator(
    product: Callable[..., Tensor], depths: tuple[int, ...], transposed: bool
) -> None:
    for sizes in (s for s in SIZES if s[0] > 1):  # few values round as chance will have it
        args, also = several(sizes, depths, transposed)
        # [a a₂ a₃] [b; b₂; b₃] is the sum of the products.
        whole = torch.cat([args[0], *(a for a, _ in also)], 1), torch.cat([args[1], *(b for _, b in also)], 0)
        assert_rounded_once(product(*args, also), (*whole, *args[2:]))


def test_a_pair_in_another_order_or_unaddressable() -> None:
    args, also = several((40, 24, 72, 8), (24, 7), transposed=False)
    also = [(also[0][0], also[0][1].T.contiguous().T), also[1]]
    whole = torch.cat([args[0], *(a for a, _ in also)], 1), torch.cat([args[1], *(b for _, b in also)], 0)
    assert_rounded_once(low_rank_product(*args, also), (*whole, *args[2:]))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "part of a wider matrix": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "shifted by one element": lambda x: torch.cat((x[:, :1], x), 1)[:, 1:],
    "one row for all": lambda x: x[:1].expand_as(x),
    "columns first": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", range(4), ids="abpq")
def test_layouts(position: int, layout: str) -> None:
    args = list(arguments((66, 72, 136, 8)))
    args[position] = LAYOUTS[layout](args[position])
    assert_rounded_once(low_rank_product(*args), tuple(args))


@pytest.mark.parametrize("sizes", [(0, 8, 8, 2), (8, 8, 0, 2)])
def test_nothing_to_compute(sizes: tuple[int, int, int, int]) -> None:
    assert low_rank_product(*arguments(sizes)).shape == (sizes[0], sizes[2])


def test_what_it_refuses() -> None:
    a, b, p, q, bias = arguments((8, 16, 24, 4), with_bias=True)
    for args, message in (
        ((a.float(), b, p, q), "float32 is not one of"),
        ((a, b.half(), p, q), "b is torch.float16"),
        ((a, b, p, q[:, :8]), r"q is \(4, 8\) where \(4, 24\) is expected"),
        ((a, b, p, q, bias[:8]), r"the bias is \(8,\) where \(24,\)"),
        ((a[:, :0], b[:0], p, q), "must not be zero"),
        ((a, b, p, q, None, [(a, b[:, :8])]), r"b2 is \(16, 8\) where \(16, 24\)"),
        ((a, b, p, q, None, [(a[:4], b)]), r"a2 is \(4, 16\)"),
        ((a, b, p, q, None, [(a, b)] * 3), "4 products at once, at most 3 are"),
    ):
        with pytest.raises(ValueError, match=message):
            low_rank_product(*args)


def test_the_estimate_prefers_tiles_that_fill_the_device() -> None:
    assert module._estimated(8192, 14336, 132).rows * module._estimated(8192, 14336, 132).columns == 128 * 256
    assert module._estimated(256, 1024, 132).rows <= 128  # 8 large tiles would leave most of it idle


HOPPERS_SHARED_MEMORY = 227 << 10
COMPILES = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from unsloth.kernels import low_rank_product as m

kernel = m._descriptor_kernel
for t in dict.fromkeys(m.TILINGS):
    for transposed, pairs in ((True, 1), (False, 1), (False, 3)):  # two pairs need less than three
        left, right = (t.rows, 64), (t.columns, 64) if transposed else (64, t.columns)
        there = ["", "2", "3"][:pairs]
        blocks = {"p": left, "q": right} | {"a" + i: left for i in there} | {"b" + i: right for i in there}
        blocks["y"] = (t.rows, t.columns // 2 if t.halves else t.columns)
        signature = {n: "constexpr" for n in kernel.arg_names}
        signature |= {n: "i32" for n in ("M", "N", "K", "K2", "K3", "rank")}
        signature |= {n: f"tensordesc<bf16[{rows}, {columns}]>" for n, (rows, columns) in blocks.items()}
        given = {n: None for i in ("2", "3") if i not in there for n in ("a" + i, "b" + i)}
        given |= {"bias": None, "TRANSPOSED": transposed, "BM": t.rows, "BN": t.columns, "BK": 64, "GROUP": m.GROUP}
        given |= {"HALVES": t.halves, "FLATTEN": t.flatten}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in given.items()})
        options = {"num_warps": t.warps, "num_stages": t.stages}
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(made.metadata.shared * t.resident, "spilled" if "st.local" in made.asm["ptx"] else "")
"""


def test_every_tiling_compiles_for_hopper_and_fits_its_shared_memory(tmp_path: Path) -> None:
    """Without such a card: Triton's compiler needs none."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = list(map(int, done.stdout.split()))  # a word besides the numbers is a spill
    assert len(shared) == 3 * len(TILINGS) and max(shared) <= HOPPERS_SHARED_MEMORY
