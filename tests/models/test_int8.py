"""8-bit weights: the products of the stored weights, in one graph, unpacked again for backward and never kept."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from tests.memory.test_plan import cut_model
from tests.models.test_load import logits
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled
from unsloth.models.adapters import add_lora
from unsloth.models.int8 import int8_linear
from unsloth.models.load import load_model, random_batch
from unsloth.models.source import ModelError
from unsloth.runtime.causal_lm import causal_lm_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unpacked(model: nn.Module, name: str) -> nn.Module:
    """The plain model with the weights that the 8-bit layers stand for, by bitsandbytes' own arithmetic."""
    plain: Any = load_model(name, device=DEVICE)
    for place, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
            plain.get_submodule(place).weight.data.copy_(weight)
    return plain


@pytest.fixture(params=["folder", "preset"])
def name(request, checkpoint) -> str:
    """Of a model; the two have other weights on a GPU, whose random numbers are others."""
    return str(checkpoint) if request.param == "folder" else "tiny-llama"


@pytest.fixture
def model(name: str) -> Any:
    return load_model(name, quantise="int8", device=DEVICE)


def test_the_products_are_those_of_the_stored_weights(model, name) -> None:
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert len(layers) == 2 * 7 and model.is_loaded_in_8bit and model.training
    assert {layer.weight.dtype for layer in layers} == {torch.int8} and type(model.lm_head) is nn.Linear
    exact, got = logits(load_model(name, device=DEVICE)), logits(model)
    assert 1e-4 < (got - exact).norm() / exact.norm() < 0.03  # 8 bits are no copy, and closer than 4
    torch.testing.assert_close(got, logits(unpacked(model, name)), rtol=1e-5, atol=1e-5)


def test_it_comes_back_from_the_disk(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    for quantise in (None, "int8"):
        again = load_model(str(tmp_path), quantise=quantise, device=DEVICE)
        torch.testing.assert_close(logits(again), logits(model))
    with pytest.raises(ModelError, match="is quantised already"):
        load_model(str(tmp_path), quantise="nf4")


def test_the_compiled_step_is_that_of_the_unpacked_model(model, name) -> None:
    def gradients(run: Any, base: nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        adapted = base if hasattr(base, "peft_config") else add_lora(base, rank=4, init_lora_weights=False)
        batch = random_batch(adapted, 2, 24)
        adapted.zero_grad()
        run(adapted, batch, batch.pop("labels")).loss.backward()
        return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reports: list[Any] = []
    truth = gradients(causal_lm_step, unpacked(model, name))
    ours = compiled(causal_lm_step, Options(strict=True, lowering="eager", logits="drop"), reports)
    found = gradients(ours, model)
    assert len(found) == len(truth) == 2 * 7 * 2
    for weight, gradient in truth.items():
        assert (found[weight] - gradient).norm() <= 1e-4 * gradient.norm(), weight
    (report,) = reports
    assert not torch._dynamo.utils.counters["graph_break"]
    assert {p.name: len(p.rewritten) for p in report.passes}["lora_linear"] == 14


def test_an_unpacked_weight_is_not_kept_for_backward() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained, self.frozen = nn.Linear(64, 64), int8_linear(nn.Linear(64, 256, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.frozen(self.trained(x)).square().sum()

    found = cut_model(Loss(), "keep", torch.randn(3, 64))
    outputs = next(n for n in found.forward.graph.nodes if n.op == "output").args[0]
    weights = [n for n in outputs if n.op != "placeholder" and tuple(n.meta["val"].shape) == (256, 64)]
    assert outputs and not weights


def test_a_bias_and_another_dtype() -> None:
    plain = nn.Linear(64, 96)
    layer, x = int8_linear(plain), torch.randn(2, 5, 64)
    assert (layer(x) - plain(x)).norm() < 0.02 * plain(x).norm()
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - plain(x)).norm() < 0.02 * plain(x).norm()
