"""Gated linear units: every activation we have an operator for, and no broadcast or look-alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from tests.passes.recognising import LENGTH, assert_misses, assert_rewrites, find
from unsloth.passes.recognise.glu import RECOGNISER
from unsloth.passes.rewrite import Match


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


FUNCTIONS = {
    "silu": (lambda gate, up: silu(gate) * up, "swiglu", "swiglu"),
    "commuted": (lambda gate, up: up * silu(gate), "swiglu", "swiglu"),
    "written out": (lambda gate, up: gate * torch.sigmoid(gate) * up, "swiglu", "swiglu"),
    "in float32": (lambda gate, up: (silu(gate.float()) * up).to(gate.dtype), "swiglu", "swiglu"),
    "gelu": (lambda gate, up: gelu(gate) * up, "geglu", "geglu"),
    "gelu tanh": (lambda gate, up: up * gelu(gate, approximate="tanh"), "geglu", "geglu tanh"),
    "gelu tanh written out": (lambda gate, up: new_gelu(gate) * up, "geglu", "geglu tanh"),
}
functions = pytest.mark.parametrize(("function", "operator", "variant"), FUNCTIONS.values(), ids=FUNCTIONS)


def inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(shape or (2, LENGTH, 12), dtype=dtype, requires_grad=True) for _ in "gu")
    return first, second


@functions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rewrites_float32(function, operator: str, variant: str, dynamic: bool) -> None:
    assert_rewrites(RECOGNISER, function, *inputs(torch.float32), to=operator, variant=variant, dynamic=dynamic)


@functions
def test_rewrites_bfloat16(function, operator: str, variant: str) -> None:
    assert_rewrites(RECOGNISER, function, *inputs(torch.bfloat16), to=operator, variant=variant, tolerance=2e-2)


@functions
def test_arguments(function, operator: str, variant: str) -> None:
    (match,) = find(RECOGNISER, function, *inputs(torch.bfloat16))
    assert isinstance(match, Match) and match.operator.name == operator
    assert [str(a.target) for a in match.args[:2]] == ["L_gate_", "L_up_"]
    assert match.args[2:] == {"swiglu": (), "geglu": (False,), "geglu tanh": (True,)}[variant]


def test_fused_projection_is_seen_through() -> None:
    def halves(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return up * silu(gate)

    assert_rewrites(RECOGNISER, halves, inputs(torch.float32)[0], to="swiglu", variant="swiglu")


def test_under_autocast_types_come_from_the_values() -> None:
    def mlp(x: Tensor, weight: Tensor) -> Tensor:
        return silu(linear(x, weight)) * linear(x, weight)

    with torch.autocast("cpu", torch.bfloat16):
        (match,) = find(RECOGNISER, mlp, torch.randn(2, 12), torch.randn(12, 12))
    assert isinstance(match, Match)
    assert {a.meta["val"].dtype for a in match.args} == {torch.bfloat16}


def test_the_conversion_after_it_is_not_its_own() -> None:
    def widened(gate: Tensor, up: Tensor) -> Tensor:
        return (silu(gate) * up).float()

    assert_rewrites(RECOGNISER, widened, *inputs(torch.bfloat16), to="swiglu", variant="swiglu", tolerance=2e-2)


def test_a_broadcast_gate_is_refused() -> None:
    gate, up = torch.randn(2, LENGTH, 1), torch.randn(2, LENGTH, 12)
    assert_misses(RECOGNISER, lambda gate, up: silu(gate) * up, gate, up, because="have different shapes")


def test_a_scaled_activation_is_refused() -> None:
    assert_misses(RECOGNISER, lambda gate: silu(gate) * 2.0, torch.randn(2, 12), because="up is not a tensor")


def test_another_result_type_is_refused() -> None:
    gate, up = torch.randn(2, 12, dtype=torch.bfloat16), torch.randn(2, 12)
    assert_misses(RECOGNISER, lambda gate, up: silu(gate) * up, gate, up, because="the result is torch.float32")


def test_the_sigmoid_form_of_gelu_is_refused() -> None:
    def quick(gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(1.702 * gate) * up

    assert_misses(RECOGNISER, quick, *inputs(torch.float32), because="sigmoid form")


def test_a_plain_activation_is_not_reported() -> None:
    assert find(RECOGNISER, lambda x: silu(x) + torch.sigmoid(x) * 3.0, torch.randn(2, 12)) == []
