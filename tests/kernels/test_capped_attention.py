"""capped_attention: scores capped by tanh, against the formula as Gemma 2 writes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_compiles,
    assert_skips_unneeded,
    assert_symbolic,
    opcheck,
)
from unsloth.kernels.capped_attention import capped_attention, document_starts

# batch, heads, key heads, length, width, width of v
SHAPES = [(1, 4, 2, 70, 24, 24), (2, 2, 2, 33, 16, 8)]
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter truncates bfloat16
CAP = 2.0  # of scores around ±1: much is capped, little is flat


def documents(batch: int, length: int) -> Tensor:
    """Rows of documents of some lengths."""
    begins = torch.zeros(batch, length, dtype=torch.int64, device=DEVICE)
    for row in range(batch):
        begins[row, [3 + row, 4 + row, length // 2]] = 1
    return begins.cumsum(1)


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, window: int | None = None, packed: bool = False
) -> tuple[Any, ...]:
    batch, heads, kv_heads, length, width, channels = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    q, k, v = (
        torch.randn(batch, length, count, size, generator=generator, device=DEVICE).to(dtype).transpose(1, 2)
        for count, size in ((heads, width), (kv_heads, width), (kv_heads, channels))
    )
    return q, k, v, document_starts(documents(batch, length)) if packed else None, 0.3, window, CAP


def eager(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float, window: int | None, cap: float
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.tanh(q @ k.transpose(-1, -2) * scale / cap) * cap
    index = torch.arange(q.shape[2], device=q.device)
    back = index[:, None] - index
    visible = (back >= 0) & (back < (window or q.shape[2]))
    visible = visible if starts is None else visible & (index >= starts[:, None, :, None])
    wide = torch.promote_types(torch.float32, q.dtype)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=wide).to(q.dtype) @ v


@pytest.mark.parametrize(("window", "packed"), [(None, False), (5, False), (None, True), (5, True)])
def test_accuracy(window: int | None, packed: bool) -> None:
    def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return inputs(shape, dtype, seed, window, packed)

    assert_accurate(capped_attention, make, eager, dtypes=HALVES, shapes=SHAPES, seeds=[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32(implementation: str) -> None:
    *arguments, starts, scale, window, cap = inputs(SHAPES[0], torch.float32, 0, 40, True)
    everything = *arguments, starts, scale, window, cap
    outputs = IMPLEMENTATIONS[implementation][0](capped_attention, *everything)
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaves = [x.double().requires_grad_() for x in arguments]
    truth = eager(*leaves, starts, scale, window, cap)
    expected = [truth, *torch.autograd.grad(truth, leaves, grad.double())]
    ours = [outputs[0], *IMPLEMENTATIONS[implementation][1](capped_attention, everything, outputs, [grad])]
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine is not None and mine.dtype == torch.float32
        assert float(((mine - theirs).norm() / theirs.norm()).detach()) < 4 * torch.finfo(torch.float32).eps


def test_bfloat16_of_the_interpreter_is_near() -> None:
    arguments = inputs(SHAPES[0], torch.bfloat16, 0)
    results = []
    for forward, backward in IMPLEMENTATIONS.values():
        outputs = forward(capped_attention, *arguments)
        results.append([*outputs, *backward(capped_attention, arguments, outputs, [torch.ones_like(outputs[0])])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and float((a - b).float().norm() / b.float().norm()) < 3e-2


def test_scores_far_below_and_above_the_cap() -> None:
    """Of scores that are all capped at -50 the softmax is even; e^-100 would be nothing in float32."""
    q = torch.full((1, 1, 20, 16), 30.0, device=DEVICE)
    v = torch.randn(1, 1, 20, 16, device=DEVICE)
    for forward, _ in IMPLEMENTATIONS.values():
        out, lse = forward(capped_attention, q, -q, v, None, 1.0, None, 50.0)
        torch.testing.assert_close(out, v.cumsum(2) / torch.arange(1, 21, device=DEVICE)[:, None])
        torch.testing.assert_close(lse[0, 0], torch.arange(1, 21, device=DEVICE).log() - 50)


def test_where_documents_start() -> None:
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5]], device=DEVICE)
    starts = document_starts(numbers)
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6] and starts.dtype == torch.int32
    torch.library.opcheck(document_starts.overload, (numbers,))
    assert "[batch, length]" in str(document_starts.supports(numbers[0]))


def test_documents_do_not_see_each_other() -> None:
    """Other tokens in the first document change not a bit of what comes after it."""
    q, k, v, starts, *others = inputs((1, 2, 1, 40, 16, 16), torch.float32, 0, packed=True)
    assert starts[0, 20] == 20
    for forward, backward in IMPLEMENTATIONS.values():
        results = []
        for factor in (1.0, 3.0):
            changed = [torch.cat([x[:, :, :20] * factor, x[:, :, 20:]], 2) for x in (q, k, v)]
            arguments = *changed, starts, *others
            outputs = forward(capped_attention, *arguments)
            gradients = backward(capped_attention, arguments, outputs, [torch.ones_like(outputs[0])])
            results.append([x[:, :, 20:] for x in (outputs[0], *gradients) if x is not None])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_contract() -> None:
    arguments = inputs(SHAPES[1], torch.float32, 0)
    opcheck(capped_attention, *arguments)
    assert_skips_unneeded(capped_attention, *arguments)
    assert_symbolic(capped_attention, *inputs((2, 4, 4, 7, 16, 16), torch.float32, 0), static=(1, 3))


def test_supports_says_why_not() -> None:
    q, k, v, starts, *others = inputs(SHAPES[0], torch.float32, 0, packed=True)
    assert capped_attention.supports(q, k, v, starts, *others) is None
    for arguments, reason in (
        ((q, k.half(), v, starts, *others), "differ in dtype"),
        ((q, k, v, starts, 0.3, None, -1.0), "have to be positive"),
        ((q[:, :, :5], k, v, None, *others), "align the diagonal differently"),
        ((q, k, v, starts.expand(3, -1), *others), "are not those of 1 rows"),
        ((q.repeat(1, 1, 1, 20), k.repeat(1, 1, 1, 20), v, None, *others), "480 and 24 wide"),
    ):
        assert reason in str(capped_attention.supports(*arguments))


def test_compiles_for_hopper() -> None:
    """Both widths of Gemma 2's heads, within the shared memory of a small card."""
    assert_compiles(
        """
from unsloth.kernels.capped_attention import capped_attention
limit = 101376
checked = run
def run(self, *args, **kwargs):
    kernel = checked(self, *args, **kwargs)
    assert kernel.metadata.shared <= limit, (self.__name__, kernel.metadata.shared)
    return kernel
for width in (128, 256):
    q, k = torch.empty(1, 2, 64, width, dtype=torch.bfloat16), torch.empty(1, 1, 64, width, dtype=torch.bfloat16)
    starts, lse = torch.empty(1, 64, dtype=torch.int32), torch.empty(1, 2, 64)
    capped_attention.forward(q, k, k, starts, 0.1, 30, 50.0)
    capped_attention.backward(q, q, k, k, starts, q, lse, 0.1, 30, 50.0, [True] * 3)
"""
    )
