"""Tensors of more than 2³¹ elements: 350,000 tokens of an MLP's 14,336 channels are 5·10⁹, and a 32-bit product of row
and width wraps around.

Such tensors are made here without their memory: pages that nobody has touched are zeros that lie nowhere. The last rows
get values, the interpreter runs the last programs of a launch alone, and what they write is compared with the formula
on those rows.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from tests.kernels.oracle import DEVICE
from unsloth.kernels import thin_products
from unsloth.kernels.capped_attention import capped_attention
from unsloth.kernels.glu import swiglu
from unsloth.kernels.low_rank_product import low_rank_product
from unsloth.kernels.nf4 import nf4_dequantize
from unsloth.kernels.rms_norm import add_rms_norm, rms_norm
from unsloth.kernels.rope import rope
from unsloth.kernels.thin_products import down_product, glu_products, up_products

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter runs a few programs of a launch")

MANY = 2**31
ROWS = 8
"""Of each matrix that have values, at its end."""


@pytest.fixture(autouse=True)
def last_programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run the last programs of large launches alone; the list has the sizes of those launches."""
    from triton.runtime import interpreter

    seen: list[int] = []

    def last(*limits: int, range: type[range] = range) -> range:  # the interpreter replaces this module's own
        if len(limits) > 1 or limits[0] <= 64:
            return range(*limits)
        seen.append(limits[0])
        return range(limits[0] - ROWS, limits[0])

    monkeypatch.setattr(interpreter, "range", last, raising=False)
    # It would read and write everything once more, although host and device have one memory.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    return seen


