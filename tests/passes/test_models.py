"""On graphs of real models, made small by their configurations, every norm, rotation and gated unit is found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

from tests.tracing import trace
from unsloth.passes.recognise import glu, rms_norm, rope
from unsloth.passes.runner import run_passes

LAYERS = 2
RECOGNISERS = (rms_norm.RECOGNISER, rope.RECOGNISER, glu.RECOGNISER)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Norms per layer (one more follows the last), where they round in bfloat16, the rotation, and the gated unit.
EXPECTED = {
    "llama": (2, "round, then scale", "half rotation", "swiglu"),
    "mistral": (2, "round, then scale", "half rotation", "swiglu"),
    "qwen3": (4, "round, then scale", "half rotation", "swiglu"),
    "phi3": (2, "round, then scale", "half rotation", "swiglu"),
    "gemma2": (4, "zero-centred weight", "half rotation", "geglu tanh"),
    "olmo2": (4, "scale, then round", "half rotation", "swiglu"),
    "ernie4_5": (2, "round, then scale", "interleaved, a table per pair", "swiglu"),
    "glm": (2, "round, then scale", "interleaved, a table per pair", "swiglu"),
}


@pytest.mark.parametrize(
    ("architecture", "dynamic"),
    [*((name, False) for name in EXPECTED), ("qwen3", True), ("phi3", True), ("ernie4_5", True)],
)
def test_everything_is_found_and_rewritten(architecture: str, dynamic: bool) -> None:
    norms, rounding, rotation, unit = EXPECTED[architecture]
    model = _build(architecture).to(torch.bfloat16)
    _, reports = run_passes(_graph(model, dynamic), RECOGNISERS, strict=True)
    assert [site for report in reports for site in report.missed] == []
    details = Counter(site.detail for report in reports for site in report.rewritten)
    assert details == {rounding: norms * LAYERS + 1, rotation: LAYERS, unit: LAYERS}
    assert all(site.module and site.source_line for report in reports for site in report.rewritten)


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, reports = run_passes(_graph(_build("qwen3"), dynamic=False), RECOGNISERS, strict=True)
    assert [len(report.rewritten) for report in reports] == [4 * LAYERS + 1, LAYERS, LAYERS]


def test_layer_norms_are_no_misses() -> None:
    model = _build("cohere")  # written out, without bias
    _, reports = run_passes(_graph(model, dynamic=False), RECOGNISERS, strict=True)
    norms, rotations, units = reports
    assert not norms.rewritten and not norms.missed
    assert len(rotations.rewritten) == len(units.rewritten) == LAYERS


def _build(architecture: str) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(architecture, **SIZES)
    return transformers.AutoModelForCausalLM.from_config(config)


def _graph(model: torch.nn.Module, dynamic: bool) -> torch.fx.GraphModule:
    tokens = torch.randint(1, 64, (2, 12))
    if dynamic:
        torch._dynamo.mark_dynamic(tokens, 1)
    return trace(model, input_ids=tokens, labels=tokens, use_cache=False)
