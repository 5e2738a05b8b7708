"""packed_attention: documents one behind the other, against one dense attention with the mask written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.oracle import (
    DEVICE,
    assert_accurate,
    assert_skips_unneeded,
    opcheck,
    symbolic,
)
from unsloth.kernels.packed_attention import cu_seqlens, extents, packed_attention
from unsloth.kernels.sink_attention import packed_sink_attention

CUDA = DEVICE == "cuda"
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[0]
LENGTHS = [[3, 1, 5], [9]], [[16, 17]], [[1, 1, 30]]  # of the documents of each row


def numbers(rows: list[list[int]]) -> Tensor:
    """[batch, length]: which document of its row a token is of."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows]).to(DEVICE)


def inputs(
    rows: list[list[int]],
    dtype: torch.dtype,
    seed: int,
    *,
    causal: bool = True,
    window: int | None = None,
    channels: int = 16,
) -> tuple[Any, ...]:
    documents = numbers(rows)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    q, k, v = (
        torch.randn(*documents.shape, count, width, generator=generator, device=DEVICE).to(dtype).transpose(1, 2)
        for count, width in ((4, 16), (2, 16), (2, channels))
    )
    offsets = cu_seqlens(documents)
    return q, k, v, offsets, extents(offsets), causal, 0.2, window


def visible(cu_seqlens: Tensor, batch: int, length: int, causal: bool, window: int | None) -> Tensor:
    """[batch, 1, length, length], token by token."""
    bounds = cu_seqlens.tolist()
    documents = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for start, stop in documents:
        row, first = divmod(start, length)
        for i in range(first, first + stop - start):
            last = i + 1 if causal else first + stop - start
            mask[row, 0, i, max(first, 0 if window is None else i + 1 - window) : last] = True
    return mask.to(DEVICE)


def eager(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, extents: Tensor, causal: bool, scale: float, window: int | None
) -> Tensor:
    mask = visible(cu_seqlens, q.shape[0], q.shape[2], causal, window)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def test_where_the_documents_are() -> None:
    offsets = cu_seqlens(numbers([[3, 1, 5], [9]]))
    assert offsets.tolist() == [0, 3, 4, 9, *[18] * 15] and offsets.dtype == torch.int32
    assert extents(offsets).tolist() == [4, 9] and extents(offsets).device.type == "cpu"
    alike = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)  # a row ends what is in it
    assert cu_seqlens(alike).tolist() == [0, 4, *[8] * 7]
    torch.library.opcheck(cu_seqlens.overload, (numbers([[3, 1, 5], [9]]),))
    torch.library.opcheck(extents.overload, (offsets,))
    with symbolic(numbers([[2, 5], [7, 0]]), static=()) as (documents,):
        assert isinstance(cu_seqlens(documents).shape[0], torch.SymInt) and extents(cu_seqlens(documents)).shape == (2,)


@pytest.mark.parametrize(
    ("causal", "window", "channels"), [(True, None, 16), (False, None, 16), (True, 3, 16), (True, None, 8)]
)
def test_accuracy(causal: bool, window: int | None, channels: int) -> None:
    def make(rows: list[list[int]], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return inputs(rows, dtype, seed, causal=causal, window=window, channels=channels)

    assert_accurate(packed_attention, make, eager, dtypes=DTYPES, shapes=LENGTHS)


@pytest.mark.skipif(CUDA, reason="the CUDA libraries have no float64")
def test_float64_stays_float64() -> None:
    q, k, v, *others = inputs(LENGTHS[0], torch.float64, 0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours, theirs = packed_attention(*leaves, *others)[0], eager(*leaves, *others)
    grad = torch.randn_like(ours)
    mine, yours = (torch.autograd.grad(x, leaves, grad) for x in (ours, theirs))
    for a, b in zip((ours, *mine), (theirs, *yours), strict=True):
        assert a.dtype == torch.float64 and float((a - b).norm() / b.norm()) < 1e-14


def test_documents_do_not_see_each_other() -> None:
    """Other tokens in one document change nothing, bit by bit, in the results and gradients of the others."""
    q, k, v, *others = inputs([[3, 1, 5]], HALF, 0)
    grad = torch.randn_like(q)

    def step(x: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(), k.detach().clone().requires_grad_(), (v * x.mean()).detach()]
        leaves = [
            torch.cat([leaf[..., :3, :], old[..., 3:, :]], 2).detach().requires_grad_()
            for leaf, old in zip(leaves, (q, k, v), strict=True)
        ]
        out = packed_attention(*leaves, *others)[0]
        return [t[..., 3:, :] for t in (out, *torch.autograd.grad(out, leaves, grad))]

    for before, after in zip(step(q), step(q + 1), strict=True):
        assert torch.equal(before, after)


def test_contract() -> None:
    arguments = inputs(LENGTHS[0], HALF, 0)
    opcheck(packed_attention, *arguments)
    assert_skips_unneeded(packed_attention, *arguments)


def test_supports_says_why_not() -> None:
    q, k, v, offsets, extent, *others = inputs(LENGTHS[0], HALF, 0)
    assert packed_attention.supports(q, k, v, offsets, extent, *others) is None
    assert "not those of 2 rows of 9" in str(packed_attention.supports(q, k, v, offsets[1:], extent, *others))
    assert "no kernel" in str(packed_attention.supports(q, k, v, offsets, extent, False, 0.2, 3))
    assert "[batch, length]" in str(cu_seqlens.supports(offsets))


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_in_documents(window: int | None) -> None:
    """Each document's queries share the sinks of their heads, and nothing else."""

    def make(rows: list[list[int]], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        q, k, v, *others = inputs(rows, dtype, seed, window=window)
        return q, k, v, torch.linspace(-1, 1, 4, device=DEVICE).to(dtype), *others

    def with_a_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, offsets: Tensor, _: Any, *how: Any) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        mask = visible(offsets, q.shape[0], q.shape[2], how[0], how[2])
        scores = (q @ k.transpose(-1, -2) * how[1]).masked_fill(~mask, -torch.inf)
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1, dtype=torch.promote_types(torch.float32, q.dtype))[..., :-1].to(q.dtype) @ v

    halves = [torch.bfloat16, torch.float16]
    assert_accurate(packed_sink_attention, make, with_a_column, dtypes=halves, shapes=LENGTHS)
    opcheck(packed_sink_attention, *make(LENGTHS[0], HALF, 0))
