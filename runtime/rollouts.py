"""Completions that are still to be trained on, and what else a run of GRPO has to remember: in a checkpoint.

A generation feeds several steps. A run that stops between them goes on with the completions that it had, whose policy
is no longer there to sample them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Batches = Sequence[Mapping[str, Any]]


def save_rollout(path: Path, batches: Batches | None, controller: Mapping[str, float]) -> None:
    """Write micro-batches and numbers as one file of safetensors.

    Args:
        batches: as the trainer holds them: tensors and lists of whole numbers by name; None before the first
            generation. Those that hold anything else are left out: a run that is resumed then generates anew, as TRL's
            does.
        controller: numbers by name.
    """
    if batches is None or not all(_can_be_saved(value) for batch in batches for value in batch.values()):
        batches = []
    values = {f"{i}.{name}": value for i, batch in enumerate(batches) for name, value in batch.items()}
    lists = [name for name, value in values.items() if not isinstance(value, Tensor)]
    tensors = {
        name: torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in values.items()
    }
    save_file(tensors, path, metadata={"controller": json.dumps(dict(controller)), "lists": json.dumps(lists)})


def _can_be_saved(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and all(type(number) is int for number in value))


def load_rollout(path: Path, device: torch.device) -> tuple[list[dict[str, Any]] | None, dict[str, float]]:
    """What :func:`save_rollout` wrote: the micro-batches, None if there were none, and the numbers."""
    batches: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        controller, lists = (json.loads(metadata.get(*what)) for what in (("controller", "{}"), ("lists", "[]")))
        for key in file.keys():  # noqa: SIM118  it is no mapping
            index, name = key.split(".", 1)
            value = file.get_tensor(key)
            batches.setdefault(int(index), {})[name] = value.tolist() if key in lists else value.to(device)
    return [batches[i] for i in sorted(batches)] or None, controller
