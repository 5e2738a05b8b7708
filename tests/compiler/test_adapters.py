"""Adapters' gradients against float64, in both precision regimes, on frozen weights in bfloat16 and in NF4."""

from __future__ import annotations

import contextlib
import copy
from statistics import median
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from unsloth.compiler.options import Options
from unsloth.compiler.report import GraphReport
from unsloth.compiler.run import compiled
from unsloth.kernels import logit_chunks
from unsloth.models import presets
from unsloth.models.quantise import quantise_nf4
from unsloth.runtime.causal_lm import causal_lm_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(weights: str, regime: str, **sizes: int) -> nn.Module:
    """A small Llama in bfloat16 with random adapters: in bfloat16 too ("uniform"), or in float32 ("autocast")."""
    shape = presets.config("tiny-llama")
    shape.update(sizes)
    shape.intermediate_size = 192  # bitsandbytes on a CPU unpacks rows wrongly that are no multiple of 64 long
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).to(DEVICE)
    if weights == "nf4":
        model = quantise_nf4(model, compute_dtype=torch.bfloat16)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config, autocast_adapter_dtype=regime == "autocast").train()


def in_float64(model: nn.Module) -> nn.Module:
    """The same model, its numbers taken for exact."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(weight.double(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(exact.get_submodule(parent), child, linear)
    return exact.double()


def quantile(errors: list[float], share: float = 0.95) -> float:
    return sorted(errors)[int(share * len(errors))]


def gradients(run: Any, model: nn.Module, regime: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 250, (2, 24), generator=generator).to(DEVICE)
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16) if regime == "autocast" else contextlib.nullcontext():
        loss = run(model, {"input_ids": ids, "use_cache": False}, ids).loss
    loss.backward()
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("regime", ["uniform", "autocast"])
@pytest.mark.parametrize("weights", ["bfloat16", "nf4"])
def test_every_adapter_is_as_close_to_float64_as_eager(weights: str, regime: str) -> None:
    model = adapted(weights, regime)
    exact = in_float64(model)
    reports: list[GraphReport] = []
    ours = compiled(causal_lm_step, Options(strict=True, lowering="eager", logits="drop"), reports)
    errors: dict[str, list[float]] = {"ours": [], "eager": []}
    for seed in range(48):  # a median of fewer moves by more than the bar
        truth = gradients(causal_lm_step, exact, "uniform", seed)
        assert len(truth) == 2 * 7 * 2 and all(g.norm() > 0 for g in truth.values())  # A and B, 7 linears, 2 layers
        for system, run in (("ours", ours), ("eager", causal_lm_step)):
            found = gradients(run, model, regime, seed)
            assert found.keys() == truth.keys()
            errors[system] += [float((found[n] - truth[n]).norm() / truth[n].norm()) for n in truth]
    assert median(errors["ours"]) <= 1.1 * median(errors["eager"])
    # Where a gradient nearly vanishes, either is far off by chance: not the maximum.
    assert quantile(errors["ours"]) <= 1.2 * quantile(errors["eager"])
    (report,) = reports
    counts = {p.name: (len(p.rewritten), len(p.missed)) for p in report.passes}
    assert counts["lora_linear"] == (14, 0) and counts["linear_cross_entropy"] == (1, 0)
    assert counts["nf4"] == ((14, 0) if weights == "nf4" else (0, 0))


def largest_allocation(run: Any, model: nn.Module, ids: Tensor) -> int:
    """Bytes of the largest block that one training step asks for, whoever asks."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(model, {"input_ids": ids, "use_cache": False}, ids).loss.backward()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the host's allocations; benchmarks.step measures the device's peak")
def test_no_tensor_of_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, entropy and accuracy of 1024 tokens over 2048 words, forward and backward."""
    monkeypatch.setattr(logit_chunks, "CHUNK_BYTES", 1 << 18)
    model = adapted("bfloat16", "autocast", vocab_size=2048)
    ids = torch.randint(4, 250, (2, 512))
    whole = ids.numel() * 2048 * torch.bfloat16.itemsize
    run = compiled(causal_lm_step, Options(strict=True, lowering="eager", logits="drop"), [])
    with torch.autocast("cpu", torch.bfloat16):
        run(model, {"input_ids": ids, "use_cache": False}, ids)  # compiles
        assert largest_allocation(run, model, ids) < whole <= largest_allocation(causal_lm_step, model, ids)
