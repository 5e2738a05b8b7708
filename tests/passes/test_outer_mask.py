"""Masks that are outer products of whole numbers become channels; what may hide by halves does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.recognising import LENGTH, assert_rewrites
from unsloth.passes.recognise.attention import Attention

BATCH, HEADS, WIDTH, PADDED = 2, 2, 8, 2
KEPT = "the mask is kept: unknown operation aten.matmul.default"


def _attention(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = x.chunk(3, dim=-1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(-2)


def _tower(x: Tensor, real: Tensor, by: float | None = None) -> Tensor:
    """As Llama 3.2 Vision hides padding from padding: what is no tile, and the last patches of every tile."""
    seen = real.view(BATCH, LENGTH, 1, 1).to(x.dtype).repeat(1, 1, PADDED, 1)
    seen[:, :, -1:] = 0
    return _hidden(x, (1 - seen).reshape(BATCH, LENGTH * PADDED, 1), by)


def _hidden(x: Tensor, seen: Tensor, by: float | None) -> Tensor:
    mask = seen @ seen.transpose(-1, -2) * (torch.finfo(x.dtype).min if by is None else by)
    return _attention(x, mask.unsqueeze(1))


def _qkv(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, HEADS, LENGTH * PADDED, 3 * WIDTH, generator=generator, dtype=dtype).requires_grad_()


REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_padding_hidden_from_padding_becomes_a_channel() -> None:
    assert_rewrites(Attention(), _tower, _qkv(), REAL, to="attention", variant="outer product in a channel")


def test_of_any_length() -> None:
    def function(x: Tensor, real: Tensor) -> Tensor:
        return _hidden(x, (1 - real.to(x.dtype)).unsqueeze(-1), None)

    x = _qkv()[:, :, :LENGTH].detach().requires_grad_()
    assert_rewrites(Attention(), function, x, REAL, to="attention", variant="outer product in a channel", dynamic=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_halves(dtype: torch.dtype) -> None:
    variant = "outer product in a channel"
    assert_rewrites(Attention(), _tower, _qkv(dtype), REAL, to="attention", variant=variant, tolerance=2e-2)


def test_rows_that_see_nothing_but_padding() -> None:
    """All scores of such a query are lost in what is added to them, and it sees all keys alike, as in eager."""
    nothing = torch.zeros_like(REAL)
    assert_rewrites(Attention(), _tower, _qkv(), nothing, to="attention", variant="outer product in a channel")


def test_what_only_weakens_is_kept() -> None:
    def function(x: Tensor, real: Tensor) -> Tensor:
        return _tower(x, real, by=-3.0)

    assert_rewrites(Attention(), function, _qkv(), REAL, to="masked_attention", variant=KEPT)


def test_fractions_are_kept() -> None:
    """A product of fractions, times a large number, may be a small one."""

    def function(x: Tensor, share: Tensor) -> Tensor:
        share = share.reshape(BATCH, LENGTH * PADDED, 1)
        return _attention(x, (share @ share.transpose(-1, -2) * -1e4).unsqueeze(1))

    share = torch.rand(BATCH, LENGTH * PADDED, generator=torch.Generator().manual_seed(1)) * 0.01
    assert_rewrites(Attention(), function, _qkv(), share, to="masked_attention", variant=KEPT)


def test_sums_of_outer_products_are_kept() -> None:
    def function(x: Tensor, real: Tensor) -> Tensor:
        seen = torch.stack([1 - real.to(x.dtype)] * PADDED, -1)  # [batch, length, 2]
        seen = seen.repeat_interleave(PADDED, 1)
        return _attention(x, (seen @ seen.transpose(-1, -2) * -1e30).unsqueeze(1))

    assert_rewrites(Attention(), function, _qkv(), REAL, to="masked_attention", variant=KEPT)
