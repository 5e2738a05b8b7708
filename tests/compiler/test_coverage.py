"""What a graph holds is counted without the matcher; what it costs is counted by hand here."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu, softmax

from tests.tracing import targets, trace
from unsloth.compiler.coverage import Coverage, Share, measure


def places(function, *args, taken=()) -> dict[str, tuple[int, int]]:
    return measure(trace(function, *args).graph, taken).places


def test_norms_in_every_spelling() -> None:
    def function(x, w):
        a = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        b = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w
        c = x * ((x * x).mean(-1, keepdim=True) + 1e-6).pow(-0.5)
        d = torch.rms_norm(x, (8,))
        no_norms = torch.rsqrt(w.abs() + 1) + torch.sqrt(w.abs()) + w.abs().pow(-0.5)
        return (a + b + c + d + no_norms).sum()

    assert places(function, torch.randn(2, 8), torch.ones(8, requires_grad=True)) == {"norm": (0, 4)}


def test_layer_norms_are_counted_apart() -> None:
    """They subtract the mean; something else that is subtracted makes none of them."""

    def function(x, w):
        centred = x - x.mean(-1, keepdim=True)
        a = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        b = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-6)
        moved = x - w
        c = moved * torch.rsqrt(moved.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (a + b + c + layer_norm(x, (8,))).sum()

    counted = places(function, torch.randn(2, 8), torch.ones(8, requires_grad=True))
    assert counted == {"norm": (0, 1), "layer norm": (0, 3)}


def test_rotations_in_every_spelling() -> None:
    def function(x, cos, sin, turn):
        half = torch.cat((-x[..., 4:], x[..., :4]), -1) * sin + x * cos
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin + x * cos
        numbers = torch.view_as_complex(x.reshape(2, 4, 2)) * turn
        a, b, c, s = x[..., :4], x[..., 4:], sin[..., :4], sin[..., 4:]
        parts = torch.cat((a * c - b * s, b * c + a * s), -1)
        return (half + pairs + torch.view_as_real(numbers).flatten(1) + parts + torch.cat((a, b), -1)).sum()

    x, turn = torch.randn(2, 8, requires_grad=True), torch.randn(2, 4, dtype=torch.complex64)
    assert places(function, x, torch.randn(2, 8), torch.randn(2, 8), turn) == {"rotation": (0, 4)}


def test_attention_is_what_weighs_values() -> None:
    def function(q, k, v, w):
        fused = scaled_dot_product_attention(q, k, v)
        eager = softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        router = softmax(linear(q, w), dim=-1).sum()
        return (fused + eager).sum() + router

    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    assert places(function, q, q.detach(), q.detach(), torch.randn(3, 8)) == {"attention": (0, 2), "linear": (0, 1)}


def test_an_activation_is_gated_by_something_else() -> None:
    def function(x, y):
        gated = silu(x) * y + y * gelu(x) + (x * torch.sigmoid(x)) * y + (y + 1) * (x * torch.sigmoid(1.702 * x))
        return (gated + x * silu(x) + silu(x) * 3.0 + x * torch.sigmoid(y)).sum()

    assert places(function, torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)) == {"gated MLP": (0, 4)}


def test_costs_are_those_of_the_formulas() -> None:
    def function(x, w):
        return silu(linear(x, w)).sum()

    gm = trace(function, torch.randn(4, 8), torch.randn(16, 8, requires_grad=True))
    assert targets(gm) == ["linear", "silu", "sum"]
    coverage = measure(gm.graph, {"silu"})
    product, elements = 2 * 4 * 16 * 8, 4 * 16
    assert coverage.flops == Share(fused=elements, library=product, total=product + elements + 1)
    assert coverage.bytes == Share(4 * 2 * elements, 4 * (32 + 128 + 64), 4 * (2 * elements + 32 + 128 + 64 + 64 + 1))
    assert coverage.places == {"linear": (0, 1)}


def test_symbolic_sizes_count_as_what_they_were_traced_with() -> None:
    def function(x, w):
        return silu(linear(x, w)).sum()

    args = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
    static, dynamic = (measure(trace(function, *args, dynamic=d).graph, ()) for d in (False, True))
    assert static == dynamic


def test_graphs_add_up() -> None:
    one = Coverage({"norm": (1, 2)}, Share(1, 2, 4), Share(3, 0, 4))
    assert one + Coverage() == one
    both = one + Coverage({"norm": (2, 2), "loss": (0, 1)}, Share(1, 0, 1), Share())
    assert both == Coverage({"norm": (3, 4), "loss": (0, 1)}, Share(2, 2, 5), Share(3, 0, 4))
    assert both.flops.covered == 0.4 and Share().covered == 0.0


def test_what_a_pass_took_is_covered() -> None:
    from unsloth import explain

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x):
            return (silu(self.gate(x)) * self.up(x)).sum()

    coverage = explain(Gated(), (torch.randn(2, 8),)).coverage
    assert coverage.places == {"gated MLP": (1, 1), "linear": (0, 2)}
    assert coverage.flops.fused == 2 * 2 * 16  # the activation and the product


def test_experts_are_counted_apart() -> None:
    """One grouped product for all experts, and products of one expert each; a linear layer's weight is no expert."""

    def function(x, experts, offsets, weight):
        grouped = torch._grouped_mm(x, experts, offs=offsets)
        looped = linear(x, experts[1].t()) + x @ experts[0]
        batched = torch.bmm(x.unsqueeze(1), experts[offsets.repeat(2)])
        return (grouped + looped + batched.squeeze(1) + linear(x, weight)).sum()

    x, experts = (torch.randn(sizes, dtype=torch.bfloat16, requires_grad=True) for sizes in ((4, 8), (2, 8, 8)))
    offsets = torch.tensor([1, 0], dtype=torch.int32)
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    counted = places(function, x, experts, offsets, weight)
    assert counted == {"linear": (0, 1), "grouped expert product": (0, 1), "single expert product": (0, 3)}
