"""sink_attention: one more score per head, against the softmax over keys and sink written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_skips_unneeded,
    assert_symbolic,
    opcheck,
)
from unsloth.kernels.attention import attention
from unsloth.kernels.sink_attention import sink_attention

CUDA = DEVICE == "cuda"
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[0]
SHAPES = [(2, 4, 2, 17, 16), (1, 3, 1, 33, 32)]  # batch, heads, key heads, length, width


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int, window: int | None = None) -> tuple[Any, ...]:
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE).to(dtype)

    q, k, v = (random(batch, length, count, width).transpose(1, 2) for count in (heads, kv_heads, kv_heads))
    return q, k, v, random(heads), True, 0.1, window


def eager(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """As models write it: the sink is a column of the scores that is cut off after the softmax."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    visible = visible if window is None else visible.triu(1 - window)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    column = sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    wide = torch.promote_types(torch.float32, q.dtype)
    return torch.cat([scores, column], -1).softmax(-1, dtype=wide)[..., :-1].to(q.dtype) @ v


@pytest.mark.parametrize("window", [None, 4])
def test_accuracy(window: int | None) -> None:
    def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return inputs(shape, dtype, seed, window)

    assert_accurate(sink_attention, make, eager, dtypes=[torch.bfloat16, torch.float16], shapes=SHAPES)


@pytest.mark.skipif(CUDA, reason="the CUDA libraries have no float32")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32(implementation: str, window: int | None) -> None:
    """Out and gradients in units of rounding, median over seeds; the sinks' gradients are sums that cancel."""
    forward, backward = IMPLEMENTATIONS[implementation]
    errors = []
    for seed in range(15):
        arguments = inputs(SHAPES[1], torch.float32, seed, window)
        outputs = forward(sink_attention, *arguments)
        grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(100 + seed))
        leaves = [x.double().requires_grad_() for x in arguments[:4]]
        truth = eager(*leaves, *arguments[4:])
        expected = [truth, *torch.autograd.grad(truth, leaves, grad.double())]
        ours = [outputs[0], *backward(sink_attention, arguments, outputs, [grad])]
        assert all(x is not None and x.dtype == torch.float32 for x in ours)
        errors.append([float(((x - y).norm() / y.norm()).detach()) for x, y in zip(ours, expected, strict=True)])
    medians = torch.tensor(errors).median(0).values
    assert (medians < torch.tensor([2.2, 2.2, 2.2, 2.2, 4.0]) * torch.finfo(torch.float32).eps).all(), medians


@pytest.mark.skipif(CUDA, reason="the CUDA libraries have no float64")
def test_float64_stays_float64() -> None:
    q, k, v, sinks, *others = inputs(SHAPES[1], torch.float64, 0)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    ours, theirs = sink_attention(*leaves, *others)[0], eager(*leaves, *others)
    grad = torch.randn_like(ours)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, leaves, grad)),
        (theirs, *torch.autograd.grad(theirs, leaves, grad)),
        strict=True,
    )
    for mine, yours in pairs:
        assert mine.dtype == torch.float64 and float(((mine - yours).norm() / yours.norm()).detach()) < 1e-14


def test_a_sink_without_weight_is_none() -> None:
    q, k, v, sinks, *others = inputs(SHAPES[0], HALF, 0)
    out, lse = sink_attention(q, k, v, torch.full_like(sinks, -1e4), *others)
    assert torch.equal(out, attention(q, k, v, *others)[0]) and torch.equal(lse, attention(q, k, v, *others)[1])


def test_contract() -> None:
    arguments = inputs(SHAPES[0], HALF, 0)
    opcheck(sink_attention, *arguments)
    assert_skips_unneeded(sink_attention, *arguments)
    assert_symbolic(sink_attention, *inputs((2, 4, 4, 7, 16), HALF, 0), static=(0, 1, 3))


def test_supports_says_why_not() -> None:
    q, k, v, sinks, *others = inputs(SHAPES[0], HALF, 0)
    assert sink_attention.supports(q, k, v, sinks, *others) is None
    assert sink_attention.supports(q, k, v, sinks[:3], *others) == "sinks (3,) are not one for each of 4 heads"
    assert "differ in dtype" in str(sink_attention.supports(q.double(), k, v, sinks, *others))
