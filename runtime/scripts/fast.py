"""``FastLanguageModel`` and ``FastModel``: the calls of scripts that were written for the Unsloth library.

The names are those of its public interface; behind them stand ordinary transformers and PEFT models, which get the
methods of :mod:`.saving`. :meth:`FastLanguageModel.from_pretrained` installs the names of arguments that TRL's trainers
had (:mod:`.old_names`), through which they compile the step; the model itself is not patched.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...models.adapters import add_lora
from ...models.load import load_model, load_tokenizer
from ...models.parts import outer_parts, targets
from ...models.presets import SHAPES
from ...models.source import ModelError, locate
from .generating import give_generation, note_support
from .old_names import explain_once, install
from .saving import give_methods

logger = logging.getLogger(__name__)

# What that interface also takes and this one does not do: accepted at the value that asks for nothing.
_NEUTRAL_LOADING = {"resize_model_vocab": None, "rope_scaling": None, "quantization_config": None, "qat_scheme": None}
_NEUTRAL_ADAPTING = {"layers_pattern": None, "loftq_config": {}, "qat_scheme": None, "target_parameters": None}
# Accepted at any value, and explained once.
_ENGINE = "fast_generate runs the model itself, in which there is nothing to prepare for it"
_WITHOUT_EFFECT = {
    **dict.fromkeys(("max_lora_rank", "float8_kv_cache", "disable_log_stats"), _ENGINE),
    **dict.fromkeys(("unsloth_vllm_standby", "fast_inference_kwargs"), _ENGINE),
    "random_state": "nothing is drawn while weights are read; get_peft_model has a random_state",
    "fix_tokenizer": "load_tokenizer sees to it that padding is not EOS",
    "use_exact_model_name": "the name is taken as it is given",
    "offload_embedding": "left to the memory planner",
    "unsloth_tiled_mlp": "left to the memory planner",
    "temporary_location": "nothing is spilled to the disk",
    "return_logits": "logits are there where they are asked for: options={'logits': 'keep'}",
    "auto_model": "the configuration says which class it is",
    "text_only": "a causal language model is what is loaded",
}
_SET_ASIDE = "_unsloth_compiled_call"


class FastLanguageModel:
    """Functions under one name; there are no instances."""

    _images: bool | None = None
    _load_tokenizer: Callable[..., Any] = staticmethod(load_tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        gguf_file: str | None = None,
        attn_implementation: str | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float | None = None,
        **others: Any,
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer, ready for :meth:`get_peft_model` or for training all parameters.

        Args:
            model_name: preset, folder (of a model or an adapter), GGUF file or hub id, as
                :func:`~unsloth.models.load.load_model` takes it.
            max_seq_length: recorded as ``model.max_seq_length``; positions are not rescaled to reach it.
            dtype: None is bfloat16 where the device computes in it, float16 on older GPUs, float32 on a CPU.
            load_in_4bit: QLoRA: the linear layers of the blocks in NF4. None is what scripts rely on: yes on a GPU,
                unless another precision or ``full_finetuning`` is asked for, the model is a preset, or quantised
                already; no on a CPU.
            load_in_8bit: in 8 bits instead.
            load_in_16bit: in neither.
            full_finetuning: all parameters are trained, and :meth:`get_peft_model` leaves the model alone. bfloat16
                rounds small updates away: with ``dtype=torch.float32`` and the trainer's ``bf16=True`` it does not.
            device_map: None, "auto" and "sequential" are this process's GPU, or the CPU where there is none; otherwise
                one device. A model is not spread over several.
            use_gradient_checkpointing: recorded and left to the memory planner, which decides what is recomputed.
            token, trust_remote_code, revision, gguf_file, attn_implementation: as
                :func:`~unsloth.models.load.load_model` takes them.
            fast_inference: look at once whether ``model.fast_generate``, which is there in any case, can do without
                ``generate`` of transformers, and say why not.
            gpu_memory_utilization: share of the memory then free that its keys and values may take while it runs.

        Returns:
            the model, in training mode, and its tokenizer.

        Raises:
            ModelError: when the model cannot be loaded so.
            TypeError: for an argument that does not exist or asks for what is not there.
        """
        _refuse(others, _NEUTRAL_LOADING, FastLanguageModel.from_pretrained)
        asked = [f"load_in_{n}bit" for n, on in ((4, load_in_4bit), (8, load_in_8bit), (16, load_in_16bit)) if on]
        if len(asked) > 1:
            raise ModelError(f"{' and '.join(asked)} cannot both be True")
        if (load_in_4bit or load_in_8bit) and full_finetuning:
            bits = 4 if load_in_4bit else 8
            raise ModelError(f"{bits}-bit weights cannot be trained: full_finetuning needs load_in_{bits}bit=False")
        device = _one_device(device_map)
        where = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code, "revision": revision, "token": token}
        if load_in_4bit is None:
            plain = not (asked or full_finetuning or model_name in SHAPES)
            load_in_4bit = plain and device.type == "cuda" and not _is_quantised(model_name, where)
        tokenizer = cls._load_tokenizer(model_name, **where)
        model = load_model(
            model_name,
            dtype=_dtype(dtype, device),
            device=device,
            quantise="nf4" if load_in_4bit else "int8" if load_in_8bit else None,
            attn_implementation=attn_implementation,
            images=cls._images,
            **where,
        )
        install()
        _agree(model, getattr(tokenizer, "tokenizer", tokenizer), model_name)
        _check_length(model, max_seq_length, model_name)
        if fast_inference:
            note_support(model)
        give_generation(model, tokenizer)
        return _noted(
            model,
            max_seq_length=max_seq_length,
            full_finetuning=full_finetuning,
            use_gradient_checkpointing=use_gradient_checkpointing,
            gpu_memory_utilization=gpu_memory_utilization,
        ), tokenizer

    @staticmethod
    def get_peft_model(
        model: nn.Module,
        r: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Sequence[int] | int | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        **others: Any,
    ) -> nn.Module:
        """Freeze the model and put LoRA adapters on it; see :func:`~unsloth.models.adapters.add_lora`.

        Args:
            r, lora_alpha, lora_dropout, bias, use_rslora, use_dora, layers_to_transform, init_lora_weights: as in PEFT.
            target_modules: names of layers, or "all-linear" for every linear one but the head. "embed_tokens" and
                "lm_head" among them are trained whole, as ``modules_to_save``.
            modules_to_save: layers that are trained whole and saved with the adapter.
            use_gradient_checkpointing: recorded and left to the memory planner.
            random_state: seed of the adapters' start.
            max_seq_length: recorded, where given.
            autocast_adapter_dtype: adapters in float32 on a half-precision model, as PEFT has it.

        Raises:
            ModelError: for a target that the model has not, and for what PEFT refuses.
            TypeError: for an argument that does not exist or asks for what is not there.
        """
        _refuse(others, _NEUTRAL_ADAPTING, FastLanguageModel.get_peft_model)
        if getattr(model, "full_finetuning", False):
            logger.warning("the model was loaded with full_finetuning=True: it gets no adapters")
            return model
        if not isinstance(target_modules, str):
            # By these names such scripts train the whole layers.
            whole = [name for name in target_modules if name in ("embed_tokens", "lm_head")]
            target_modules = [name for name in target_modules if name not in whole]
            modules_to_save = [*dict.fromkeys([*(modules_to_save or ()), *whole])] or None
        adapted = add_lora(
            model,
            rank=r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            target_modules=target_modules,
            seed=random_state,
            autocast_adapter_dtype=autocast_adapter_dtype,
            bias=bias,
            use_rslora=use_rslora,
            layers_to_transform=layers_to_transform,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
        )
        length = getattr(model, "max_seq_length", None) if max_seq_length is None else max_seq_length
        give_generation(adapted)
        return _noted(adapted, max_seq_length=length, use_gradient_checkpointing=use_gradient_checkpointing)

    @staticmethod
    def for_training(model: nn.Module, use_gradient_checkpointing: bool | str = "unsloth") -> nn.Module:
        """``model.train()``; checkpointing is recorded and left to the memory planner."""
        for module in model.modules():
            if (compiled := module.__dict__.pop(_SET_ASIDE, None)) is not None:
                module._compiled_call_impl = compiled
        return _noted(model.train(), use_gradient_checkpointing=use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: nn.Module) -> nn.Module:
        """``model.eval()``: dropout off. ``generate`` is transformers' own, and runs uncompiled.

        A body that a trainer has compiled in place would be compiled again for the length of every answer.
        """
        for module in model.modules():
            if (compiled := module._compiled_call_impl) is not None:
                module.__dict__[_SET_ASIDE], module._compiled_call_impl = compiled, None
        return model.eval()


