"""Which architectures a GGUF file can hold, and what it says of each: what llama.cpp computes is decided by these keys.

Names of tensors are gguf's own (``TensorNameMap``). What a table here adds is what differs between a checkpoint of
transformers and what llama.cpp expects: the order of rows that are rotated, norms that count from zero, and settings
that llama.cpp takes for granted, which are compared, because a file that says less than the model has is a wrong model.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from ..source import ModelError

logger = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Architecture:
    """How a model type of transformers becomes one of llama.cpp's architectures.

    Attributes:
        arch: gguf's.
        activation: the only one that llama.cpp has there.
        interleaved: q and k have their rows in the order of Meta's own checkpoints, in which the two numbers that are
            rotated together stand side by side; transformers has them half a head apart.
        zero_centred: norms multiply by 1 + weight; the file holds 1 + weight.
        more: writes what this one has besides, and refuses what it cannot say.
    """

    arch: gguf.MODEL_ARCH
    activation: str = "silu"
    interleaved: bool = False
    zero_centred: bool = False
    more: Callable[[gguf.GGUFWriter, Any], None] = lambda writer, config: None

    @property
    def name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]


def _mistral(writer: gguf.GGUFWriter, config: Any) -> None:
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        logger.warning(
            "GGUF has no sliding window for Mistral: beyond %d tokens llama.cpp computes something else", window
        )


def _qwen(writer: gguf.GGUFWriter, config: Any) -> None:
    if getattr(config, "use_sliding_window", False):
        raise ModelError("GGUF has no sliding window for Qwen, and use_sliding_window is on")


def _gemma(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    # llama.cpp scales scores by the head's size, except for the one shape of Gemma 2 and one of Gemma 3 with this.
    scalar, known = config.query_pre_attn_scalar, {head_dim(config)}
    if config.num_hidden_layers in (46, 62):
        known = {config.hidden_size // config.num_attention_heads}
    if scalar not in known:
        raise ModelError(f"GGUF cannot say query_pre_attn_scalar {scalar}: llama.cpp takes {known.pop()} here")


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    _gemma(writer, config)
    _every(config, 2)
    for setting, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        value = getattr(config, setting)
        if value is None:
            raise ModelError(f"llama.cpp's Gemma 2 always caps, and {setting} is None")
        add(value)


def _gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    _gemma(writer, config)
    _every(config, 6)
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    if local != 10_000:
        raise ModelError(f"GGUF cannot say that windowed layers rotate by theta {local}: llama.cpp takes 10000")
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        raise ModelError("llama.cpp's Gemma 3 caps nothing, and logit softcapping is on")


def _every(config: Any, period: int) -> None:
    """One layer of ``period`` attends to everything."""
    expected = ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(period)]
    layers = list(config.layer_types)
    if layers != [expected[i % period] for i in range(len(layers))]:
        raise ModelError(f"llama.cpp has a full layer after {period - 1} windowed ones here, and layer_types differ")


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True, more=_mistral),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, more=_qwen),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, more=_qwen),
    "gemma2": Architecture(gguf.MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", zero_centred=True, more=_gemma2),
    "gemma3_text": Architecture(gguf.MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", zero_centred=True, more=_gemma3),
}
"""By the ``model_type`` of transformers."""


def architecture(config: Any) -> Architecture:
    """That of a model.

    Raises:
        ModelError: for one that is not in :data:`ARCHITECTURES`, or that computes what llama.cpp's does not.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"no GGUF of {config.model_type!r} models yet: {', '.join(ARCHITECTURES)} are known. What is missing is an "
            "entry in models/export/gguf_architectures.py: its keys, and how its weights differ from llama.cpp's. "
            "format: merged writes it as safetensors, from which llama.cpp's convert_hf_to_gguf.py makes a GGUF"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        raise ModelError(f"llama.cpp's {found.name} has the activation {found.activation}, and the model {activation}")
    return found


def write_settings(writer: gguf.GGUFWriter, config: Any, known: Architecture) -> Tensor | None:
    """Write a model's hyperparameters.

    Returns:
        the divisors of the rotation's frequencies, float32 [head_dim / 2], where it has them (Llama 3's scaling): a
        tensor of the file.

    Raises:
        ModelError: for what the file cannot say.
    """
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    known.more(writer, config)
    return _rotation(writer, config)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def changes(name: str, config: Any, known: Architecture) -> Change | None:
    """What becomes of a tensor's values on their way into the file; None leaves them."""
    layer = name.rpartition(".")[0]
    if known.interleaved and layer.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
        return lambda weight: interleave(weight, heads)
    if known.zero_centred and layer.endswith("norm"):
        return lambda weight: weight + 1
    return None


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to pairs: [heads · d, …] → the same shape.

    llama.cpp rotates numbers 2i and 2i+1 of a head of Llama together, transformers i and i + d/2.
    """
    paired = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)


def _rotation(writer: gguf.GGUFWriter, config: Any) -> Tensor | None:
    given = config.rope_parameters
    settings: dict[str, Any] = given.get("full_attention", given)  # Gemma 3 has them by the kind of layer
    writer.add_rope_freq_base(settings["rope_theta"])
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("llama.cpp rotates whole heads here, and partial_rotary_factor says otherwise")
    kind = settings.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
        return None
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(settings["factor"])
        length = settings.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(length)
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if settings.get(name) is not None:
                raise ModelError(f"{name} of the rotation's YaRN scaling has no key in GGUF that is written here")
        return None
    if kind == "llama3":
        return _llama3_divisors(settings, head_dim(config))
    raise ModelError(f"rope_type {kind!r} cannot be written into a GGUF: default, linear, yarn and llama3 can")


def _llama3_divisors(settings: dict[str, Any], dim: int) -> Tensor:
    """By what Llama 3.1 divides each frequency: 1 for short waves, ``factor`` for long ones, a blend in between.

    https://huggingface.co/meta-llama/Llama-3.1-8B, ``rope_scaling``.
    """
    factor, length = settings["factor"], settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    frequencies = settings["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    waves = 2 * math.pi / frequencies
    blend = ((length / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).float()
