"""Plans of earlier processes: what a graph that comes out of Inductor's caches was planned for.

Such a graph was cut by its plan once, and nobody plans it again. The plan is written beside the caches under a digest
of the graph, its inputs and all that a plan depends on, so that the prediction, and the tokens up to which it holds,
come back with the graph. What cannot be read or written is done without: then there is no prediction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.runtime.cache_dir_utils import cache_dir

from .joint import hint
from .plan import Plan, Tag


def sizes_of(inputs: Sequence[Any]) -> str:
    """The symbolic sizes of a graph's inputs, with the numbers that they have in the batch it is compiled for.

    A plan is made for these numbers; the graph itself has symbols in their place.
    """
    symbols = [s for x in inputs if isinstance(x, Tensor) for s in x.shape if isinstance(s, torch.SymInt)]
    symbols += [x for x in inputs if isinstance(x, torch.SymInt)]
    return ",".join(sorted({f"{s.node.expr}={hint(s)}" for s in symbols}))


def key_of(graph: fx.GraphModule, inputs: Sequence[Any], uuid: str) -> str:
    """A digest of what decides about a graph's plan.

    Args:
        uuid: the partitioner's.
    """
    layouts = [
        f"{x.dtype}{tuple(map(str, x.shape))}{tuple(map(str, x.stride()))}{x.device}{x.requires_grad}"
        if isinstance(x, Tensor)
        else str(x)
        for x in inputs
    ]
    text = "\n".join((graph.code, *layouts, uuid, str(torch.is_grad_enabled()), torch.__version__))
    return hashlib.sha256(text.encode()).hexdigest()


def remember(key: str, plan: Plan, floor: int) -> None:
    """Write a plan down, and the peak bytes of the smallest one."""
    plain = {**dataclasses.asdict(plan), "tags": {name: tag.value for name, tag in plan.tags.items()}}
    plain["parts"] = dict(plan.parts)
    with contextlib.suppress(OSError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump({"plan": plain, "floor": floor}, file)
        os.replace(temporary, path)  # whole, or not at all


def recall(key: str) -> tuple[Plan, int] | None:
    """The plan that was written down under a digest, and the peak bytes of the smallest one; None where none was."""
    try:
        found = json.loads(_path(key).read_text())
        tags = {name: Tag(tag) for name, tag in found["plan"].pop("tags").items()}
        rest = {name: _tuples(value) for name, value in found["plan"].items()}
        return Plan(tags=tags, **rest), int(found["floor"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tuples(value: Any) -> Any:
    """JSON knows lists only."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _path(key: str) -> Path:
    return Path(cache_dir()) / "unsloth-plans" / key[:2] / f"{key}.json"
