"""Linear layers of a loaded model in 4 bits, the base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), or in 8.

transformers quantises while it reads a checkpoint. This does the same to a model that exists already: one with random
weights, or one that was read from a format that transformers does not quantise from. The file needs torch, transformers
and bitsandbytes only, so that a benchmark can load it into another system's process by its path.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

Model = TypeVar("Model", bound=nn.Module)


def quantise_nf4(
    model: Model,
    *,
    compute_dtype: torch.dtype,
    skip: Sequence[str] = ("lm_head",),
    double_quant: bool = True,
    make: Callable[[nn.Linear], object] | None = None,
) -> Model:
    """Replace linear layers by bitsandbytes' ``Linear4bit``, in place and one after the other.

    The model becomes what loading it with a ``BitsAndBytesConfig`` gives, also to PEFT, ``Trainer`` and
    ``save_pretrained``. Weights are quantised where they are, and each is freed before the next: at most one of them is
    held in both forms.

    Args:
        model: its ``nn.Linear`` layers are replaced, except for the output head, for layers that share their weight
            with another module, and for ``skip``. All else keeps its dtype.
        compute_dtype: of the unpacked weights and of the products with them.
        skip: names of modules to leave as they are, with all that they contain: "lm_head" wherever it stands, or a path
            such as "model.layers.0".
        double_quant: quantise the scales of the blocks too, which saves 0.37 bits per weight.
        make: called with each layer before it is quantised, to give it the weights that it does not have yet.

    Returns:
        the same model.

    Raises:
        ImportError: without bitsandbytes.
        ValueError: when there is nothing to quantise, or the model has adapters, which would be quantised as well.
    """

    def quantised(layer: nn.Linear) -> nn.Module:
        if make is not None:
            make(layer)
        return _quantised(layer, compute_dtype, double_quant)

    kept = _replaced(model, skip, quantised)
    if isinstance(model, PreTrainedModel):
        four_bits: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
        }
        _declare(model, BitsAndBytesConfig(**four_bits, llm_int8_skip_modules=kept))
    return model


def quantise_int8(model: Model, *, skip: Sequence[str] = ("lm_head",)) -> Model:
    """Replace linear layers by 8-bit ones (:mod:`.int8`), in place; all else as :func:`quantise_nf4` does."""

    def quantised(layer: nn.Linear) -> nn.Module:
        from .int8 import int8_linear

        return int8_linear(layer)

    kept = _replaced(model, skip, quantised)
    if isinstance(model, PreTrainedModel):
        _declare(model, BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept))
    return model


def _replaced(model: nn.Module, skip: Sequence[str], quantised: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Replace linear layers one after the other; returns the names of modules that stay as they are."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("quantised weights need bitsandbytes: pip install bitsandbytes")
    if hasattr(model, "peft_config"):
        raise ValueError("the model has adapters already: quantise it first, then add them")
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    kept = {name for name in linear if any(f".{part}." in f".{name}." for part in skip)} | set(_shared(model))
    chosen = [name for name in linear if name not in kept]
    if not chosen:
        raise ValueError(f"nothing to quantise: of {len(linear)} linear layers {len(kept)} are to stay as they are")
    for name in chosen:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if torch.cuda.is_initialized():
            # Else packed weights would settle where unpacked ones were freed, and hold all of that memory: 8B in NF4
            # left 15.8 GiB reserved for 5.4, in holes too small for anything that a step makes.
            torch.cuda.empty_cache()
        model.set_submodule(name, quantised(layer))
        del layer
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return sorted({*skip, *kept})


def _shared(model: nn.Module) -> Iterator[str]:
    """Names of the output head, and of modules whose weight another module has too."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(weight, []).append(name)
        if head is not None and module is head:
            yield name
    yield from (name for names in owners.values() if len(names) > 1 for name in names)


def _quantised(layer: nn.Linear, compute_dtype: torch.dtype, double_quant: bool) -> nn.Module:
    from bitsandbytes import nn as bnb

    nf4: dict[str, Any] = {"compress_statistics": double_quant, "quant_type": "nf4"}
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    # On the meta device nothing is allocated, and nothing initialised, that the next lines replace.
    new = bnb.Linear4bit(*sizes, compute_dtype=compute_dtype, device="meta", **nf4)
    packed: Any = bnb.Params4bit
    new.weight = packed(layer.weight.data, requires_grad=False, module=new, **nf4).to(layer.weight.device)
    if layer.bias is not None:
        # In the dtype to which the layer would convert it at its first call, which compilers do not follow.
        new.bias = nn.Parameter(layer.bias.data.to(compute_dtype), requires_grad=False)
    return new.train(layer.training)


def _declare(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Leave the marks by which PEFT, ``Trainer`` and ``save_pretrained`` know a quantised model."""
    quantiser = AutoHfQuantizer.from_config(config)
    marks = {"hf_quantizer": quantiser, "is_quantized": True, "quantization_method": config.quant_method}
    for name, mark in marks.items():
        setattr(model, name, mark)
    quantiser.postprocess_model(model)
