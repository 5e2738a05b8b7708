"""A causal language model and its tokenizer by name: a preset, a folder, a GGUF file, or an id on the hub."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import gguf
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)

from . import presets
from .adapters import load_adapter, with_lora
from .parts import outer_parts
from .processor import has_processor
from .source import ModelError, Source, explained, locate, missing_weights, pickles
from .tokenizer import load_tokenizer

__all__ = ["ModelError", "load", "load_model", "load_tokenizer", "random_batch", "with_lora"]


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantise: Literal["nf4", "int8"] | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    attn_implementation: str | None = None,
    random_weights: bool = False,
    images: bool | None = None,
) -> nn.Module:
    """Load a model for training, in training mode.

    What is on this machine is asked first: presets, then folders and files, then the hub's cache, then the hub.

    Args:
        name: a key of :data:`~unsloth.models.presets.SHAPES`, which has random weights; a folder as ``save_pretrained``
            leaves it, of a model or of an adapter (its base model is loaded too); a ``*.gguf`` file; or a hub id.
        dtype: of the weights; with ``quantise`` of what is not quantised, and of the arithmetic.
        device: where the model goes.
        quantise: "nf4" holds the linear layers of the blocks in 4 bits with double quantisation (QLoRA, Dettmers et al.
            2023, arXiv:2305.14314); "int8" in 8 (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339), see :mod:`.int8`.
            A checkpoint that is quantised already stays as it is.
        gguf_file: the GGUF file in that folder or hub repository. GGUF weights are dequantised to ``dtype``.
        trust_remote_code: run the Python code that a checkpoint brings along. Never on unless asked for.
        revision: branch, tag or commit on the hub.
        token: for private and gated hub repositories.
        attn_implementation: "sdpa", "eager", …; None is transformers' own choice.
        random_weights: accept a folder with a configuration and no weights, and make them up.
        images: load the class that takes images. None does where there is no other, or where ``name`` is an adapter
            with a processor beside it. Quantised, such a model keeps its towers and projectors as they are: they are
            small, and what they lose by it is large.

    Returns:
        the model; a ``PeftModel`` with trainable adapters when ``name`` is an adapter.

    Raises:
        ModelError: saying what was looked for, and what is missing or cannot be read.
    """
    if quantise not in (None, "nf4", "int8"):
        raise ModelError(f"cannot quantise to {quantise!r}: 'nf4' and 'int8' are what there is")
    source = locate(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code, revision=revision, token=token)
    settings: dict[str, Any] = {"dtype": dtype, "device": torch.device(device), "quantise": quantise}
    if source.adapter:
        base = load_model(
            source.base_model,
            **settings,
            trust_remote_code=trust_remote_code,
            token=token,
            attn_implementation=attn_implementation,
            images=images or has_processor(source) or None,
        )
        return load_adapter(base, source)
    chosen: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with explained(name):
        if images and (source.folder is None or source.gguf):
            raise ModelError(f"{name!r} takes no images")
        if source.folder is None:
            model = presets.build(name, dtype=dtype, device=device, **chosen)
        elif source.gguf:
            model = _from_gguf(source, dtype, torch.device(device), **chosen)
        elif random_weights and missing_weights(source.folder) == ["model.safetensors"] and not pickles(source.folder):
            model = _from_config(source, dtype, torch.device(device), trust_remote_code, images, **chosen)
        else:
            model = _from_folder(source, **settings, trust_remote_code=trust_remote_code, images=images, **chosen)
        if quantise and not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
            from .quantise import quantise_int8, quantise_nf4

            kept = ("lm_head", *outer_parts(model))
            model = (
                quantise_nf4(model, compute_dtype=dtype, skip=kept)
                if quantise == "nf4"
                else quantise_int8(model, skip=kept)
            )
        elif getattr(model, "is_loaded_in_8bit", False):
            from .int8 import freeze_int8

            freeze_int8(model)
    _stay_trainable(model)
    return model.train()


def load(name: str, **settings: Any) -> nn.Module:
    """:func:`load_model` for questions about a model's step, which a folder without weights can answer as well."""
    return load_model(name, **settings, random_weights=True)


