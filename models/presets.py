"""Models by name: shapes as published, with random weights.

Two kinds: ``tiny-*`` models of two layers, for tests, demonstrations and questions to ``unsloth explain``; and the real
shapes that the benchmarks run (numbers from the models' ``config.json``). This file needs torch and transformers only,
so that a benchmark can load it into another system's process by its path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig

if TYPE_CHECKING:  # modelling takes two seconds to import, and shapes are asked for without it
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedModel

# Grouped-query attention, a head size that is not hidden / heads, and a vocabulary that is no power of two: what a
# pattern must not take for granted. 260 tokens are the bytes and four special ones.
_TINY = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-qwen3": {"model_type": "qwen3", **_TINY, "head_dim": 32},
    # Shorter than the sequences of the tests, so that the window matters.
    "tiny-mistral": {"model_type": "mistral", **_TINY, "sliding_window": 16},
    # Alternates windowed and full attention, and caps logits and scores.
    "tiny-gemma2": {"model_type": "gemma2", **_TINY, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    # Fused qkv and gate_up projections, half of each head rotated.
    "tiny-phi3": {
        "model_type": "phi3",
        **_TINY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "llama-1b": {  # meta-llama/Llama-3.2-1B
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
    },
    "llama-8b": {  # meta-llama/Llama-3.1-8B
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    "llama-70b": {  # meta-llama/Llama-3.1-70B
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    "qwen3-4b": {  # Qwen/Qwen3-4B
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    },
    "qwen3-30b-a3b-12": {  # Qwen/Qwen3-30B-A3B, 12 of its 48 layers: a mixture of experts that one card trains in bf16
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    },
}
"""Configuration by preset name; ``model_type`` chooses the architecture."""


def config(name: str) -> PreTrainedConfig:
    """The configuration of a preset; ``llama-8b@4`` is that of its shape with four layers.

    Raises:
        KeyError: for a name that is not in :data:`SHAPES`.
        ValueError: for a number of layers that is none.
    """
    shape, _, layers = name.partition("@")
    settings = dict(SHAPES[shape])
    if layers:
        settings["num_hidden_layers"] = int(layers)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def build(
    name: str | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of a preset's shape with random weights, in training mode.

    Weights are made on ``device`` and in ``dtype`` (an 8B model never exists in float32 or in host memory). Norm
    weights and biases, which initialisation would leave at one and zero, get noise as well: only then does a test
    notice when one of them is forgotten.

    Args:
        name: a key of :data:`SHAPES`, perhaps with a number of layers, as :func:`config` takes it; or any
            configuration, of a model of images and text as well.
        attn_implementation: "sdpa", "eager", …; None is transformers' own choice, which is "sdpa" wherever the
            architecture has it (Gemma 2 caps its scores and has not).
        seed: of the weights; the caller's random state is left as it was.

    Raises:
        KeyError: for a name that is not in :data:`SHAPES`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    settings = config(name) if isinstance(name, str) else name
    kind = AutoModelForImageTextToText if hasattr(settings, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng(devices=_cuda_index(device)), torch.device(device):
        torch.manual_seed(seed)
        model = kind.from_config(settings, dtype=dtype, attn_implementation=attn_implementation)
        for parameter in model.parameters():
            _with_noise(parameter)
    return model.train()


def build_packed(
    name: str,
    pack: Callable[[PreTrainedModel, Callable[[nn.Linear], object]], object],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A model as :func:`build` makes it, whose linear layers get their weights one by one and are packed at once.

    So weights that do not fit the device can be packed there (70B in bf16 are 131 GiB, in NF4 35).

    Args:
        pack: called with the model, on the meta device but for what is no linear layer, and with what gives one of its
            linear layers random weights on ``device``; packs each before it goes on to the next
            (:func:`.quantise.quantise_nf4`).
        seed: of the weights; the caller's random state is left as it was.

    Raises:
        KeyError: for a name that is not in :data:`SHAPES`.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(name), dtype=dtype)

    @torch.no_grad()
    def make(module: nn.Module) -> None:
        module.to_empty(device=device, recurse=False)
        with torch.device(device):
            model._init_weights(module)
            for parameter in module.parameters(recurse=False):
                _with_noise(parameter)

    with torch.random.fork_rng(devices=_cuda_index(device)):
        torch.manual_seed(seed)
        for module in model.modules():
            if type(module) is not nn.Linear or module is model.get_output_embeddings():
                make(module)
        model.tie_weights()
        pack(model, make)
    return model.train()


@torch.no_grad()
def _with_noise(parameter: nn.Parameter) -> None:
    if parameter.dim() == 1:
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _cuda_index(device: str | torch.device) -> list[int]:
    """Devices whose random state building touches, as ``fork_rng`` wants them."""
    device = torch.device(device)
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
