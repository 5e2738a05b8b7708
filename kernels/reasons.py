"""Why an operator does not apply: reasons that ``supports`` functions share, as ``explain`` prints them."""

from __future__ import annotations

import torch
from torch import Tensor


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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