def random_batch(model: nn.Module, batch: int, seq: int, *, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one training step on random tokens.

    Returns:
        ``input_ids`` and ``labels``, the same int64 [batch, seq] on the model's device, and ``use_cache=False``.
    """
    vocabulary = model.config.get_text_config().vocab_size  # pyright: ignore
    generator = torch.Generator().manual_seed(seed)
    ids: Tensor = torch.randint(vocabulary, (batch, seq), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _from_folder(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantise: str | None,
    trust_remote_code: bool,
    images: bool | None,
    **chosen: Any,
) -> PreTrainedModel:
    missing = missing_weights(source.files)
    if missing and (unsafe := pickles(source.files)):
        raise ModelError(
            f"{source.name!r} holds its weights as pickle ({unsafe[0]}), which can run any code when it is read. "
            "Where you trust it, convert it: AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)"
            ".save_pretrained(new_folder)"
        )
    if missing:
        raise ModelError(f"{source.name!r} lacks weights: {', '.join(missing)}")
    config = AutoConfig.from_pretrained(source.files, trust_remote_code=trust_remote_code)
    reader = _reader(config, images, source.name)
    settings: dict[str, Any] = dict(chosen)
    if method := getattr(config, "quantization_config", None):
        method = method if isinstance(method, dict) else method.to_dict()
        if quantise and not method.get("load_in_4bit" if quantise == "nf4" else "load_in_8bit"):
            raise ModelError(f"{source.name!r} is quantised already, by {method.get('quant_method')}: load it as it is")
    elif quantise:
        four_bits: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        given: dict[str, Any] = four_bits if quantise == "nf4" else {"load_in_8bit": True}
        if reader is AutoModelForImageTextToText:
            given["llm_int8_skip_modules"] = _unquantised(config)
        settings["quantization_config"] = BitsAndBytesConfig(**given)
    model = _complete(
        source,
        dtype,
        device,
        # Quantisation happens on the device, weight by weight.
        device_map={"": device} if method or quantise else None,
        reader=reader,
        config=config,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    return _named(model, source.name)


def _from_gguf(source: Source, dtype: torch.dtype, device: torch.device, **chosen: Any) -> PreTrainedModel:
    # Left packed, which is the default on devices with a kernel for it, the weights could not be trained.
    packed = GgufConfig(dequantize=True)
    with _tensor_names_once():
        model = _complete(source, dtype, device, gguf_file=source.gguf, quantization_config=packed, **chosen)
    # They are ordinary weights now. As a quantised model it could neither be trained nor saved.
    if (quantiser := getattr(model, "hf_quantizer", None)) is not None:
        quantiser.remove_quantization_config(model)
    # The file's title stands there, by which nobody finds it again.
    return _named(model, str((source.files / str(source.gguf)).resolve()))


@contextmanager
def _tensor_names_once() -> Iterator[None]:
    """transformers has gguf name the tensors of every layer anew for each module: a third of what loading takes."""
    ask = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(ask)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = ask


def _from_config(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    images: bool | None,
    **chosen: Any,
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source.files, trust_remote_code=trust_remote_code)
    with device:
        return _reader(config, images, source.name).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **chosen
        )


def _reader(config: Any, images: bool | None, name: str) -> Any:
    """The class of transformers that reads a checkpoint of this configuration."""
    # Private to transformers, whose public lists are of names; asked for membership alone.
    takes_images = type(config) in AutoModelForImageTextToText._model_mapping
    if images and not takes_images:
        raise ModelError(f"{name!r} takes no images: it is a {config.model_type}")
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if images or (takes_images and not causal) else AutoModelForCausalLM


def _unquantised(config: Any) -> list[str]:
    """The head, towers and projectors of a model, by name; it is laid out without memory for that."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    head = model.get_output_embeddings()
    return [*(name for name, module in model.named_modules() if module is head), *outer_parts(model)]


def _complete(
    source: Source, dtype: torch.dtype, device: torch.device, reader: Any = AutoModelForCausalLM, **settings: Any
) -> PreTrainedModel:
    """``from_pretrained``, which by itself makes up the weights that it does not find."""
    loaded: Any = reader.from_pretrained(source.files, dtype=dtype, output_loading_info=True, **settings)
    model, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source.name!r} is no complete {type(model).__name__}: {len(absent)} weights are not in it, "
            f"such as {absent[0]}"
        )
    return model if settings.get("device_map") else model.to(device)


def _stay_trainable(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit layers as they are when the model is evaluated.

    On CPUs with bfloat16 instructions it would repack them at the first evaluation, for good, and a product with
    repacked weights has no gradient: training after that would go wrong without an error.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def _named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Have adapters and model cards refer to ``name`` as their base model."""
    model.name_or_path = model.config._name_or_path = name
    return model
