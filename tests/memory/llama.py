"""A language model in miniature, and its joint graph cut by a partitioner without Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import cross_entropy, dropout, linear, scaled_dot_product_attention

from unsloth.kernels.glu import swiglu
from unsloth.kernels.rms_norm import rms_norm
from unsloth.passes.memory.partition import Partitioner

WIDTH, HEADS, INNER, VOCABULARY = 32, 2, 96, 50


class Layer(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.norms = nn.ParameterList(torch.rand(WIDTH) + 0.5 for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(4, WIDTH) / 4), nn.Parameter(torch.randn(WIDTH, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = rms_norm(x, self.norms[0], 1e-6, 0.0, True)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        adapted = linear(linear(dropout(mixed, self.p, self.training), self.a), self.b)
        x = x + self.out(mixed) + adapted
        h, _ = rms_norm(x, self.norms[1], 1e-6, 0.0, True)
        return x + self.down(swiglu(*self.gate_up(h).chunk(2, -1)))


class Model(nn.Module):
    """Tied embedding and head, layers in a list, some frozen weights, a counter that forward changes."""

    def __init__(self, layers: int = 3, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(p) for _ in range(layers))
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.register_buffer("calls", torch.zeros(()))
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.gate_up.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        x, _ = rms_norm(x, self.norm, 1e-6, 0.0, True)
        logits = linear(x, self.embedding.weight)
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def as_it_is(gm: fx.GraphModule) -> Callable[..., Any]:
    """A half that runs its operators one by one."""
    return make_boxed_func(gm.forward)


def cut_by(
    partition: Callable[..., Any],
    seen: dict[str, fx.GraphModule] | None = None,
    run: Callable[[fx.GraphModule], Callable[..., Any]] = as_it_is,
) -> Callable[..., Any]:
    """A Dynamo backend that cuts the joint graph by ``partition``; ``run`` makes a boxed function of each half."""

    def compiler(kind: str) -> Callable[..., Any]:
        def keep(gm: fx.GraphModule, _: Any) -> Any:
            if seen is not None:
                seen[kind] = gm
            return run(gm)

        return keep

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return aot_module_simplified(
            gm,
            example_inputs,
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            partition_fn=partition,
            keep_inference_input_mutations=True,
        )

    return backend


def partitioned(policy: str, **kwargs: Any) -> Partitioner:
    return Partitioner(policy=policy, strict=True, **kwargs)


def gradients(run: Any, model: nn.Module, *args: Any, seed: int = 3) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = run(*args)
    loss = out[0] if isinstance(out, tuple) else out
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert abs(ours[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert ours[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def assert_same_bits(ours: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == expected[0] and ours[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0 and torch.equal(ours[1][name], gradient), name


def code_of_inductor(
    model: nn.Module, partitioner: Partitioner, tokens: Tensor
) -> tuple[tuple[float, dict[str, Tensor]], list[str]]:
    """Loss and gradients of a step whose halves Inductor compiles anew, and their code. Each operator rounds."""

    def step() -> tuple[float, dict[str, Tensor]]:
        torch._dynamo.reset()
        patches = {"custom_partitioner_fn": partitioner, "emulate_precision_casts": True}
        compiled = torch.compile(model, backend=lambda gm, xs: compile_fx(gm, xs, config_patches=patches))
        return gradients(compiled, model, tokens)

    with torch._inductor.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        return run_and_get_code(step)
