"""What the device at hand reaches: measured once, in about a second, and remembered on disk.

Figures are rounded before they are remembered, because plans, and with them compiled graphs, depend on them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .costs import Ceilings

WIDTH = 8192
"""Of the matrices whose product is timed: large enough for full speed on any card."""
COPIED = 512 << 20
REPEATS = 5


def folder() -> Path:
    """Where figures are remembered: ``$XDG_CACHE_HOME/unsloth``, or ``~/.cache/unsloth``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unsloth"


@functools.cache
def measured_ceilings(otherwise: Ceilings) -> Ceilings:
    """What the current CUDA device reaches.

    Args:
        otherwise: what is assumed where it cannot be measured, for want of memory, say.
    """
    name = torch.cuda.get_device_name()
    path = folder() / f"ceilings-{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}.json"
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        return Ceilings(name, **json.loads(path.read_text()), memory=memory)
    except (OSError, ValueError, TypeError):
        pass  # not measured yet, or by a version that wrote other figures
    try:
        with unset_fake_temporarily():  # a compilation may be under way
            found = {key: _rounded(value) for key, value in _measure().items()}
    except RuntimeError as error:
        warnings.warn(f"unsloth: {name} could not be measured and is taken for {otherwise.name}: {error}", stacklevel=2)
        return dataclasses.replace(otherwise, memory=memory)
    _remember(path, found)
    return Ceilings(name, **found, memory=memory)


def _measure() -> dict[str, float]:
    """FLOPs per second of a half-precision product; bytes per second of a copy, and of one from pinned memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    a, b = (torch.randn(WIDTH, WIDTH, device=device, dtype=half) for _ in range(2))
    product = torch.empty_like(a)
    flops = 2 * WIDTH**3 / _seconds(lambda: torch.mm(a, b, out=product))
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPIED / _seconds(lambda: target.copy_(source))
    host = torch.empty(COPIED // 4, dtype=torch.uint8, pin_memory=True)
    link = COPIED // 4 / _seconds(lambda: target[: COPIED // 4].copy_(host, non_blocking=True))
    return {"flops": flops, "bandwidth": bandwidth, "link": link}


def _seconds(run: Callable[[], object]) -> float:
    """The best of a few runs, after one that does not count."""
    run()
    best = float("inf")
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _rounded(value: float) -> float:
    """To two digits: runs differ by less."""
    return float(f"{value:.1e}")


def _remember(path: Path, found: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(found))
        os.replace(temporary, path)
    except OSError:
        pass  # a read-only home: measured again in the next process
