"""A micro-batch of completions as TRL makes it: what it consists of, its padding, and its images row by row.

Prompts are padded at the left and completions at the right. Pixels lie beside them, in as many layouts as there are
processors: a row of patches, one image behind the other, tiles, or a row of images for each prompt. TRL's own functions
take them apart by prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from .causal_lm import IGNORED
from .generation.images import OF_TOKENS
from .generation.support import Unsupported

_OF_PROMPT = {"prompt_ids", "prompt_mask"}
_OF_COMPLETION = {"completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps"}
_OF_COMPLETION |= {"sampling_per_token_logps", "importance_sampling_ratio", "advantages"}
_PIXELS = {"pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"}
_PIXELS |= {"image_position_ids"}
_COUNTS = {"num_images", "num_tiles"}

MEDIA = {*OF_TOKENS, *_PIXELS, *_COUNTS}
"""What a batch of prompts with images has beside its text: ``num_images`` and ``num_tiles`` are lists of a number for
each row, ``token_type_ids`` and ``mm_token_type_ids`` int64 [batch, prompt + completion], and pixels as processors make
them."""
KNOWN = _OF_PROMPT | _OF_COMPLETION | {"num_items_in_batch"} | MEDIA
"""What a batch may consist of; others, of later versions of TRL, run as TRL runs them."""


def media_of(batch: Mapping[str, Any], rows: slice | None = None) -> dict[str, Tensor]:
    """What the model takes beside the tokens of a batch's rows.

    Args:
        batch: with some of :data:`MEDIA`, or none of it.
        rows: of the batch; None is all.

    Returns:
        arguments of the forward, without pixels where the rows have no image.
    """
    media = {name: value for name, value in batch.items() if name in MEDIA and value is not None}
    if rows is not None and media:
        apart = split_pixel_values_by_grid(media)
        media = unsplit_pixel_values_by_grid({name: value[rows] for name, value in apart.items()})
    pixels: Any = media.get("pixel_values")
    gone = _COUNTS if pixels is None or pixels.numel() else _COUNTS | _PIXELS
    return {name: value for name, value in media.items() if name not in gone}


def media_by_prompt(fields: Mapping[str, Any], images: Sequence[Sequence[Any] | None]) -> list[dict[str, Tensor]]:
    """What the model takes beside each prompt's tokens, alone.

    Args:
        fields: what a processor made of prompts beside their tokens, as tensors, or as lists for each prompt or image.
        images: of each prompt, or None.

    Raises:
        Unsupported: where they cannot be told apart without asking the processor again.
    """
    if unknown := fields.keys() - MEDIA:
        raise Unsupported(f"their processor makes {', '.join(sorted(unknown))} of them")
    counts = [len(theirs or ()) for theirs in images]
    kinds = {name: [torch.as_tensor(row)[None] for row in fields[name]] for name in OF_TOKENS if name in fields}
    pixels: dict[str, Any] = {
        name: value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
        for name, value in fields.items()
        if name not in OF_TOKENS
    }
    values = pixels.get("pixel_values")
    if "spatial_shapes" in pixels or (values is not None and values.dim() == 4 and len(values) != sum(counts)):
        raise Unsupported("their images are cut into tiles")
    batch = {**pixels, "num_images": counts}
    return [
        {**media_of(batch, slice(row, row + 1)), **{name: rows[row] for name, rows in kinds.items()}}
        for row in range(len(counts))
    ]


def trimmed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch without the columns in which no row has a token.

    TRL pads all completions of a generation to one length, and their prompts, before it takes them apart. Asks the
    device once.

    Args:
        batch: ``prompt_ids``, ``prompt_mask`` (padded at the left), ``completion_ids``, ``completion_mask`` (at the
            right), values per completion or per token of it, and :data:`MEDIA`.
    """
    used_prompt, used = batch["prompt_mask"].any(0), batch["completion_mask"].any(0)
    ends = torch.stack([used_prompt.sum(), used.sum()]).tolist()
    prompt, tokens = (max(int(n), 1) for n in ends)
    width, length = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    cut: dict[str, Any] = {}
    for name, value in batch.items():
        if name in _OF_PROMPT:
            cut[name] = value[:, -prompt:].contiguous()
        elif name in OF_TOKENS:
            cut[name] = value[:, width - prompt : width + tokens].contiguous()
        elif name in _OF_COMPLETION and value.dim() == 2 and value.shape[1] == length:
            cut[name] = value[:, :tokens].contiguous()
        else:
            cut[name] = value
    return cut


def mark_lengths(*tensors: Any) -> None:
    """Lengths vary from batch to batch: one graph shall serve all of them."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] > 1:
            with suppress(AttributeError):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)


def without_idle_columns(
    ids: Tensor, mask: Tensor, tokens: int, media: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and targets of rows that were padded to a common length with others, at both sides.

    Args:
        ids: int64 [batch, prompt + completion]; so is ``mask``.
        tokens: of a completion.
        media: of these rows, as :func:`media_of` returns it.
    """
    used = mask.any(0).nonzero().flatten()[[0, -1]].tolist() if bool(mask.any()) else [0, ids.shape[1] - 1]
    prompt = ids.shape[1] - tokens
    first, end = min(used[0], prompt - 1), max(used[1] + 1, prompt + 1)
    kinds = {name: value[:, first:end].contiguous() for name, value in media.items() if name in OF_TOKENS}
    ids, mask = ids[:, first:end].contiguous(), mask[:, first:end].contiguous()
    targets = ids.masked_fill(mask == 0, IGNORED)[:, prompt - first :].contiguous()
    inputs = {"input_ids": ids} if len(ids) == 1 else {"input_ids": ids, "attention_mask": mask}
    mark_lengths(*inputs.values(), targets)
    return {**media, **inputs, **kinds}, targets
