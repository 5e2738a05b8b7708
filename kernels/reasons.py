"""Why an operator does not apply: reasons that ``supports`` functions share, as ``explain`` prints them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LARGE = (8, 0)
"""Cards from this capability on have at least 99 KiB of shared memory for a program; before, there are 64."""


def dtype_is(x: Tensor, *allowed: torch.dtype) -> str | None:
    """None when x has one of the dtypes, else the reason."""
    if x.dtype in allowed:
        return None
    return f"dtype {_short(x.dtype)} is not one of {', '.join(_short(d) for d in allowed)}"


def too_wide(x: Tensor, limit: int) -> str | None:
    """None when the last dimension is a known size of at most ``limit``, else the reason."""
    width = x.shape[-1]
    if not isinstance(width, int):
        return "the last dimension is symbolic"
    return None if width <= limit else f"the last dimension is {width}, the kernel holds at most {limit}"


def small_card(x: Tensor) -> str | None:
    """None unless x is on a card whose shared memory is too small for tiles of up to 96 KiB: then the reason."""
    if x.device.type != "cuda" or (major_minor := _capability(x.device)) >= LARGE:
        return None
    return f"sm_{major_minor[0]}{major_minor[1]} has too little shared memory"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; enough for one that is only talked about."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else LARGE


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
