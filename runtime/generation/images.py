"""Prompts with images: what a model's forward takes beside their tokens, read into pages with them.

A prompt is read by the model's own forward, towers included, and leaves nothing but keys and values. Where images take
another number of positions than of tokens (``get_rope_index``, models of the Qwen2-VL kind), what comes after them is
shifted by as many.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""What has a number for each token; all else is of images."""


@dataclass(frozen=True, eq=False)
class Beside:
    """What forward takes beside a prompt's tokens.

    Attributes:
        media: arguments by name: of :data:`OF_TOKENS` [1, tokens], and pixels as the processor makes them.
    """

    media: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_images(self) -> bool:
        return not self.media.keys() <= set(OF_TOKENS)

    def equals(self, other: Beside) -> bool:
        return self.media.keys() == other.media.keys() and all(
            torch.equal(value, other.media[name]) for name, value in self.media.items()
        )

    def first(self, tokens: int) -> dict[str, Tensor]:
        """Of so many tokens; the images stand among them."""
        return {name: x[:, :tokens] if name in OF_TOKENS else x for name, x in self.media.items()}

    def positions(self, model: Any, ids: Tensor) -> Tensor | None:
        """Where tokens [1, length] stand, [3, 1, length]; None where they are counted as they come."""
        owner = next((m for m in (getattr(model, "model", None), model) if hasattr(m, "get_rope_index")), None)
        if owner is None or not self.has_images:
            return None
        given = {"input_ids": ids, **self.first(ids.shape[1])}
        takes = inspect.signature(owner.get_rope_index).parameters
        return owner.get_rope_index(**{name: value for name, value in given.items() if name in takes})[0]


def together(prompts: Sequence[tuple[Tensor, Beside]], positions: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What forward takes beside prompts that are padded at the right to one length.

    Args:
        prompts: tokens [1, length] of each, and what stands beside them.
        positions: of each, [3, 1, length], or None.
    """
    longest = max(ids.shape[1] for ids, _ in prompts)
    given = [beside.first(ids.shape[1]) for ids, beside in prompts]
    made: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for one in given for name in one):
        if name not in OF_TOKENS:
            made[name] = torch.cat([one[name] for one in given if name in one])
            continue
        kinds = [one.get(name, torch.zeros_like(ids)) for (ids, _), one in zip(prompts, given, strict=True)]
        made[name] = torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in kinds])
    if any(x is not None for x in positions):
        places = [
            torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1) if x is None else x
            for (ids, _), x in zip(prompts, positions, strict=True)
        ]
        made["position_ids"] = torch.cat([F.pad(x, (0, longest - x.shape[2])) for x in places], dim=1)
    return made


def shift_of(positions: Tensor | None) -> int:
    """By how much positions behind a prompt differ from the number of its tokens."""
    return 0 if positions is None else int(positions.max()) + 1 - positions.shape[-1]
