"""Two architectures that exist nowhere else: what is recognised is the mathematics, whoever wrote it, however."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, sigmoid, silu

from unsloth.compiler.breaks import watched
from unsloth.compiler.explain import Explanation
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled

WIDTH, HEADS, PER_HEAD, INNER, WORDS, DEPTH = 32, 4, 8, 48, 64, 2


class Ballast(nn.Module):
    """An RMSNorm that divides by a square root, and keeps its gain in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, flow: Tensor) -> Tensor:
        power = (flow * flow).mean(dim=-1, keepdim=True)
        return flow / torch.sqrt(1e-5 + power) * self.gain


class Weir(nn.Module):
    """Parallel residual, einsum attention, rotation by complex numbers, and a gate on the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.ballast = Ballast()
        self.into = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.lift, self.sluice = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.fall = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, flow: Tensor, turn: Tensor, later: Tensor) -> Tensor:
        calm = self.ballast(flow)
        q, k, v = self.into(calm).unflatten(-1, (3, HEADS, PER_HEAD)).unbind(2)
        q, k = self.turned(q, turn), self.turned(k, turn)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(PER_HEAD)
        weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        seen = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return flow + self.out(seen) + self.fall(self.lift(calm) * silu(self.sluice(calm)))

    @staticmethod
    def turned(x: Tensor, turn: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


class River(nn.Module):
    """Weirs in a row; words go in and come out by the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.weirs = nn.ModuleList(Weir() for _ in range(DEPTH))
        self.mouth = Ballast()

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        angles = torch.arange(length)[:, None] / 100.0 ** (torch.arange(0, PER_HEAD, 2) / PER_HEAD)
        turn = torch.polar(torch.ones_like(angles), angles)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        flow = self.table(words)
        for weir in self.weirs:
            flow = weir(flow, turn, later)
        logits = self.mouth(flow) @ self.table.weight.t()
        return cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


class Strand(nn.Module):
    """Norms before and after, by a negative power; halves turned in place; a sigmoid written out in the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.randn(4, WIDTH) * 0.1)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.a, self.b, self.c = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def even(self, index: int, x: Tensor) -> Tensor:
        # Squared by pow, centred around one, and the reciprocal root as a power.
        return (1.0 + self.scales[index]) * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, PER_HEAD).transpose(1, 2)

    @staticmethod
    def wound(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        near, far = x.chunk(2, dim=-1)
        return torch.cat((-far, near), dim=-1) * sin.unsqueeze(1) + x * cos.unsqueeze(1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        inside = self.even(0, x)
        q, k, v = (self.heads(f(inside)) for f in (self.q, self.k, self.v))
        seen = scaled_dot_product_attention(self.wound(q, cos, sin), self.wound(k, cos, sin), v, is_causal=True)
        x = x + self.even(1, self.o(seen.transpose(1, 2).reshape(x.shape)))
        inside = self.even(2, x)
        gate = self.b(inside)
        return x + self.even(3, self.c(gate * sigmoid(gate) * self.a(inside)))


class Rope(nn.Module):
    """Strands twisted into one, with a table for what goes in and a layer for what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.strands = nn.ModuleList(Strand() for _ in range(DEPTH))
        self.end = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        angles = torch.arange(words.shape[1])[:, None] / 50.0 ** (torch.arange(0, PER_HEAD, 2) / PER_HEAD)
        angles = torch.cat((angles, angles), dim=-1)[None]
        x, cos, sin = self.words(words), angles.cos(), angles.sin()
        for strand in self.strands:
            x = strand(x, cos, sin)
        return cross_entropy(self.end(x[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def step(run: Any, owner: nn.Module, words: Tensor) -> tuple[float, dict[str, Tensor]]:
    owner.zero_grad(set_to_none=True)
    loss = run(words)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def compare(kind: type[nn.Module], length: int = 12) -> Explanation:
    """Loss and every gradient of a strict compiled step against eager's; what was recognised."""
    torch.manual_seed(0)
    owner, words = kind(), torch.randint(WORDS, (2, length))
    eager = step(owner, owner, words)
    reports: list[Any] = []
    with watched() as breaks:
        ours = step(compiled(owner, Options(strict=True, lowering="eager"), reports), owner, words)
    assert abs(ours[0] - eager[0]) <= 1e-5 * eager[0]
    assert ours[1].keys() == eager[1].keys() == dict(owner.named_parameters()).keys()
    for name, gradient in eager[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-4 * gradient.norm() > 0, name
    assert len(reports) == 1 and not breaks
    return Explanation("", reports)


def test_a_river_of_weirs() -> None:
    said = compare(River)
    places = said.coverage.places
    assert {f: there for f, (_, there) in places.items()} == {
        "norm": 2 * 1 + 1, "rotation": 4, "attention": 2, "gated MLP": 2, "linear": 5 * 2, "loss": 1
    }  # fmt: skip
    assert places["norm"] == (3, 3) and places["gated MLP"] == (2, 2)
    # Pairs are turned as complex numbers: recognised, or named.
    assert places["rotation"][0] == 4 or sum("complex" in m.detail for m in said.missed) == 4


def test_a_rope_of_strands() -> None:
    said = compare(Rope)
    places = said.coverage.places
    for family, there in (("norm", 8), ("rotation", 4), ("attention", 2), ("gated MLP", 2)):
        assert places[family] == (there, there), (family, said.missed)
    (head,) = (s for s in [*said.rewritten, *said.missed] if s.operator == "linear_cross_entropy")
    assert head.source_line and head.source_line.startswith("test_invented.py:")


@pytest.mark.parametrize("kind", [River, Rope])
def test_any_length(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    owner = kind()
    run = compiled(owner, Options(strict=True, lowering="eager"), reports := [])
    for length in (9, 14, 21):
        words = torch.randint(WORDS, (2, length))
        ours, eager = step(run, owner, words), step(owner, owner, words)
        for name, gradient in eager[1].items():
            assert (ours[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert len(reports) <= 2
