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
        batches: as the trainer holds them; None before the first generation. Those that hold more than tensors (of
            images) are left out: a run that is resumed then generates anew, as TRL's does.
        controller: numbers by name.
    """
    if batches is None or not all(isinstance(value, Tensor) for batch in batches for value in batch.values()):
        batches = []
    tensors = {
        f"{i}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for i, batch in enumerate(batches)
        for name, value in batch.items()
    }
    save_file(tensors, path, metadata={"controller": json.dumps(dict(controller))})


def load_rollout(path: Path, device: torch.device) -> tuple[list[dict[str, Tensor]] | None, dict[str, float]]:
    """What :func:`save_rollout` wrote: the micro-batches, None if there were none, and the numbers."""
    batches: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        controller = json.loads((file.metadata() or {}).get("controller", "{}"))
        for key in file.keys():  # noqa: SIM118  it is no mapping
            index, name = key.split(".", 1)
            batches.setdefault(int(index), {})[name] = file.get_tensor(key).to(device)
    return [batches[i] for i in sorted(batches)] or None, controller
