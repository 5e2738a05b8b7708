"""A sum and its norm become one operator where the sum is read elsewhere too, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.passes.recognising import LENGTH, assert_rewrites
from tests.tracing import targets, trace
from unsloth.passes.fuse.add_rms_norm import FUSION
from unsloth.passes.recognise.rms_norm import RECOGNISER
from unsloth.passes.runner import run_passes


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def residual_stream(x: Tensor, residual: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """Pre-norm, as Llama: two layers, so that each sum is read by its norm and by the next sum."""
    for _ in range(2):
        residual = residual + x
        x = linear(norm(residual, weight), projection)
    return residual + x


def normed_on_both_sides(x: Tensor, residual: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """As Gemma 2: a layer's output is normalised, added, and the sum is normalised for the next."""
    for _ in range(2):
        residual = norm(x, weight) + residual
        x = linear(norm(residual, weight), projection)
    return residual + x


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, residual = (torch.randn(2, LENGTH, 24, dtype=dtype, requires_grad=True) for _ in "xr")
    weight, projection = torch.randn(24, dtype=dtype, requires_grad=True), torch.randn(24, 24, dtype=dtype) / 5
    return x, residual, weight, projection


@pytest.mark.parametrize("function", [residual_stream, normed_on_both_sides])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rewrites_float32(function, dynamic: bool) -> None:
    arguments = inputs(torch.float32)
    assert_rewrites(FUSION, function, *arguments, to="add_rms_norm", count=2, dynamic=dynamic, after=[RECOGNISER])


@pytest.mark.parametrize("function", [residual_stream, normed_on_both_sides])
def test_rewrites_bfloat16(function) -> None:
    arguments = inputs(torch.bfloat16)
    assert_rewrites(FUSION, function, *arguments, to="add_rms_norm", count=2, tolerance=2e-2, after=[RECOGNISER])


def test_a_frozen_branch_gets_no_gradient() -> None:
    """Where only one addend wants a gradient, the other gets none: the soundness check compares the paths."""
    x, residual, weight, projection = inputs(torch.float32)
    arguments = x.detach(), residual, weight.detach(), projection
    assert_rewrites(FUSION, residual_stream, *arguments, to="add_rms_norm", count=2, after=[RECOGNISER])


def test_a_sum_that_leaves_the_graph_is_left_alone() -> None:
    """As hidden states do: its gradient would come to reach the norm's weight, as zeros."""

    def both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, norm(total, weight)

    gm, (_, report) = run_passes(trace(both, *inputs(torch.float32)[:3]), [RECOGNISER, FUSION], strict=True)
    assert "add_rms_norm" not in targets(gm)
    assert [m.detail for m in report.missed] == ["an output of the graph reads the sum but not its norm"]


def left_alone(function, *arguments: Tensor) -> bool:
    """The norm stays a norm of its own."""
    gm, _ = run_passes(trace(function, *arguments), [RECOGNISER, FUSION], strict=True)
    names = targets(gm)
    assert "rms_norm" in names
    return "add_rms_norm" not in names


def test_a_sum_that_only_the_norm_reads_is_left_alone() -> None:
    x, residual, weight, _ = inputs(torch.float32)
    assert left_alone(lambda x, residual, weight: norm(x + residual, weight), x, residual, weight)


def test_a_broadcast_addend_is_left_alone() -> None:
    def biased(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        total = x + bias
        return total * norm(total, weight)

    x, _, weight, _ = inputs(torch.float32)
    assert left_alone(biased, x, torch.randn(24), weight)


def test_a_converted_addend_is_left_alone() -> None:
    def promoted(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = x + residual
        return total * norm(total, weight)

    x, residual, weight, _ = inputs(torch.float32)
    assert left_alone(promoted, x.detach().bfloat16(), residual, weight)


def test_a_scaled_addend_is_left_alone() -> None:
    def scaled(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = torch.add(x, residual, alpha=2)
        return total * norm(total, weight)

    x, residual, weight, _ = inputs(torch.float32)
    assert left_alone(scaled, x, residual, weight)


def test_the_second_norm_of_a_sum_reads_it() -> None:
    """Parallel blocks: both norms of one sum, of which the first is fused."""

    def parallel(x: Tensor, residual: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
        total = x + residual
        return total + linear(norm(total, weight), projection) * norm(total, projection[0])

    arguments = inputs(torch.float32)
    assert_rewrites(FUSION, parallel, *arguments, to="add_rms_norm", after=[RECOGNISER])
