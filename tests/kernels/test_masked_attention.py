"""masked_attention: a mask that is a tensor, against PyTorch's attention with that mask; with sinks, against theirs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_fresh,
    assert_skips_unneeded,
    assert_symbolic,
    opcheck,
)
from unsloth.kernels.attention import attention
from unsloth.kernels.masked_attention import masked_attention
from unsloth.kernels.sink_attention import masked_sink_attention

CUDA = DEVICE == "cuda"
HALVES = [torch.bfloat16, torch.float16]
# batch, heads, key heads, queries, keys, width, width of v; and the mask's shape, each 1 broadcast
SHAPES = [
    ((2, 4, 2, 9, 9, 16, 16), (2, 1, 9, 9)),
    ((1, 3, 1, 17, 33, 32, 16), (3, 1, 33)),
    ((2, 2, 2, 5, 7, 16, 16), (5, 7)),
]


def inputs(case: Any, dtype: torch.dtype, seed: int, boolean: bool = False) -> tuple[Any, ...]:
    (batch, heads, kv_heads, queries, keys, width, channels), shape = case
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE)

    q, k, v = (
        random(batch, length, count, size).to(dtype).transpose(1, 2)
        for length, count, size in ((queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, channels))
    )
    visible = random(*shape) > -0.5
    visible[..., 0] = True  # no row sees nothing
    return q, k, v, visible if boolean else random(*shape).masked_fill(~visible, -torch.inf).to(dtype), 0.2


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def with_a_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale + mask
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    wide = torch.promote_types(torch.float32, q.dtype)
    return torch.cat([scores, column], -1).softmax(-1, dtype=wide)[..., :-1].to(q.dtype) @ v


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_accuracy_of_what_is_added(case: Any) -> None:
    """The gradient of the mask is one of those compared."""
    assert_accurate(masked_attention, inputs, eager, dtypes=HALVES, shapes=[case])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32(implementation: str) -> None:
    """In units of rounding, median over seeds: what few operations round is too little for the bar of the others."""
    errors = []
    for seed in range(15):
        *arguments, scale = inputs(SHAPES[1], torch.float32, seed)
        outputs = IMPLEMENTATIONS[implementation][0](masked_attention, *arguments, scale)
        grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(100 + seed)).to(DEVICE)
        leaves = [x.double().requires_grad_() for x in arguments]
        truth = eager(*leaves, scale)
        expected = [truth, *torch.autograd.grad(truth, leaves, grad.double())]
        backward = IMPLEMENTATIONS[implementation][1](masked_attention, (*arguments, scale), outputs, [grad])
        ours = [outputs[0], *backward]
        assert all(x is not None and x.dtype == torch.float32 for x in ours)
        errors.append([float(((x - y).norm() / y.norm()).detach()) for x, y in zip(ours, expected, strict=True)])
    bar = 1e-3 if CUDA else 2.5 * torch.finfo(torch.float32).eps  # the CUDA kernel may multiply in tf32
    assert (torch.tensor(errors).median(0).values < bar).all(), errors


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_a_boolean_mask_is_the_one_that_adds_minus_infinity(case: Any) -> None:
    q, k, v, mask, scale = inputs(case, torch.float32, 0, boolean=True)
    added = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -torch.inf)
    grad = torch.randn(eager(q, k, v, mask, scale).shape, device=DEVICE)
    for forward, backward in IMPLEMENTATIONS.values():
        results = []
        for given in (mask, added):
            arguments = q, k, v, given, scale
            outputs = forward(masked_attention, *arguments)
            gradients = backward(masked_attention, arguments, outputs, [grad], [True, True, True, False])
            assert gradients[3] is None
            results.append([*outputs, *gradients[:3]])
        torch.testing.assert_close(*results)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k, v, mask, scale = inputs(SHAPES[0], torch.float32, 0, boolean=True)
    mask[0, 0, 2], mask[1, 0, 0] = False, False
    added = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -torch.inf)
    for given, (forward, backward) in itertools.product((mask, added), IMPLEMENTATIONS.values()):
        arguments = q, k, v, given, scale
        outputs = forward(masked_attention, *arguments)
        assert not outputs[0][0, :, 2].any() and not outputs[0][1, :, 0].any()
        grad = torch.randn_like(outputs[0])
        needs = [True, True, True, given is added]
        gradients = backward(masked_attention, arguments, outputs, [grad], needs)
        assert not gradients[0][0, :, 2].any()  # type: ignore[index]
        everything = [x for x in gradients if x is not None]
        assert all(x.isfinite().all() for x in everything)
        other = grad.clone()
        other[0, :, 2] += 1  # reaches nothing
        again = backward(masked_attention, arguments, outputs, [other], needs)
        torch.testing.assert_close([x for x in again if x is not None], everything)


def test_causal_written_out_is_causal() -> None:
    q, k, v, _, scale = inputs(SHAPES[0], torch.float32 if not CUDA else torch.bfloat16, 0)
    mask = torch.ones(9, 9, dtype=torch.bool, device=DEVICE).tril()
    for a, b in zip(masked_attention(q, k, v, mask, scale), attention(q, k, v, True, scale, None), strict=True):
        torch.testing.assert_close(a, b)
        assert_fresh([a], [q, k, v, mask])


def test_contract() -> None:
    arguments = inputs(SHAPES[0], torch.float32, 0)
    opcheck(masked_attention, *arguments)
    assert_skips_unneeded(masked_attention, *arguments)
    assert_symbolic(masked_attention, *inputs(((2, 4, 4, 7, 7, 16, 16), (7, 7)), torch.float32, 0), static=(3,))


def test_sinks_under_a_mask() -> None:
    def make(case: Any, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        q, k, v, mask, scale = inputs(case, dtype, seed)
        return q, k, v, torch.linspace(-1, 1, q.shape[1], device=DEVICE).to(dtype), mask, scale

    assert_accurate(masked_sink_attention, make, with_a_column, dtypes=HALVES, shapes=SHAPES)
    opcheck(masked_sink_attention, *make(SHAPES[0], torch.float32, 0))
    assert_skips_unneeded(masked_sink_attention, *make(SHAPES[0], torch.float32, 0))


def test_supports_says_why_not() -> None:
    q, k, v, mask, scale = inputs(SHAPES[0], torch.float32, 0)
    assert masked_attention.supports(q, k, v, mask, scale) is None
    assert masked_attention.supports(q, k, v, mask > 0, scale) is None
    for odd, reason in (
        (mask.double(), "the mask is torch.float64"),
        (mask[:, :, :3], "not known to broadcast"),
        (mask[None], "5 dimensions"),
        (mask.expand(-1, 3, -1, -1), "not known to broadcast"),
    ):
        assert reason in str(masked_attention.supports(q, k, v, odd, scale))
    assert "differ in dtype" in str(masked_attention.supports(q, k.half(), v, mask, scale))