class FastModel(FastLanguageModel):
    """:class:`FastLanguageModel` with the arguments that say which parts of a model get adapters."""

    @staticmethod
    def get_peft_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        model: nn.Module,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        *args: Any,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **settings: Any,
    ) -> nn.Module:
        """As there.

        Args:
            finetune_attention_modules, finetune_mlp_modules: False leaves those layers without adapters. Attention is
                what counts heads, and all other layers of a block, and the projector's, are the latter.
            finetune_language_layers, finetune_vision_layers: likewise of a model that takes images, whose vision layers
                are those of its towers and projectors; a language model has the former only. See
                :mod:`unsloth.models.parts`.
            target_modules: None takes all linear layers that those leave; names are taken as they are.

        Raises:
            ModelError: when nothing is left to train.
        """
        whole = finetune_language_layers and finetune_attention_modules and finetune_mlp_modules
        if target_modules in (None, "all-linear"):
            target_modules = "all-linear"
            if not whole or outer_parts(model):
                target_modules = targets(
                    model,
                    vision=finetune_vision_layers,
                    language=finetune_language_layers,
                    attention=finetune_attention_modules,
                    mlp=finetune_mlp_modules,
                    # PEFT does not take them beside an expression.
                    layers=settings.pop("layers_to_transform", None),
                )
        elif not (finetune_attention_modules or finetune_mlp_modules):
            raise ModelError("the finetune_ arguments leave nothing to train")
        return FastLanguageModel.get_peft_model(model, r, target_modules, *args, **settings)


