"""SmolLM2-135M-Instruct with its first layers only: the real tokenizer, template and embedding, and quick to train."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unsloth.models.load import load_tokenizer
from unsloth.models.smollm2 import smollm2_gguf


def cut(folder: Path, layers: int = 2) -> Path:
    """Write the cut model as transformers saves models; returns its folder.

    transformers would unpack all 30 layers, which takes longer than the scripts that are run with two of them.
    """
    tokenizer = load_tokenizer(str(smollm2_gguf()))
    tensors = {t.name: t for t in gguf.GGUFReader(smollm2_gguf()).tensors}
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    weights = {}
    for name in model.state_dict():
        found = tensors.get(f"{names.get_name(name.removesuffix('.weight'))}.weight")
        if found is not None:  # the head is the embedding
            weights[name] = _halves(name, torch.tensor(gguf.dequantize(found.data, found.tensor_type)))
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    home = folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


def _halves(name: str, weight: Tensor) -> Tensor:
    """Rows of q and k as transformers has them: llama.cpp rotates neighbours, it the two halves of a head."""
    heads = 9 if "q_proj" in name else 3 if "k_proj" in name else None
    if heads is None:
        return weight
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
