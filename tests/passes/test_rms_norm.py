"""RMSNorm is found in each place where models round, and nothing that only resembles it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.recognising import LENGTH, assert_misses, assert_rewrites, find
from tests.tracing import trace
from unsloth.passes.recognise.rms_norm import RECOGNISER
from unsloth.passes.rewrite import Match
from unsloth.passes.runner import run_passes


def normalise(x: Tensor) -> Tensor:
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def round_then_scale(x: Tensor, weight: Tensor) -> Tensor:
    return weight * normalise(x).to(x.dtype)


def scale_then_round(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * normalise(x)).to(x.dtype)


def zero_centred(x: Tensor, weight: Tensor) -> Tensor:
    return (normalise(x) * (1.0 + weight.float())).type_as(x)


def by_division(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 / (x32 * x32).mean(dim=2, keepdim=True).add(1e-6).sqrt()).to(x.dtype) * weight


def by_power(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.pow(1e-6 + torch.square(x32).mean(-1, True), -0.5) * weight.float()).type_as(x)


def from_the_library(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, LENGTH, 24, dtype=dtype, requires_grad=True)
    return x, torch.randn(24, dtype=dtype, requires_grad=True)


ARGUMENTS = {  # variant in bfloat16, offset, round_first
    round_then_scale: ("round, then scale", 0.0, True),
    by_division: ("round, then scale", 0.0, True),
    scale_then_round: ("scale, then round", 0.0, False),
    by_power: ("scale, then round", 0.0, False),
    zero_centred: ("zero-centred weight", 1.0, False),
    from_the_library: ("torch.rms_norm", 0.0, False),
}
functions = pytest.mark.parametrize("norm", ARGUMENTS, ids=lambda f: f.__name__)


@functions
def test_arguments_say_where_it_rounds(norm) -> None:
    (match,) = find(RECOGNISER, norm, *inputs(torch.bfloat16))
    variant, offset, round_first = ARGUMENTS[norm]
    assert isinstance(match, Match) and match.variant == variant
    assert match.args[2:] == (1e-6, offset, round_first)
    assert [str(a.target) for a in match.args[:2]] == ["L_x_", "L_weight_"]
    assert match.anchor in match.interior and not match.interior & set(match.args[:2])


@functions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rewrites_float32(norm, dynamic: bool) -> None:
    assert_rewrites(RECOGNISER, norm, *inputs(torch.float32), to="rms_norm", dynamic=dynamic)


@functions
def test_rewrites_bfloat16(norm) -> None:
    variant = ARGUMENTS[norm][0]
    assert_rewrites(RECOGNISER, norm, *inputs(torch.bfloat16), to="rms_norm", variant=variant, tolerance=2e-2)


def test_the_conversion_after_the_norm_is_not_the_norms() -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return round_then_scale(x, weight).to(torch.bfloat16)

    assert_rewrites(RECOGNISER, norm, *inputs(torch.float32), to="rms_norm", variant="round, then scale")


def test_a_lossy_conversion_before_the_norm_is_not_the_norms() -> None:
    x, weight = inputs(torch.float32)
    (match,) = find(RECOGNISER, lambda x, w: round_then_scale(x.to(torch.bfloat16), w.bfloat16()), x, weight)
    assert isinstance(match, Match) and match.args[0].op == "call_function"


def test_two_norms_share_the_widened_input() -> None:
    def two(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x32 = x.float()
        normed = lambda: x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)  # noqa: E731
        return weight * normed().to(x.dtype), weight * normed().to(x.dtype)

    x, weight = inputs(torch.bfloat16)
    assert_rewrites(RECOGNISER, two, x, weight, to="rms_norm", variant="round, then scale", count=2, tolerance=2e-2)


def test_under_autocast_types_come_from_the_values() -> None:
    def project_and_normalise(x: Tensor, weight: Tensor) -> Tensor:
        return round_then_scale(torch.nn.functional.linear(x, torch.eye(24)), weight.bfloat16())

    x, weight = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (match,) = find(RECOGNISER, project_and_normalise, x, weight)
    assert isinstance(match, Match) and match.args[4] is True
    assert match.args[0].meta["val"].dtype == torch.bfloat16


def test_layer_norm_is_no_rms_norm() -> None:
    """It is left to Inductor: neither found nor missed. What subtracts something else is a near miss."""

    def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return weight * ((x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-6))

    def half_centred(x: Tensor, weight: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6))

    assert find(RECOGNISER, layer_norm, *inputs(torch.float32)) == []
    assert_misses(RECOGNISER, half_centred, *inputs(torch.float32), because="x is not the same value twice")


def test_a_magnitude_taken_over_is_refused() -> None:
    def matched(x: Tensor, magnitude: Tensor) -> Tensor:
        return x * magnitude / torch.sqrt(torch.clamp(x.square().mean(-1, keepdim=True), min=1e-5))

    x, _ = inputs(torch.float32)
    assert_misses(RECOGNISER, matched, x, torch.randn(2, LENGTH, 1), because="given the magnitude of another value")


def test_norm_over_another_axis_is_refused() -> None:
    def over_positions(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))

    assert_misses(RECOGNISER, over_positions, *inputs(torch.float32), because="not over the last dimension")


def without_weight(x: Tensor) -> Tensor:
    return normalise(x).type_as(x)


def l2_norm(x: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt((x.float() * x.float()).sum(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize(("norm", "variant"), [(without_weight, "without weight"), (l2_norm, "L2 norm")])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rewrites_norms_without_weight(norm, variant: str, dynamic: bool) -> None:
    x, _ = inputs(torch.float32)
    assert_rewrites(RECOGNISER, norm, x, to="rms_norm", variant=variant, dynamic=dynamic)
    x, _ = inputs(torch.bfloat16)
    assert_rewrites(RECOGNISER, norm, x, to="rms_norm", variant=variant, tolerance=2e-2)


def test_a_norm_of_a_norm_that_others_read() -> None:
    """In float32 the conversion between them does nothing, and stays for its other reader."""

    def twice(x: Tensor) -> Tensor:
        once = without_weight(x)
        return once + without_weight(once)

    assert_rewrites(RECOGNISER, twice, inputs(torch.float32)[0], to="rms_norm", variant="without weight", count=2)


def test_what_follows_a_norm_without_weight_stays() -> None:
    """A gate, as in Mamba 2, or a factor per position is no weight."""

    def gated(x: Tensor, gate: Tensor) -> Tensor:
        return without_weight(x) * torch.nn.functional.silu(gate)

    def tempered(x: Tensor, factor: Tensor) -> Tensor:
        return without_weight(x) * factor

    def gated_before(x: Tensor, gate: Tensor) -> Tensor:
        return without_weight(x * torch.nn.functional.silu(gate))

    x, _ = inputs(torch.float32)
    for gating in (gated, gated_before):
        assert_rewrites(RECOGNISER, gating, x, torch.randn_like(x), to="rms_norm", variant="without weight")
    factor = torch.randn(1, LENGTH, 1)
    assert_rewrites(RECOGNISER, tempered, x, factor, to="rms_norm", variant="without weight")


def test_a_bias_is_added_to_the_norm() -> None:
    def biased(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weight * without_weight(x) + bias

    x, weight = inputs(torch.float32)
    bias = torch.randn_like(weight).requires_grad_()
    assert_rewrites(RECOGNISER, biased, x, weight, bias, to="rms_norm", variant="round, then scale")


def test_a_projection_scaled_by_the_norm_is_refused() -> None:
    def scaled_after(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    x, _ = inputs(torch.float32)
    assert_misses(RECOGNISER, scaled_after, x, torch.randn(3, 24), because="the projection of x is scaled")


def test_a_norm_by_the_largest_value_is_refused() -> None:
    def by_maximum(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().amax(-1, keepdim=True) + 1e-6)

    assert_misses(RECOGNISER, by_maximum, inputs(torch.float32)[0], because="expected mean, found amax")


def test_a_result_that_is_never_rounded_is_a_norm_of_the_widened_x() -> None:
    def wide(x: Tensor, weight: Tensor) -> Tensor:
        return weight * normalise(x)

    (match,) = find(RECOGNISER, wide, *inputs(torch.bfloat16))
    assert isinstance(match, Match) and match.args[0].meta["val"].dtype == torch.float32


def test_float32_weight_scales_the_rounded_value() -> None:
    x, weight = inputs(torch.bfloat16)[0], inputs(torch.float32)[1]
    assert_rewrites(RECOGNISER, round_then_scale, x, weight, to="rms_norm", variant="round, then scale", tolerance=2e-2)


def test_weight_per_head_stays_outside() -> None:
    x, weight = torch.randn(2, LENGTH, 3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    assert_rewrites(RECOGNISER, round_then_scale, x, weight, to="rms_norm", variant="without weight")


def test_tensor_epsilon_is_refused() -> None:
    def learned(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    assert_misses(RECOGNISER, learned, *inputs(torch.float32), torch.tensor(1e-6), because="eps is not a number")


def test_inner_value_used_outside() -> None:
    def with_statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * (x * rstd), rstd

    _, (report,) = run_passes(trace(with_statistics, *inputs(torch.float32)), [RECOGNISER], strict=True)
    assert not report.rewritten and "used outside" in report.missed[0].detail


def test_unrelated_roots_are_not_reported() -> None:
    assert find(RECOGNISER, lambda x: x * torch.rsqrt(x.abs()), torch.randn(2, 8)) == []