def is_bfloat16_supported() -> bool:
    """Whether this machine computes in bfloat16: GPUs since Ampere do, and CPUs."""
    return default_dtype("cuda") == torch.bfloat16 if torch.cuda.is_available() else True


is_bf16_supported = is_bfloat16_supported


def PatchDPOTrainer() -> None:
    """What :meth:`FastLanguageModel.from_pretrained` does as well; scripts call it first."""
    install()


def default_dtype(device: str | torch.device) -> torch.dtype:
    """What weights are held in when nothing is said: bfloat16, on older GPUs float16, on a CPU float32."""
    if torch.device(device).type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _dtype(given: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if given in (None, "auto"):
        return default_dtype(device)
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{given!r} is no dtype of weights: torch.bfloat16, torch.float16, torch.float32 or None")
    return dtype


def _one_device(device_map: Any) -> torch.device:
    """The device that a ``device_map`` comes down to."""
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ModelError(f"a model is not spread over several devices, which device_map={device_map} asks for")
        (device_map,) = places
    if device_map in (None, "auto", "sequential", "balanced"):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # One process per GPU, as torchrun starts them.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(f"there is no device {device_map!r}: {str(error).splitlines()[0]}") from error
    return device


def _is_quantised(name: str, where: dict[str, Any]) -> bool:
    """Whether a checkpoint (an adapter's base) says that its weights are quantised."""
    source = locate(name, **where)
    while source.adapter:
        source = locate(source.base_model, token=where["token"], trust_remote_code=where["trust_remote_code"])
    if source.folder is None or source.gguf:
        return False  # a GGUF's weights are unpacked while they are read
    return "quantization_config" in json.loads((source.files / "config.json").read_text(encoding="utf-8"))


def _agree(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """One vocabulary and one padding token for model and tokenizer."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer of {name!r} knows {len(tokenizer)} tokens and its embedding only {rows}")
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _check_length(model: Any, length: int, name: str) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        logger.warning(
            "max_seq_length %d is more than the %d positions that %s was made for; they are not rescaled",
            length,
            positions,
            name,
        )


def _noted(model: nn.Module, **settings: Any) -> nn.Module:
    """Keep settings where those scripts look for them, on the model as attributes; and the methods for saving."""
    for name, value in settings.items():
        setattr(model, name, value)
    return give_methods(model)


def _refuse(given: Mapping[str, Any], neutral: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Say what becomes of arguments that have no effect, and raise for those that would have had one."""
    known = {*inspect.signature(function).parameters, *neutral} - {"others"}
    for name, value in given.items():
        if name in neutral and (value == neutral[name] or value is None):
            continue
        if name in _WITHOUT_EFFECT:
            if value not in (None, False):
                explain_once(name, _WITHOUT_EFFECT[name])
            continue
        if name in neutral:
            raise TypeError(f"{function.__name__}: {name}={value!r} is not supported, only {neutral[name]!r}")
        close = difflib.get_close_matches(name, sorted(known), n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else f"; arguments are {', '.join(sorted(known))}"
        raise TypeError(f"{function.__name__} takes no argument {name!r}{suggestion}")
