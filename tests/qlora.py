"""A Llama in miniature with NF4 weights and LoRA adapters; and the same model in float64, its weights unpacked."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from unsloth.models.quantise import quantise_nf4

LAYERS = 2
PRODUCTS = 7
"""4-bit products per layer."""

# Rows of a multiple of 64: elsewhere bitsandbytes 0.50 unpacks wrongly on the CPU (tests/kernels/test_nf4.py).
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def qlora(
    dtype: torch.dtype = torch.float32,
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
    seed: int = 0,
    **config: Any,
) -> nn.Module:
    """A PEFT model in training mode; ``compute_dtype`` and ``adapter_dtype`` are ``dtype`` if not given."""
    model = quantise_nf4(_base(dtype, seed, config), compute_dtype=compute_dtype or dtype, double_quant=double_quant)
    return _adapted(model, adapter_dtype or dtype, seed)


def in_float64(model: nn.Module, **config: Any) -> nn.Module:
    """The same model with ordinary weights, all of them float64."""
    truth = _adapted(_base(torch.float64, 0, config), torch.float64, 0)
    values = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        values[name] = (bnb.functional.dequantize_4bit(parameter.data, state) if state else parameter.data).double()
    truth.load_state_dict(values, strict=True)
    return truth


def batch(length: int = 9) -> dict[str, Any]:
    """Keyword arguments of a training step."""
    ids = torch.randint(1, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def adapter_gradients(run: Any, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient of every adapter weight after one step; none of them is zero."""
    model.zero_grad(set_to_none=True)
    run(**inputs).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 * PRODUCTS * LAYERS and all(g.norm() > 0 for g in gradients.values())
    return gradients


def _base(dtype: torch.dtype, seed: int, config: dict[str, Any]) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.for_model("llama", **{**SIZES, **config})
    return transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)


def _adapted(model: transformers.PreTrainedModel, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed + 1)
    # B random instead of zero: only then has A a gradient.
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return adapted.train()