def matrix(width: int, rows: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """[rows, width] of zeros, as many rows as pass 2³¹ elements, with values in the last ROWS."""
    x = torch.empty(rows or MANY // width + 1024, width, dtype=dtype)
    x[-ROWS:] = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x


def assert_last_rows(found: Tensor, expected: Tensor, rows: int = ROWS) -> None:
    assert found.numel() > MANY
    assert expected[-rows:].abs().max() > 0
    torch.testing.assert_close(found[-rows:].float(), expected[-rows:].float(), rtol=2e-2, atol=2e-2)


def tail(*tensors: Tensor) -> list[Tensor]:
    return [x[-ROWS:].clone() for x in tensors]


def test_norms(last_programs: list[int]) -> None:
    x, residual, dy = (matrix(128, seed=seed) for seed in range(3))
    weight = torch.rand(128, dtype=torch.bfloat16) + 0.5
    settings: tuple[Any, ...] = (1e-5, 0.0, True)
    y, rstd = rms_norm.forward(x, weight, *settings)
    expected, expected_rstd = rms_norm.reference(*tail(x), weight, *settings)
    assert_last_rows(y, expected)
    total, y, _ = add_rms_norm.forward(x, residual, weight, *settings)
    expected_total, expected, _ = add_rms_norm.reference(*tail(x, residual), weight, *settings)
    assert_last_rows(total, expected_total)
    assert_last_rows(y, expected)
    dx, _ = rms_norm.backward(dy, x, weight, rstd, *settings, [True, False])
    assert_last_rows(dx, rms_norm.reference_backward(*tail(dy, x), weight, expected_rstd, *settings, [True, False])[0])
    assert min(last_programs) > 10_000


@pytest.mark.parametrize("pitch", [0, 64])
def test_glu(pitch: int) -> None:
    """One long row where matrices are dense, and rows of their own where they are halves of a wider one."""
    gate, up, dy = (matrix(256 + pitch, MANY // 256 + 1024, seed=seed)[:, :256] for seed in range(3))
    assert_last_rows(swiglu.forward(gate, up), swiglu.reference(*tail(gate, up)))
    gradients = swiglu.backward(dy, gate, up, [True, True])
    for found, expected in zip(gradients, swiglu.reference_backward(*tail(dy, gate, up), [True, True]), strict=True):
        assert_last_rows(found, expected)


def test_rope() -> None:
    heads, width = 4, 64
    length = MANY // (heads * width) + 1024
    q, k = (matrix(heads * width, length, seed=seed).view(1, length, heads, width).transpose(1, 2) for seed in (0, 1))
    cos, sin = (matrix(width, length, seed=seed).view(1, 1, length, width) for seed in (2, 3))
    layout = (False, False, False)
    q_out, k_out = rope.forward(q, k, cos, sin, *layout)
    near = [x[:, :, -ROWS:].clone() for x in (q, k, cos, sin)]
    for found, expected in zip((q_out, k_out), rope.reference(*near, *layout), strict=True):
        assert_last_rows(found.transpose(1, 2)[0], expected.transpose(1, 2)[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_product(transposed: bool) -> None:
    a, p = matrix(512), matrix(16, MANY // 512 + 1024, seed=1)
    b, q = torch.randn(512, 512).bfloat16() / 22, torch.randn(16, 512).bfloat16()
    if transposed:
        b, q = b.t().contiguous().t(), q.t().contiguous().t()
    y = low_rank_product(a, b, p, q)
    (a, p) = tail(a, p)
    # The last programs write the last columns of the last rows.
    expected = a.float() @ b.float() + p.float() @ q.float()
    assert y.numel() > MANY
    torch.testing.assert_close(y[-ROWS:, -128:].float(), expected[:, -128:], rtol=2e-2, atol=2e-2)


def test_sums_over_rows_and_columns() -> None:
    """Few rows of very many columns: the kernels walk down all rows of a block of columns."""
    rows, width, rank = 2304, 2**20, 4
    dy = torch.empty(rows, width, dtype=torch.bfloat16)
    dy[-ROWS:, -512:] = torch.randn(ROWS, 512).bfloat16()
    xa, B = torch.randn(rows, rank).bfloat16(), torch.zeros(width, rank, dtype=torch.bfloat16)
    assert dy.numel() > MANY
    _, (dB,) = up_products([dy], xa, [B], [1.0])
    part = dy[-ROWS:, -512:].float()
    last = 128  # which the last programs write
    torch.testing.assert_close(dB[-last:].float(), (part.T @ xa[-ROWS:].float())[-last:], rtol=2e-2, atol=2e-2)
    dA = down_product(xa, dy)
    expected = (xa[-ROWS:].float().T @ part)[:, -last:]
    torch.testing.assert_close(dA[:, -last:].float(), expected, rtol=2e-2, atol=2e-2)


def test_gated_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows come a chunk at a time: what lies far is the start of a chunk, of gradients too."""
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 1)  # each of its programs takes seconds
    monkeypatch.setattr(thin_products, "ROWS_AT_ONCE", 512)
    monkeypatch.setattr(thin_products, "SUM_BLOCK", 16)  # so that sums have many programs, and run the last alone
    monkeypatch.setattr(thin_products, "SUM_AT_ONCE", 1024)
    rows, width = 1056, 2**21
    dh, gate, up = (torch.empty(rows, width, dtype=torch.bfloat16) for _ in range(3))
    for seed, x in enumerate((dh, gate, up)):
        x[-ROWS:, -128:] = torch.randn(ROWS, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert gate.numel() > MANY
    thin = [torch.zeros(rows, n, dtype=torch.bfloat16) for n in (4, 8)]
    Bs = [torch.zeros(width, 4, dtype=torch.bfloat16)] * 2
    dgate, dup, *_ = glu_products(dh, gate, up, 0, *thin, Bs, [1.0, 1.0])
    near = [x[-ROWS:, -128:].clone() for x in (dh, gate, up)]
    for found, expected in zip((dgate, dup), swiglu.reference_backward(*near, [True, True]), strict=True):
        torch.testing.assert_close(found[-ROWS:, -128:].float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_capped_attention() -> None:
    heads, width, window = 4, 64, 16
    length = MANY // (heads * width) + 1024
    shape = (1, length, heads, width)
    q, k, v = (matrix(heads * width, length, seed=seed).view(shape).transpose(1, 2) for seed in range(3))
    out, _ = capped_attention.forward(q, k, v, None, 0.125, window, 20.0)
    near = [x[:, :, -64:].clone() for x in (q, k, v)]
    expected, _ = capped_attention.reference(*near, None, 0.125, window, 20.0)
    assert_last_rows(out.transpose(1, 2)[0], expected.transpose(1, 2)[0])


def test_nf4() -> None:
    """No layer of a known model has as many weights; a packed mixture of experts has."""
    rows, columns, block = 2**17 + 64, 2**14, 64
    packed = torch.empty(rows * columns // 2, dtype=torch.uint8)
    packed[-4096:] = torch.randint(256, (4096,), dtype=torch.uint8)
    absmax = torch.ones(rows * columns // block)
    weight = nf4_dequantize.forward(packed, absmax, None, None, None, rows, columns, block, 256, torch.float32)
    expected = nf4_dequantize.reference(
        packed[-4096:].clone(), torch.ones(8192 // block), None, None, None, 1, 8192, block, 256, torch.float32
    )
    assert weight.numel() > MANY
    assert math.isclose(float(expected.abs().max()), 1.0)
    assert torch.equal(weight.view(-1)[-8192:], expected.view(-1))


def test_the_yardstick_notices() -> None:
    """A kernel that multiplies in 32 bits writes elsewhere, or dies of it."""
    import triton.language as tl

    @triton.jit
    def double(x, y, width, BLOCK: tl.constexpr):
        at = tl.program_id(0) * width + tl.arange(0, BLOCK)
        tl.store(y + at, 2 * tl.load(x + at, mask=at >= 0, other=0.0), mask=at >= 0)

    x = matrix(128)
    y = torch.empty(x.shape, dtype=x.dtype)
    double[(x.shape[0],)](x, y, 128, BLOCK=128)
    with pytest.raises(AssertionError):
        assert_last_rows(y, 2 * x)
