"""Rotary embedding of q and k together or of one alone, in every order of features, and what is not quite one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.passes.recognising import LENGTH, assert_misses, assert_rewrites, find
from tests.tracing import trace
from unsloth.compiler.capture import retrace
from unsloth.passes.recognise.rope import RECOGNISER
from unsloth.passes.rewrite import Match
from unsloth.passes.runner import run_passes


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, turned=rotate_half) -> Tensor:
    return (x * cos) + (turned(x) * sin)


def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def commuted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate_half(q) * sin + cos * q, sin * rotate_half(k) + cos * k


def by_chunks(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(q, cos, sin, rotate_chunks), rotate(k, cos, sin, rotate_chunks)


def in_float32(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q32, k32 = both(q.float(), k.float(), cos.float(), sin.float())
    return q32.to(q.dtype), k32.to(k.dtype)


def attended(function):
    """The rotated q and k end in one result, as they do in attention: there one depends on the inputs of both."""

    def scores(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated_q, rotated_k = function(q, k, cos, sin)
        return rotated_q.mean(1) * rotated_k.mean(1)

    return scores


def heads_last(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Gemma 3n: the heads are the third dimension."""
    q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)
    return rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)


def half_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As gpt-oss."""
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return turned(q), turned(k)


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As nanochat."""

    def turned_back(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((second, -first), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(q, cos, sin, turned_back), rotate(k, cos, sin, turned_back)


def backwards_with_half_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)

    return turned(q), turned(k)


def by_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Cohere: in float32, with tables whose neighbours are equal."""
    cos, sin = (x[..., :4].repeat_interleave(2, dim=-1) * 1.0 for x in (cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple(rotate(x.float(), cos, sin, rotate_pairs).to(x.dtype) for x in (q, k))  # type: ignore[return-value]


def by_pairs_with_repeated_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As ERNIE 4.5 and GLM."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    cos = cos[..., :4].repeat_interleave(2, dim=-1)
    sin = sin[..., :4].repeat_interleave(2, dim=-1)
    return tuple(((x.float() * cos) + (rotate_pairs(x).float() * sin)).to(x.dtype) for x in (q, k))  # type: ignore[return-value]


def by_pairs_with_tables_of_their_own(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As GPT-J: each rotation spreads the same tables."""

    def turned(x: Tensor) -> Tensor:
        c = torch.repeat_interleave(cos[:, :, None, :4], 2, 3)
        s = torch.repeat_interleave(sin[:, :, None, :4], 2, 3)
        return (x * c) + (rotate_pairs(x) * s)

    q, k = turned(q.transpose(1, 2)), turned(k.transpose(1, 2))
    return q.transpose(1, 2), k.transpose(1, 2)


def stacked_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As RoFormer."""
    cos, sin = (x[..., :4].unsqueeze(1) for x in (cos, sin))
    cos, sin = (torch.stack([x, x], dim=-1).flatten(-2) for x in (cos, sin))
    return rotate(q, cos, sin, rotate_pairs), rotate(k, cos, sin, rotate_pairs)


def pairs_to_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepSeek V3: neighbours are read, halves are written."""
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return turned(q), turned(k)


def pair_by_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x[..., 0::2].float(), x[..., 1::2].float()
        y = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return y.flatten(-2).type_as(x)

    return turned(q), turned(k)


def complex_numbers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepSeek V2 and Llama 4."""
    table = torch.complex(cos[..., :4].float(), sin[..., :4].float()).unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * table).flatten(3).type_as(x)

    return turned(q), turned(k)


VARIANTS = {
    both: "half rotation",
    commuted: "half rotation",
    by_chunks: "half rotation",
    in_float32: "half rotation",
    heads_last: "half rotation",
    half_tables: "half rotation, a table per pair",
    backwards: "half rotation backwards",
    backwards_with_half_tables: "half rotation backwards, a table per pair",
    by_pairs: "interleaved",
    by_pairs_with_repeated_tables: "interleaved, a table per pair",
    by_pairs_with_tables_of_their_own: "interleaved, a table per pair",
    stacked_tables: "interleaved, a table per pair",
    pairs_to_halves: "interleaved, written in halves",
    pair_by_pair: "interleaved, pair by pair",
    complex_numbers: "complex numbers",
}
functions = pytest.mark.parametrize("function", VARIANTS, ids=lambda f: f.__name__)


def inputs(dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (torch.randn(2, LENGTH, h, 8, dtype=dtype).transpose(1, 2).requires_grad_() for h in (4, 3))
    angle = torch.randn(batch, LENGTH, 8)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


@functions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2], ids=["shared positions", "own positions"])
def test_rewrites_float32(function, dynamic: bool, batch: int) -> None:
    arguments = inputs(torch.float32, batch)
    variant = VARIANTS[function]
    assert_rewrites(RECOGNISER, attended(function), *arguments, to="rope", variant=variant, dynamic=dynamic)


@functions
def test_rewrites_bfloat16(function) -> None:
    assert_rewrites(RECOGNISER, attended(function), *inputs(torch.bfloat16), to="rope", tolerance=2e-2)


def test_arguments() -> None:
    (match,) = find(RECOGNISER, attended(both), *inputs(torch.float32))
    assert isinstance(match, Match)
    assert [str(a.target) for a in match.args[:2]] == ["L_q_", "L_k_"]
    assert [str(a.args[0].target) for a in match.args[2:4]] == ["L_cos_", "L_sin_"]
    assert match.args[4:] == (False, False, False)
    assert list(match.outputs.values()) == [0, 1]
    assert [n.meta["val"].shape[1] for n in match.outputs] == [4, 3]


def test_tables_in_float32_over_bfloat16_heads() -> None:
    def rounded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated_q, rotated_k = both(q, k, cos, sin)
        return rotated_q.to(q.dtype), rotated_k.to(k.dtype)

    q, k, _, _ = inputs(torch.bfloat16)
    _, _, cos, sin = inputs(torch.float32)
    assert_rewrites(RECOGNISER, attended(rounded), q, k, cos, sin, to="rope", tolerance=2e-2)
    (match,) = find(RECOGNISER, attended(rounded), q, k, cos, sin)
    assert isinstance(match, Match) and match.args[-1] is True  # rounded once, to the heads' own dtype


def test_a_rounding_of_float32_heads_is_not_the_rotations() -> None:
    def rounded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated_q, rotated_k = both(q, k, cos, sin)
        return rotated_q.bfloat16(), rotated_k.bfloat16()

    (match,) = find(RECOGNISER, attended(rounded), *inputs(torch.float32))
    assert isinstance(match, Match) and match.anchor.meta["val"].dtype == torch.float32


def test_repeated_tables_are_read_before_they_are_repeated() -> None:
    (match,) = find(RECOGNISER, attended(by_pairs_with_repeated_tables), *inputs(torch.bfloat16))
    assert isinstance(match, Match) and [a.meta["val"].shape[-1] for a in match.args[2:4]] == [4, 4]
    assert match.args[4:] == (True, True, False)


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_scaled_angles_and_scaled_tables_are_taken_as_they_are(scaling: float) -> None:
    """Linear, YaRN, LongRoPE and llama3 scaling change the angles, and the attention factor scales cos and sin."""

    def scaled(q: Tensor, k: Tensor, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, :, None].float() @ frequencies[:, None, :4]
        angles = torch.cat((angles, angles), dim=-1)
        return both(q, k, angles.cos() * scaling, angles.sin() * scaling)

    q, k, _, _ = inputs(torch.float32)
    positions, frequencies = torch.arange(LENGTH)[None], torch.rand(1, 8)
    assert_rewrites(RECOGNISER, attended(scaled), q, k, positions, frequencies, to="rope", variant="half rotation")


def test_sections_of_several_axes_are_taken_as_they_are() -> None:
    """Multi-section rotation: a part of the features turns by the position in time, others by row and by column."""

    def sections(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos = torch.cat([m[i % 3] for i, m in enumerate(cos.split([1, 1, 2] * 2, dim=-1))], dim=-1)
        sin = torch.cat([m[i % 3] for i, m in enumerate(sin.split([1, 1, 2] * 2, dim=-1))], dim=-1)
        return both(q, k, cos, sin)

    q, k, _, _ = inputs(torch.float32)
    angle = torch.randn(3, 2, LENGTH, 8)
    assert_rewrites(RECOGNISER, attended(sections), q, k, angle.cos(), angle.sin(), to="rope", variant="half rotation")


def test_images_have_no_batch() -> None:
    def vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
        q, k = rotate(q.float(), cos, sin).to(q.dtype), rotate(k.float(), cos, sin).to(k.dtype)
        return q * k.tanh()

    q, k = (torch.randn(LENGTH, 4, 8, requires_grad=True) for _ in "qk")
    angle = torch.randn(LENGTH, 8)
    assert_rewrites(RECOGNISER, vision, q, k, angle.cos(), angle.sin(), to="rope", variant="half rotation")


def test_layers_share_one_pair_of_tables() -> None:
    def layers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for _ in range(3):
            q, k = rotate(q, cos, sin).tanh(), rotate(k, cos, sin).tanh()
        return q, k

    assert_rewrites(RECOGNISER, attended(layers), *inputs(torch.float32), to="rope", variant="half rotation", count=3)


def test_under_autocast_types_come_from_the_values() -> None:
    def project(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.eye(8)
        return both(torch.nn.functional.linear(q, weight), torch.nn.functional.linear(k, weight), cos, sin)

    q, k, _, _ = inputs(torch.float32)
    _, _, cos, sin = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (match,) = find(RECOGNISER, attended(project), q, k, cos, sin)
    assert isinstance(match, Match) and match.args[0].meta["val"].dtype == torch.bfloat16


def one(function):
    """Rotates q alone by ``function``."""
    return lambda q, k, cos, sin: function(q, cos.unsqueeze(1), sin.unsqueeze(1))


@pytest.mark.parametrize("turned", [rotate_half, rotate_pairs])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_rotation_without_a_partner_is_one_alone(turned, dynamic: bool) -> None:
    q, _, cos, sin = inputs(torch.float32)

    def alone(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(q, cos.unsqueeze(1), sin.unsqueeze(1), turned)

    assert_rewrites(RECOGNISER, alone, q, cos, sin, to="rope_of_one", dynamic=dynamic)


def test_a_result_that_is_used_before_its_partner_can_be_computed() -> None:
    def one_by_one(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        rotated_q = rotate(q, cos, sin).exp()
        return rotated_q, rotate(k + rotated_q.mean(1, keepdim=True), cos, sin)

    assert_rewrites(RECOGNISER, one_by_one, *inputs(torch.float32), to="rope_of_one", count=2)


def test_rotations_that_end_in_different_outputs_are_no_pair() -> None:
    """One operator would let each output depend on both inputs."""
    assert_rewrites(RECOGNISER, both, *inputs(torch.float32), to="rope_of_one", count=2)


def test_different_tables_are_no_pair() -> None:
    def apart(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        one = rotate(q, cos.unsqueeze(1), sin.unsqueeze(1))
        return one, rotate(k, sin.unsqueeze(1), cos.unsqueeze(1))

    assert_rewrites(RECOGNISER, apart, *inputs(torch.float32), to="rope_of_one", count=2)


def test_other_orders_are_no_pair() -> None:
    def apart(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin, rotate_pairs)

    assert_rewrites(RECOGNISER, apart, *inputs(torch.float32), to="rope_of_one", count=2)


def test_tables_per_head_are_refused() -> None:
    def per_head(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(q, cos.unsqueeze(1).expand(2, 4, LENGTH, 8) * 1.0, sin.unsqueeze(1).expand(2, 4, LENGTH, 8) * 1.0)

    _, (report,) = run_passes(trace(per_head, *inputs(torch.float32)), [RECOGNISER], strict=True)
    assert not report.rewritten and "differs between heads" in report.missed[0].detail


def scaled_by_parameter(q: Tensor, k: Tensor, alpha: Tensor, positions: Tensor) -> Tensor:
    """As Mistral Large 4: the frequencies have a trained scale."""
    angles = positions[:, :, None].float() * alpha.exp()
    angles = torch.cat((angles, angles), dim=-1)
    return attended(both)(q, k, angles.cos(), angles.sin())


@pytest.mark.parametrize("outside", [False, True], ids=["in the graph", "before the graph"])
def test_tables_that_are_trained_are_refused(outside: bool) -> None:
    """The operator has no gradient of cos and sin."""
    q, k, _, _ = inputs(torch.float32)
    alpha, positions = torch.zeros(4, requires_grad=True), torch.arange(LENGTH)[None]
    reports = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
        result, (report,) = run_passes(retrace(gm, check=False), [RECOGNISER], strict=True)
        reports.append(report)
        return result

    def run(function) -> list[Tensor]:
        if outside:  # as after a graph break: cos and sin are inputs that are no leaves
            angles = positions[:, :, None].float() * torch.cat((alpha, alpha)).exp()
            result = function(q, k, angles.cos(), angles.sin())
        else:
            result = function(q, k, alpha, positions)
        return list(torch.autograd.grad(result.square().sum(), [q, k, alpha]))

    function = attended(both) if outside else scaled_by_parameter
    torch._dynamo.reset()
    got, expected = run(torch.compile(function, backend=backend, fullgraph=True)), run(function)
    (report,) = reports
    (miss,) = report.missed
    assert not report.rewritten
    assert miss.detail == "cos may want a gradient, which the operator does not give it"
    assert miss.source_line and miss.source_line.startswith("test_rope.py:")
    assert got[2].norm() > 0
    torch.testing.assert_close(got, expected)


def test_tables_computed_from_a_parameter_without_gradients_are_taken() -> None:
    def function(q: Tensor, k: Tensor, alpha: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad():
            angles = positions[:, :, None].float() * alpha.exp()
            cos, sin = angles.cos(), angles.sin()
        return attended(both)(q, k, cos, sin) * alpha.sum()

    q, k, _, _ = inputs(torch.float32)
    alpha, positions = torch.ones(8, requires_grad=True), torch.arange(LENGTH)[None]
    assert_rewrites(RECOGNISER, function, q, k, alpha, positions, to="rope")


def test_mixed_halves_are_refused() -> None:
    def mixed(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = q.chunk(2, dim=-1)
        cos, sin = cos[..., :4], sin[..., :4]
        return torch.cat((first * cos - second * sin, first * cos + second * sin), dim=-1)

    assert_misses(RECOGNISER, one(mixed), *inputs(torch.float32), because="x is not the same value twice")


def test_complex_numbers_of_other_neighbours_are_refused() -> None:
    """The view takes its pairs across heads."""

    def across(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        table = torch.complex(cos[..., :4], sin[..., :4])
        q = q.contiguous().view(2, LENGTH, 4, 4, 2).transpose(1, 2)
        return torch.view_as_real(torch.view_as_complex(q) * table).flatten(-2)

    assert_misses(RECOGNISER, one(across), *inputs(torch.float32), because="expected view, found transpose")


def test_partial_rotation_rotates_the_slice() -> None:
    def partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated_q, rotated_k = both(q[..., :4], k[..., :4], cos, sin)
        return torch.cat((rotated_q, q[..., 4:]), dim=-1), torch.cat((rotated_k, k[..., 4:]), dim=-1)

    q, k, cos, sin = inputs(torch.float32)
    assert_rewrites(RECOGNISER, attended(partial), q, k, cos[..., :4], sin[..., :4], to="rope")


def test_halves_the_wrong_way_round_are_refused() -> None:
    def backwards(x: Tensor) -> Tensor:
        return torch.cat((-x[..., :4], x[..., 4:]), dim=-1)

    function = one(lambda q, cos, sin: rotate(q, cos, sin, backwards))
    assert_misses(RECOGNISER, function, *inputs(torch.float32), because="expected end, found 4")
