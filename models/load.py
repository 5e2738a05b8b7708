"""A causal language model by name: a preset, a folder, or an id on the Hugging Face hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import presets


class ModelError(ValueError):
    """There is no such model, or it cannot be loaded as asked."""


def load(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model for training.

    Args:
        name: a key of :data:`~unsloth.models.presets.SHAPES`; a folder with ``config.json`` (without weight files it
            gets random weights); or an id on the hub, which is then asked for it.
        dtype: of the weights.
        device: where the model goes.
        trust_remote_code: run the Python code that a checkpoint brings along. Never on unless asked for.

    Raises:
        ModelError: saying what was looked for, and the closest preset where there is one.
    """
    if name in presets.SHAPES:
        return presets.build(name, dtype=dtype, device=device)
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    folder = _folder(name)
    try:
        if folder is not None and not _has_weights(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder or name, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load {name!r}: {error}") from error
    return model.to(device).train()  # pyright: ignore[reportArgumentType]  transformers' stub of `to`


def with_lora(model: PreTrainedModel, *, rank: int = 16, dropout: float = 0.0, seed: int = 0) -> torch.nn.Module:
    """Freeze the model and put PEFT's LoRA adapters on every linear layer of its blocks.

    B is random instead of zero, as it is from the second step on: with zeros A would have no gradient to look at.

    Raises:
        ModelError: when PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("LoRA needs PEFT: pip install peft") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=rank,
                lora_alpha=rank,
                lora_dropout=dropout,
                target_modules="all-linear",
                init_lora_weights=False,
            ),
        )


def random_batch(model: torch.nn.Module, batch: int, seq: int, *, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one training step on random tokens.

    Returns:
        ``input_ids`` and ``labels``, the same int64 [batch, seq] on the model's device, and ``use_cache=False``.
    """
    vocabulary = model.config.get_text_config().vocab_size  # pyright: ignore
    generator = torch.Generator().manual_seed(seed)
    ids: Tensor = torch.randint(vocabulary, (batch, seq), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _folder(name: str) -> Path | None:
    """The folder that ``name`` is, or None when it can only be an id on the hub."""
    path = Path(name).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        raise ModelError(f"{name!r} has no config.json")
    if path.is_absolute() or name.startswith((".", "~")) or path.exists():
        raise ModelError(f"{name!r} is no folder with a config.json")
    if "/" not in name and (close := difflib.get_close_matches(name, presets.SHAPES, n=1)):
        raise ModelError(f"no preset {name!r}, did you mean {close[0]!r}? Presets are {', '.join(presets.SHAPES)}")
    return None


def _has_weights(folder: Path) -> bool:
    return any(
        any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
    )
