"""The weights of a model with its adapters added, one after the other: W + B·A·scale, in float32, rounded once.

Nothing is changed in the model, and no second copy of it is made: a weight is computed when it is asked for, unpacked
from 4 or 8 bits if that is how it is held, and forgotten when it is written.

LoRA: Hu et al. 2021, arXiv:2106.09685; DoRA, m · (W + ΔW) / ‖W + ΔW‖ by rows: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from ..source import ModelError


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint.

    Attributes:
        name: as in the plain model's checkpoint.
        shape, dtype: known before it is computed.
        value: computes it, on the CPU, contiguous.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Merged:
    """A model without adapters and in 16 bits, not computed yet.

    Attributes:
        base: the transformers model inside, as it is: its weights are the unmerged ones.
        config: of the result: no quantisation, the dtype, whether head and embedding are one.
        weights: in the model's order; a tensor that two modules share is there once.
    """

    base: PreTrainedModel
    config: PreTrainedConfig
    weights: list[Weight]

    @property
    def bytes(self) -> int:
        return sum(weight.bytes for weight in self.weights)


@dataclass(frozen=True)
class _Part:
    """A weight of a module: where it comes from, so that shared ones are known, and how it is computed (float32)."""

    name: str
    source: tuple[int, ...]
    like: Tensor
    shape: tuple[int, ...]
    value: Callable[[], Tensor]


def merged(model: nn.Module, dtype: torch.dtype | None = None) -> Merged:
    """The model with its active adapters added to its weights.

    Args:
        model: a transformers model, with PEFT's LoRA or DoRA adapters or without; its weights may be in 4 or 8 bits.
        dtype: of the floating-point weights. None is what the model has where that is 16 bits, else bfloat16.

    Raises:
        ModelError: when there are adapters that cannot be added to weights.
    """
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"only transformers models are exported, and {type(base).__name__} is none")
    if dtype is None:
        dtype = base.dtype if base.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    parts = {part.name: part for part in _parts(base, "")}
    shared: dict[tuple[int, ...], str] = {}
    kept = [_weight(part, dtype) for part in parts.values() if shared.setdefault(part.source, part.name) == part.name]
    return Merged(base, _config(base, parts, dtype), list(_as_saved(base, kept)))


def _weight(part: _Part, dtype: torch.dtype) -> Weight:
    floating = part.like.is_floating_point() or _is_packed(part.like)
    target = dtype if floating else part.like.dtype

    def value() -> Tensor:
        with torch.no_grad():
            return part.value().to(target).cpu().contiguous()

    return Weight(part.name, part.shape, target, value)


# -- modules -----------------------------------------------------------------------------------------------------------


def _parts(module: nn.Module, name: str) -> Iterator[_Part]:
    if isinstance(module, ModulesToSaveWrapper):
        chosen = [a for a in module.active_adapters if a in module.modules_to_save]
        module = module.original_module if module.disable_adapters or not chosen else module.modules_to_save[chosen[0]]
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ModelError(f"{name} trains single tokens ({type(module).__name__}), which cannot be merged yet")
    if isinstance(module, BaseTunerLayer):
        yield from _adapted(module, name)
        return
    for own, parameter in _own(module):
        yield _Part(_join(name, own), _identity(parameter), parameter, _shape(parameter), _unpacked(module, parameter))
    for child, inner in module.named_children():
        yield from _parts(inner, _join(name, child))


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module saves of its own, as ``state_dict`` has it."""
    yield from ((n, p) for n, p in module._parameters.items() if p is not None)
    lost = module._non_persistent_buffers_set
    yield from ((n, b) for n, b in module._buffers.items() if b is not None and n not in lost)


def _adapted(layer: Any, name: str) -> Iterator[_Part]:
    """The weights of a layer with adapters."""
    base = layer.get_base_layer()
    if not isinstance(layer, LoraLayer):
        raise ModelError(f"{name} has adapters of the kind {type(layer).__name__}; LoRA and DoRA are merged")
    if not isinstance(base, (nn.Linear, nn.Embedding)) and "weight" not in base._parameters:
        raise ModelError(f"{name} has an adapter on a parameter of {type(base).__name__}, which cannot be merged yet")
    adapters = [] if layer.disable_adapters else [a for a in layer.active_adapters if a not in layer.merged_adapters]
    adapters = [a for a in adapters if a in layer.lora_A or a in layer.lora_embedding_A]
    for adapter in adapters:
        variant = layer.lora_variant.get(adapter)
        if variant is not None and not layer.use_dora.get(adapter):
            raise ModelError(f"{name} has a variant of LoRA, {type(variant).__name__}, which cannot be merged yet")
    biased = [a for a in adapters if layer.lora_bias.get(a)]
    for own, parameter in _own(base):
        unpacked = _unpacked(base, parameter)
        source, value = _identity(parameter), unpacked
        if own == "weight" and adapters:
            source, value = _identity(parameter, layer), _sum(layer, adapters, unpacked)
        elif own == "bias" and biased:
            source = _identity(parameter, layer)
            value = _with_bias(layer, biased, unpacked)
        yield _Part(_join(name, own), source, parameter, _shape(parameter), value)
    if biased and getattr(base, "bias", None) is None:
        raise ModelError(f"{name} has no bias, and its adapter has one: it cannot be merged into this architecture")


