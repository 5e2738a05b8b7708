"""LoRA adapters on a model (Hu et al. 2021, arXiv:2106.09685), by PEFT, with the targets checked first."""

from __future__ import annotations

import difflib
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .source import ModelError, Source, explained

logger = logging.getLogger(__name__)


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 3407,
    autocast_adapter_dtype: bool = True,
    **settings: Any,
) -> nn.Module:
    """Freeze the model and put trainable low-rank adapters on its layers: y = x·Wᵀ + x·Aᵀ·Bᵀ · alpha / rank.

    Args:
        model: a transformers model; changed in place, as PEFT does.
        rank: r, the rows of A [r, in] and the columns of B [out, r].
        alpha: the adapters' scale, times the rank.
        dropout: probability, on the adapters' input.
        target_modules: "all-linear", which is every linear layer but the head; names of layers, as they end
            ("q_proj", "lm_head"); or one regular expression for the whole name.
        seed: of A's start (B starts at zero). The caller's random state is left as it was.
        autocast_adapter_dtype: adapters of a half-precision model are float32, as PEFT has it.
        settings: more of PEFT's ``LoraConfig``: ``bias``, ``use_rslora``, ``modules_to_save``, …

    Returns:
        an ordinary ``PeftModel``.

    Raises:
        ModelError: when PEFT is missing or refuses, when the model has adapters, and for a name that no layer has.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ModelError("LoRA needs PEFT: pip install peft") from error
    if isinstance(model, PeftModel):
        raise ModelError("the model has adapters already; train those, or load the base model")
    if settings.get("use_dora"):
        from .dora import make_dora_traceable

        make_dora_traceable()
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    if targets in linear_layers(model):
        targets = [str(targets)]  # PEFT takes a string for an expression on the whole name
    _check_targets(model, targets)
    if isinstance(model, PreTrainedModel) and is_checkpointing(model):
        # Its hook on the embedding, which PEFT would add again, breaks the graph; recomputing is the planner's.
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        logger.info("gradient checkpointing is left to the memory planner")
    cards = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(c for c in cards if c is not None)):
        torch.manual_seed(seed)
        try:
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=rank,
                lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  typed int, used as a number
                lora_dropout=dropout,
                target_modules=targets,
                **settings,
            )
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "`is_gradient_checkpointing`", FutureWarning
                )  # PEFT still asks for it
                return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)  # pyright: ignore
        except ValueError as error:
            raise ModelError(f"PEFT refuses: {str(error).splitlines()[0]}") from error


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on, by whichever of its two names the installed transformers knows."""
    newer = getattr(model, "is_activation_checkpointing", None)  # since 5.2x, which deprecates the other
    return model.is_gradient_checkpointing if newer is None else newer


def with_lora(model: nn.Module, *, rank: int = 16, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """:func:`add_lora` for questions about a step: B is random instead of zero, as it is from the second step on.

    With zeros A would have no gradient to look at.

    Raises:
        ModelError: as there.
    """
    return add_lora(model, rank=rank, alpha=rank, dropout=dropout, seed=seed, init_lora_weights=False)


def load_adapter(base: nn.Module, source: Source) -> nn.Module:
    """Put a saved adapter on its base model, trainable.

    Raises:
        ModelError: when its weights are missing, pickled, or those of another model.
    """
    if not (source.files / "adapter_model.safetensors").is_file():
        raise ModelError(f"the adapter {source.name!r} has no adapter_model.safetensors")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("an adapter needs PEFT: pip install peft") from error
    with explained(source.name), warnings.catch_warnings():
        # PEFT only warns about weights that it does not find, and leaves those adapters at their start.
        warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
        try:
            return PeftModel.from_pretrained(base, str(source.folder), is_trainable=True).train()  # pyright: ignore
        except UserWarning as error:
            raise ModelError(f"the adapter {source.name!r} does not hold all of its weights") from error


def linear_layers(model: nn.Module) -> list[str]:
    """The last names of a model's linear layers, each once, in the model's order."""
    named = model.named_modules()
    return list(dict.fromkeys(n.rpartition(".")[2] for n, m in named if isinstance(m, (nn.Linear, Conv1D))))


def _check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """PEFT is content when one of the names matches; a misspelt one would train fewer layers without a word."""
    if targets == "all-linear":
        return
    modules = [name for name, _ in model.named_modules()]
    layers = linear_layers(model)
    there = f"its linear layers are {', '.join(layers)}"
    if not targets:
        raise ModelError(f"no target_modules are given; {there}")
    if isinstance(targets, str):
        try:
            found = any(re.fullmatch(targets, name) for name in modules)
        except re.error as error:
            raise ModelError(f"target_modules {targets!r} is no regular expression: {error}") from error
        if not found:
            raise ModelError(f"target_modules {targets!r} matches no layer of the model; {there}")
        return
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in modules)]
    if missing:
        raise ModelError(f"the model has no layer {' or '.join(_suggested(missing, layers))}; {there}")


def _suggested(missing: Iterable[str], layers: list[str]) -> list[str]:
    words = []
    for name in missing:
        close = difflib.get_close_matches(name, layers, n=1)
        words.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return words
