"""Rotary embedding: the half rotation of q and k together, and a reason for every other layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.recognising import LENGTH, assert_misses, assert_rewrites, find
from unsloth.passes.recognise.rope import RECOGNISER
from unsloth.passes.rewrite import Match, Miss


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


functions = pytest.mark.parametrize("function", [both, commuted, by_chunks, in_float32], ids=lambda f: f.__name__)


def inputs(dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (torch.randn(2, LENGTH, h, 8, dtype=dtype).transpose(1, 2).requires_grad_() for h in (4, 3))
    angle = torch.randn(batch, LENGTH, 8)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


@functions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2], ids=["shared positions", "own positions"])
def test_rewrites_float32(function, dynamic: bool, batch: int) -> None:
    arguments = inputs(torch.float32, batch)
    assert_rewrites(RECOGNISER, attended(function), *arguments, to="rope", variant="half rotation", dynamic=dynamic)


@functions
def test_rewrites_bfloat16(function) -> None:
    assert_rewrites(RECOGNISER, attended(function), *inputs(torch.bfloat16), to="rope", tolerance=2e-2)


def test_arguments_are_the_tables_before_they_are_spread_over_heads() -> None:
    (match,) = find(RECOGNISER, both, *inputs(torch.float32))
    assert isinstance(match, Match)
    assert [str(a.target) for a in match.args] == ["L_q_", "L_k_", "L_cos_", "L_sin_"]
    assert list(match.outputs.values()) == [0, 1]
    assert [n.meta["val"].shape[1] for n in match.outputs] == [4, 3]


def test_tables_in_float32_over_bfloat16_heads() -> None:
    def rounded(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated_q, rotated_k = both(q, k, cos, sin)
        return rotated_q.to(q.dtype), rotated_k.to(k.dtype)

    q, k, _, _ = inputs(torch.bfloat16)
    _, _, cos, sin = inputs(torch.float32)
    assert_rewrites(RECOGNISER, attended(rounded), q, k, cos, sin, to="rope", tolerance=2e-2)


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
        (match,) = find(RECOGNISER, project, q, k, cos, sin)
    assert isinstance(match, Match) and match.args[0].meta["val"].dtype == torch.bfloat16


def one(function):
    """Rotates q alone by ``function``."""
    return lambda q, k, cos, sin: function(q, cos.unsqueeze(1), sin.unsqueeze(1))


def test_a_lone_rotation_is_refused() -> None:
    assert_misses(RECOGNISER, one(rotate), *inputs(torch.float32), because="no second rotation")


def test_different_tables_are_no_pair() -> None:
    def apart(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        one = rotate(q, cos.unsqueeze(1), sin.unsqueeze(1))
        return one, rotate(k, sin.unsqueeze(1), cos.unsqueeze(1))

    found = find(RECOGNISER, apart, *inputs(torch.float32))
    assert [type(f) for f in found] == [Miss, Miss]


def test_interleaved_pairs_are_refused() -> None:
    function = one(lambda q, cos, sin: rotate(q, cos, sin, rotate_pairs))
    assert_misses(RECOGNISER, function, *inputs(torch.float32), because="interleaved pairs, not halves")


def test_complex_pairs_are_refused() -> None:
    def complex_pairs(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        table = torch.complex(cos[..., :4], sin[..., :4])
        return torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (4, 2))) * table).flatten(-2)

    assert_misses(RECOGNISER, one(complex_pairs), *inputs(torch.float32), because="complex")


def test_half_tables_are_refused() -> None:
    def half_tables(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = q.chunk(2, dim=-1)
        cos, sin = cos[..., :4], sin[..., :4]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    assert_misses(RECOGNISER, one(half_tables), *inputs(torch.float32), because="one half only")


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


def test_tables_over_another_axis_are_refused() -> None:
    def heads_last(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(q.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2))

    assert_misses(RECOGNISER, heads_last, *inputs(torch.float32), because="unsqueeze has dim=2, not 1")
