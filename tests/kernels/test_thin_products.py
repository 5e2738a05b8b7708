"""Products with thin matrices: against float64 at odd shapes, in any layout, the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from tests.kernels.oracle import DEVICE, assert_compiles
from unsloth.kernels import reasons
from unsloth.kernels import thin_products as module
from unsloth.kernels.glu import GELU, GELU_TANH, SILU
from unsloth.kernels.thin_products import down_product, glu_products, unsupported, up_products

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SHAPES = [
    pytest.param(37, (300, 64, 17), (3, 8, 16), id="three layers, odd widths"),
    pytest.param(70, (513,), (16,), id="several blocks"),
    pytest.param(33, (40, 24), (32, 8), id="rank 32"),
    pytest.param(1, (1, 5), (1, 1), id="one token"),
]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def assert_near(value: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Within two units in the last place of the largest value: the interpreter truncates what it stores."""
    assert value.dtype == dtype and value.shape == truth.shape
    assert (value.double() - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max()


def layers(rows: int, widths: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> Any:
    """dys, xa, Bs."""
    dys = [random(rows, width, dtype=dtype, seed=i) for i, width in enumerate(widths)]
    Bs = [
        random(width, rank, dtype=dtype, seed=9 + i) for i, (width, rank) in enumerate(zip(widths, ranks, strict=True))
    ]
    return dys, random(rows, sum(ranks), dtype=dtype, seed=20), Bs


@each_dtype
@pytest.mark.parametrize(("rows", "widths", "ranks"), SHAPES)
def test_up(rows: int, widths: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    dys, xa, Bs = layers(rows, widths, ranks, dtype)
    scales = [2.0, 0.5, 3.0][: len(widths)]
    dxa, dBs = up_products(dys, xa, Bs, scales)
    assert dxa.is_contiguous()
    for dy, B, own, of_x, dB, s in zip(dys, Bs, xa.split(ranks, 1), dxa.split(ranks, 1), dBs, scales, strict=True):
        assert_near(of_x, s * dy.double() @ B.double(), dtype)
        assert_near(dB, s * dy.double().T @ own.double(), dtype)


@each_dtype
@pytest.mark.parametrize(("rows", "width", "rank"), [(37, 300, 3), (70, 513, 48), (33, 40, 100), (1, 1, 1)])
def test_down(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    dxa, x = random(rows, rank, dtype=dtype, seed=0), random(rows, width, dtype=dtype, seed=1)
    assert_near(down_product(dxa, x), dxa.double().T @ x.double(), dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_weight", [True, False])
def test_down_of_what_was_normalised(offset: float, with_weight: bool) -> None:
    dtype = torch.bfloat16
    dxa, x = random(37, 8, dtype=dtype, seed=0), random(37, 70, dtype=dtype, seed=1)
    rstd = random(37, dtype=torch.float32, seed=2).abs()
    weight = random(70, dtype=torch.float32, seed=3) if with_weight else None
    factor = torch.tensor(offset, dtype=torch.float64) if weight is None else weight.double() + offset
    # rstd · dxa is rounded where the norm would have been.
    rounded = (dxa.float() * rstd[:, None]).to(dtype)
    assert_near(down_product(dxa, x, rstd, weight, offset), rounded.double().T @ (x.double() * factor), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize(
    ("act", "formula"),
    [
        pytest.param(SILU.value, F.silu, id="silu"),
        pytest.param(GELU.value, F.gelu, id="gelu"),
        pytest.param(GELU_TANH.value, lambda x: F.gelu(x, approximate="tanh"), id="gelu-tanh"),
    ],
)
@pytest.mark.parametrize(("rows", "width", "ranks"), [(37, 140, (3, 8, 16)), (70, 17, (4, 32, 1))])
def test_glu(act: int, formula: Any, rows: int, width: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> None:
    dh, gate, up = (random(rows, width, dtype=dtype, seed=i) for i in range(3))
    rank_down, *others = ranks
    thin_down, xa = random(rows, rank_down, dtype=dtype, seed=4), random(rows, sum(others), dtype=dtype, seed=5)
    Bs, scales = [random(width, rank, dtype=dtype, seed=6 + rank) for rank in others], [2.0, 0.5]
    dgate, dup, dxa, dBs, dA = glu_products(dh, gate, up, act, thin_down, xa, Bs, scales)

    leaves = [x.double().requires_grad_() for x in (gate, up)]
    h = formula(leaves[0]) * leaves[1]
    truth = torch.autograd.grad(h, leaves, dh.double())
    for value, expected in zip((dgate, dup), truth, strict=True):
        assert_near(value, expected, dtype)
    assert_near(dA, thin_down.double().T @ h.detach().to(dtype).double(), dtype)
    for dy, B, own, of_x, dB, s in zip(
        (dgate, dup), Bs, xa.split(others, 1), dxa.split(others, 1), dBs, scales, strict=True
    ):
        assert_near(of_x, s * dy.double() @ B.double(), dtype)
        assert_near(dB, s * dy.double().T @ own.double(), dtype)


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    args = [random(70, 40, dtype=dtype, seed=i) for i in range(3)]
    thin = random(70, 4, dtype=dtype, seed=4), random(70, 5, dtype=dtype, seed=5)
    Bs = [random(40, rank, dtype=dtype, seed=6 + rank) for rank in (2, 3)]
    whole = glu_products(*args, SILU.value, *thin, Bs, [1.0, 2.0])
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 32)  # two whole chunks and a part
    monkeypatch.setattr(module, "_glu_launches", module._glu_launches.__wrapped__)  # remembers nothing of the whole
    chunks = glu_products(*args, SILU.value, *thin, Bs, [1.0, 2.0])
    for one, other in zip((*whole[:3], *whole[3], whole[4]), (*chunks[:3], *chunks[3], chunks[4]), strict=True):
        assert_near(other, one.double(), dtype)


def test_layouts() -> None:
    """Columns of a wider matrix are read where they lie; what does not lie in rows is copied."""
    dtype = torch.bfloat16
    wide = random(37, 200, dtype=dtype, seed=0)
    transposed = random(80, 37, dtype=dtype, seed=1).T
    repeated = random(1, 80, dtype=dtype, seed=2).expand(37, 80)
    xa, B = random(37, 30, dtype=dtype, seed=3)[:, 7:15], random(80, 16, dtype=dtype, seed=4)[:, ::2]
    for dy in (wide[:, 3:83], transposed, repeated):
        dxa, (dB,) = up_products([dy], xa, [B], [1.0])
        assert_near(dxa, dy.double() @ B.double(), dtype)
        assert_near(dB, dy.double().T @ xa.double(), dtype)
        assert_near(down_product(xa, dy), xa.double().T @ dy.double(), dtype)


def test_same_bits_every_time() -> None:
    dys, xa, Bs = layers(70, (300, 64), (8, 8), torch.bfloat16)
    first, second = (up_products(dys, xa, Bs, [1.0, 1.0]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_walk_covers_every_row_and_column() -> None:
    for rows, width in ((1, 1), (4096, 14336), (4097, 4096), (100_000, 17)):
        walk = module._walk(module.UP, rows, [width], [16], torch.device("cpu"))
        assert walk.blocks[0] * walk.tiling.columns >= width > (walk.blocks[0] - 1) * walk.tiling.columns
        assert walk.splits * walk.span >= rows > (walk.splits - 1) * walk.span
        assert walk.span % walk.tiling.rows == 0


def test_unsupported_says_why() -> None:
    x = random(4, 8, dtype=torch.bfloat16, seed=0)
    assert unsupported(x, 16, 32) is None
    assert unsupported(x, 33) == "a rank of (33,) is not between 1 and 32"
    assert unsupported(x.float(), 8) == "torch.float32 is neither bfloat16 nor float16"


def test_a_device_with_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "_capability", lambda device: (7, 5))
    with FakeTensorMode():
        x = torch.empty(4, 8, dtype=torch.float16, device="cuda")
        assert unsupported(x, 8) == "sm_75 has too little shared memory"


def test_kernels_compile() -> None:
    assert_compiles("""
import unsloth.kernels.thin_products as module
module._multiprocessors = lambda device: 132
b = lambda *s: torch.zeros(s, dtype=torch.bfloat16)
for rank, width, act in ((16, 4096, 0), (8, 300, 1)):
    module.up_products([b(64, width)] * 3, b(64, 3 * rank), [b(width, rank)] * 3, [1.0] * 3)
    module.down_product(b(64, rank), b(64, width), torch.zeros(64), b(width), 1.0)
    wide, Bs = [b(64, width)] * 3, [b(width, rank)] * 2
    module.glu_products(*wide, act, b(64, rank), b(64, 2 * rank), Bs, [1.0] * 2)
""")
