"""What an operator's results look like, asked once for each layout of its arguments.

A graph is traced, checked, planned and compiled on fake tensors, and every one of these asks every call in it for its
results. PyTorch remembers those of its own operators, and not of ours, most of which answer by running their formula,
a dozen operators, on fake tensors. The layers of a model share nearly all layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import MOST_LAYOUTS


class _Result(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def fresh(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def once_per_layout(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what a fake makes of its arguments' layouts, and give it in tensors of its own.

    Where something about an argument is symbolic the fake is asked each time, as it is where its results are not what
    their layouts say (views of something larger).

    Args:
        fake: reads nothing of its arguments but numbers and their tensors' shape, strides, dtype and device; returns
            fresh tensors, one or a tuple.
    """
    known: dict[Any, tuple[list[_Result], bool] | None] = {}

    def remembered(*args: Any) -> Any:
        key = _key(args)
        found = known.get(key) if key is not None else None
        if found is not None:
            results, several = found
            fresh = tuple(result.fresh() for result in results)
            return fresh if several else fresh[0]
        answer = fake(*args)
        if key is not None and key not in known:
            if len(known) >= MOST_LAYOUTS:
                known.clear()
            known[key] = _results(answer)
        return answer

    return remembered


def _key(args: tuple[Any, ...]) -> Any:
    """All that an answer depends on; None where that is symbolic."""
    kind = next(a.device.type for a in args if isinstance(a, Tensor))
    layouts = tuple(map(_layout, args))
    if None in layouts:
        return None
    # What autocast and the default dtype do to a formula's own operators.
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return layouts, casts and torch.get_autocast_dtype(kind), torch.get_default_dtype()


def _layout(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        if argument._has_symbolic_sizes_strides:
            return None
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, (list, tuple)):
        parts = tuple(map(_layout, argument))
        return None if None in parts else parts
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None
    return type(argument), argument  # True is not 1


def _results(answer: Any) -> tuple[list[_Result], bool] | None:
    """An answer's layouts, and whether it is a tuple; None where they do not say all about it."""
    several = isinstance(answer, tuple)
    results = []
    for tensor in answer if several else (answer,):
        if not isinstance(tensor, Tensor) or tensor._has_symbolic_sizes_strides or tensor.storage_offset():
            return None
        result = _Result(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if result.fresh().untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
        results.append(result)
    return results, several
