"""Launch and by_layout: what is remembered, what is not, and that a second launch computes from its own tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.oracle import DEVICE
from unsloth.kernels import launch as module
from unsloth.kernels.launch import Fresh, Launch, by_layout
from unsloth.kernels.low_rank_product import low_rank_product


@triton.jit
def _sum_kernel(x, other, y, n, x_stride, factor, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.load(x + lane * x_stride, mask=lane < n)
    if other is not None:
        total += tl.load(other + lane, mask=lane < n)
    tl.store(y + lane, total * factor, mask=lane < n)


@by_layout
def _sum_launch(x: Tensor, other: Tensor | None, factor: float) -> Launch:
    return Launch(
        _sum_kernel,
        1 if len(x) else 0,
        device=x.device,
        results=[Fresh.contiguous(x.shape, x.dtype)],
        scalars=(len(x), x.stride(0), factor),
        constants={"BLOCK": 64},
        copies=(None, None if other is None or other.is_contiguous() else Tensor.contiguous),
        num_warps=1,
    )


def scaled_sum(x: Tensor, other: Tensor | None, factor: float) -> Tensor:
    (y,) = _sum_launch(x, other, factor)(x, other)
    assert y is not None
    return y


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("repeat", range(3))
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_each_launch_reads_its_own_tensors(repeat: int, offset: int) -> None:
    x, other, wide = random(50)[offset:40], random(50)[offset:40], random(40 - offset, 3)
    torch.testing.assert_close(scaled_sum(x, other, 2.0), (x + other) * 2.0)
    torch.testing.assert_close(scaled_sum(x, None, 0.5), x * 0.5)
    torch.testing.assert_close(scaled_sum(wide[:, 1], wide[:, 2], 3.0), (wide[:, 1] + wide[:, 2]) * 3.0)


def test_nothing_is_launched_where_there_is_nothing_to_do() -> None:
    assert scaled_sum(random(0), None, 1.0).shape == (0,)


def test_a_layout_is_looked_at_once() -> None:
    seen: list[Any] = []

    @by_layout
    def look(x: Tensor, number: int) -> int:
        seen.append((x.shape, x.stride(), x.dtype, x.data_ptr() % 16, number))
        return len(seen)

    base = random(8, 8)
    assert [look(base, 1), look(torch.zeros_like(base), 1)] == [1, 1]
    others = [(base, 2), (base.T, 1), (base.double(), 1), (base[:4], 1), (base[:, 1:], 1), (base[:, :7], 1)]
    assert [look(x, number) for x, number in others] == [2, 3, 4, 5, 6, 7]
    assert [look(x, number) for x, number in others] == [2, 3, 4, 5, 6, 7]


def test_an_error_is_not_remembered() -> None:
    a, b = random(4, 8).bfloat16(), random(8, 4).bfloat16()
    for _ in range(2):
        with pytest.raises(ValueError, match="q is \\(3, 4\\) where \\(2, 4\\) is expected"):
            low_rank_product(a, b, random(4, 2).bfloat16(), random(3, 4).bfloat16())


def test_lengths_that_never_repeat_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LAYOUTS", 4)
    calls: list[int] = []
    look = by_layout(lambda x: calls.append(len(x)))
    for length in (1, 2, 3, 4, 4, 1, 5, 1):
        look(random(length))
    assert calls == [1, 2, 3, 4, 5, 1]


def test_a_bias_need_not_be_dense() -> None:
    a, b, p, q = (random(*shape).bfloat16() for shape in ((16, 64), (64, 32), (16, 8), (8, 32)))
    bias = random(32, 2).bfloat16()[:, 1]
    expected = a.double() @ b.double() + p.double() @ q.double() + bias.double()
    torch.testing.assert_close(low_rank_product(a, b, p, q, bias).double(), expected, rtol=1e-2, atol=5e-2)
