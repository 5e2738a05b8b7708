"""Quantising a model that is on a device: what it leaves of the device's memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unsloth.models.quantise import quantise_nf4

pytest.importorskip("bitsandbytes")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the GPU's memory")
def test_packed_weights_do_not_hold_the_memory_of_unpacked_ones() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    layers = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(12)))
    unpacked = torch.cuda.memory_reserved() - before
    quantise_nf4(layers, compute_dtype=torch.bfloat16)
    assert torch.cuda.memory_reserved() - before < 0.5 * unpacked


def test_nothing_to_quantise_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to quantise: of 1 linear layers 1"):
        quantise_nf4(nn.Sequential(nn.Linear(4, 4)), compute_dtype=torch.float32, skip=("0",))


def test_weights_that_are_made_when_their_turn_comes_are_those_of_a_whole_model() -> None:
    """In the order of layers; at most one exists unpacked."""
    sizes, weights = [(64, 32), (32, 64)], [torch.randn(32, 64), torch.randn(64, 32)]
    whole = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
    for layer, weight in zip(whole, weights, strict=True):
        layer.weight.data.copy_(weight)
    hollow = nn.Sequential(*(nn.Linear(*size, bias=False, device="meta") for size in sizes))
    turns = iter(weights)

    def make(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(next(turns).clone())

    quantise_nf4(hollow, compute_dtype=torch.float32, make=make)
    quantise_nf4(whole, compute_dtype=torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(hollow(x), whole(x)) and next(turns, None) is None