def _sum(layer: Any, adapters: list[str], unpacked: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def value() -> Tensor:
        weight = unpacked().float()
        for adapter in adapters:
            whole = weight + _delta(layer, adapter).to(weight.device).reshape(weight.shape)
            if layer.use_dora.get(adapter):
                # Rows are outputs; an embedding's outputs are its columns, and so are those of a transposed weight.
                rows = 0 if adapter in layer.lora_embedding_A or layer.fan_in_fan_out else 1
                magnitude = layer.lora_magnitude_vector[adapter].weight.float().reshape(-1).to(weight.device)
                factor = magnitude / whole.norm(dim=rows)
                whole = whole * (factor[None, :] if rows == 0 else factor[:, None])
            weight = whole
        return weight

    return value


def _delta(layer: Any, adapter: str) -> Tensor:
    """What an adapter adds to the weight, float32, in its layout."""
    scale = layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:
        first, second = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return (second.float() @ first.float()).T * scale
    first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if first.dim() > 2:  # convolutions
        return layer.get_delta_weight(adapter).float()
    delta = (second.float() @ first.float()) * scale
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def _with_bias(layer: Any, adapters: list[str], unpacked: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: unpacked().float() + sum(layer.lora_B[a].bias.float() * layer.scaling[a] for a in adapters)


# -- weights as they are held ------------------------------------------------------------------------------------------


def _is_packed(weight: Tensor) -> bool:
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def _shape(weight: Any) -> tuple[int, ...]:
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def _unpacked(module: Any, weight: Any) -> Callable[[], Tensor]:
    kind = type(weight).__name__
    if kind == "Params4bit":

        def four_bits() -> Tensor:
            from bitsandbytes import functional as bnb

            data, state = weight.data, weight.quant_state
            if getattr(state, "packing_format_for_cpu", False):  # what it does to weights that were evaluated there
                data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
            return bnb.dequantize_4bit(data, state)

        return four_bits
    if kind == "Int8Params":

        def eight_bits() -> Tensor:
            maxima = module.state.SCB if getattr(module.state, "SCB", None) is not None else weight.SCB
            return weight.data.float() * (maxima.to(weight.device)[:, None] / 127)

        return eight_bits
    if not weight.is_floating_point() and kind != "Tensor" and kind != "Parameter":
        raise ModelError(f"weights of the kind {kind} cannot be unpacked: load the model in 16, 8 or 4 bits")
    if weight.device.type == "meta":
        raise ModelError("the model has weights without values (on the meta device): load it whole")
    return lambda: weight.detach()


def _identity(weight: Tensor, layer: Any = None) -> tuple[int, ...]:
    return (id(weight),) if layer is None else (id(weight), id(layer))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def _config(base: Any, parts: dict[str, _Part], dtype: torch.dtype) -> PreTrainedConfig:
    config = copy.deepcopy(base.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    pairs = [(parts.get(a), parts.get(b)) for a, b in base.all_tied_weights_keys.items()]
    apart = [a for a, b in pairs if a is not None and b is not None and a.source != b.source]
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        each.dtype = dtype
        if apart:  # one of the two has an adapter of its own
            each.tie_word_embeddings = False
    return config


def _as_saved(base: Any, weights: list[Weight]) -> Iterable[Weight]:
    """Under the names, and in the pieces, that checkpoints of this architecture have."""
    if not get_model_conversion_mapping(base, add_legacy=False):
        return weights
    with torch.device("meta"):  # without the marks of quantisation, which would have the weights packed again
        plain = type(base)(_unquantised(base.config))
    by_name = {weight.name: weight for weight in weights}
    whole = set(revert_weight_conversion(plain, {w.name: _empty(w) for w in weights}))
    alone = {w.name: revert_weight_conversion(plain, {w.name: _empty(w)}) for w in weights}
    if {name for pieces in alone.values() for name in pieces} != whole:
        raise ModelError(f"checkpoints of {type(base).__name__} join several weights into one, which is not known here")

    def pieces(source: str) -> Iterator[Weight]:
        held: dict[str, Tensor] = {}  # the pieces of one weight are asked for one after the other

        def value(name: str) -> Tensor:
            if name not in held:
                held.update(revert_weight_conversion(plain, {source: by_name[source].value()}))
            return held.pop(name).contiguous()

        for name, piece in alone[source].items():
            yield Weight(name, tuple(piece.shape), piece.dtype, lambda name=name: value(name))

    return [piece for source in alone for piece in pieces(source)]


def _empty(weight: Weight) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def _unquantised(config: Any) -> Any:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
