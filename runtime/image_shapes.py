"""Images of all sizes through one compiled graph: what a tower reads off their grids is computed before the step.

A vision tower of the Qwen2-VL kind takes the patches of all images in one row, and a grid [images, 3] that says how
many belong to which. Inside of forward it turns the grid into Python numbers: one attention per image or window, loops
over rows and columns, positions of text around them. Under ``torch.compile`` each such number breaks the graph or
becomes part of it, so that every size of image compiles again.

transformers lets a caller pass those values in (``transformers/vision_utils.py``), and take any attention
(``AttentionInterface``). So :class:`ImageShapes` computes them outside, and has the tower attend under one
block-diagonal mask, which the backend proves to be documents in a row and hands to its kernel for those. Nothing is
patched, and the first batch is run both ways: what does not come out the same is left to the model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED = "unsloth_flash_packed"
"""The attention's name; transformers gives offsets to one that is called flash."""

_GRID, _SIZES = "image_grid_thw", "image_sizes"
_IMAGES = 4
"""Dimensions of pixels that are whole images, [images, colours, height, width]."""
_VARYING = {"pixel_values": (0,), "input_ids": (1,), "labels": (1,), "attention_mask": (1,), "position_ids": (-1,)}
_VARYING |= {"mm_token_type_ids": (1,), "token_type_ids": (1,), "image_position_ids": (0,), "image_window_index": (0,)}
_VARYING |= {"image_cu_window_seqlens": (0,), "image_interp_indices": (0,), "image_interp_weights": (0,)}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling) v within each piece of a row, as transformers' attention interface wants it.

    Args:
        query: [1, heads, length, width]; so are key and value.
        cu_seq_lens_q: [pieces + 1] offsets of the pieces, from 0 to length; None where all is one piece.

    Returns:
        [1, length, heads, width], and no weights.
    """
    if cu_seq_lens_q is not None:
        length = query.shape[2]
        begins = torch.zeros(1, length, dtype=torch.bool, device=query.device)
        piece = begins.scatter(1, cu_seq_lens_q[None, 1:-1].long(), True).cumsum(1)
        attention_mask = piece[:, None, :, None] == piece[:, None, None, :]
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2), None


def state_sizes(owner: nn.Module, _: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """A hook before a model's forward that says how the sizes of what it is given hang together.

    Traced, every such size is a symbol of its own, and a tower that sorts its patches by windows has rows of
    ``windows * (patches // (patches // 4))``, which every operator of every layer then computes with. Told that
    patches are four times the index of windows, all of them have ``4 * windows`` rows.

    Raises:
        RuntimeError: a size is not what the images' patches ask for.
    """
    pixels, index = given.get("pixel_values"), given.get("image_window_index")
    merge = getattr(getattr(owner.config, "vision_config", None), "spatial_merge_size", None)
    if pixels is None or not isinstance(merge, int):
        return
    if index is None:
        torch._check(pixels.shape[0] % merge**2 == 0)
    else:
        torch._check(pixels.shape[0] == merge**2 * index.shape[0])
    if (positions := given.get("image_position_ids")) is not None:
        torch._check(positions.shape[0] == pixels.shape[0])


class ImageShapes:
    """Prepares batches for one model: ``model(**shapes(batch))`` is ``model(**batch)``, compiled for all sizes at once.

    Run the compiled model under :func:`~unsloth.compiler.run.sizes_in_graph`.

    Args:
        model: of images and text; others come through as they are. Its tower's attention is set to ``PACKED`` where
            that gives the tower's own result.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        inner = getattr(model, "model", None)
        self.owner: Any = inner if hasattr(inner, "get_image_features") else model
        self.tower: Any = getattr(getattr(model, "config", None), "vision_config", None)
        self.checked = self.called = False
        self.outside, self.by_rows = True, False
        self.patches = 0  # of the grid that a feature stands for, as the first batch had it; 0: in no fixed proportion

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the values that depend on its images' sizes, its varying dimensions marked as such.

        Args:
            batch: what the model takes; ``image_grid_thw``, [images, 3], on the CPU or the device.
        """
        ready = dict(batch)
        sizes = batch.get(_SIZES)
        if isinstance(batch.get(_GRID), Tensor) and self.outside:
            if values := self._taken(batch, self._of_grid):
                self._count(batch)
                ready |= values | self._positions(batch)
        elif isinstance(sizes, Tensor) and batch["pixel_values"].dim() == _IMAGES and self.outside:
            ready |= self._taken(batch, self._of_sizes)
        elif "pixel_values" in batch and not self.called:
            # transformers hooks a tower's layers at its first call, under a lock that no graph can hold.
            self.called = True
            with suppress(Exception):
                self._features(batch)
        for name, dims in _VARYING.items():
            if isinstance(found := ready.get(name), Tensor):
                torch._dynamo.maybe_mark_dynamic(found, [d % found.dim() for d in dims if d < found.dim()])
        return ready

    def _taken(self, batch: Mapping[str, Any], find: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """The values that the model takes, as ``find`` has them; the first batch says whether it takes any."""
        if not self.checked:
            self.outside = self._agrees(batch, find)
            self.checked = True
            if self.outside and state_sizes not in self.owner._forward_pre_hooks.values():
                self.owner.register_forward_pre_hook(state_sizes, with_kwargs=True)
        return find(batch) if self.outside else {}

    def _of_sizes(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Plain numbers: what first differs between two batches becomes a symbol of the graph.

        The pixels' sides are not marked as varying: they differ where these do, and towers of tiles, which are all of
        one size, take the root of their number, which a symbol does not have.
        """
        return {_SIZES: [tuple(size) for size in batch[_SIZES].tolist()]}

    def _of_grid(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What towers compute from the grid, by the names under which their model passes it on to them."""
        from transformers import vision_utils

        grid, tower = batch[_GRID], self.tower
        offsets = vision_utils.get_vision_cu_seqlens(grid)
        values = {"cu_seqlens": offsets, "max_seqlen": offsets.diff().max()}
        merge = getattr(tower, "spatial_merge_size", None)
        if isinstance(merge, int):
            block = 1 if self.by_rows else merge
            values["position_ids"] = vision_utils.get_vision_position_ids(grid, block)
            if isinstance(window := getattr(tower, "window_size", None), int):
                index, offsets = vision_utils.get_vision_window_index(grid, merge, window, tower.patch_size)
                values |= {"window_index": index.to(grid.device), "cu_window_seqlens": offsets}
                values["max_window_seqlen"] = offsets.diff().max()
            values |= self._table(grid, block)
        return {f"image_{name}": value for name, value in values.items()}

    def _table(self, grid: Tensor, block: int) -> dict[str, Tensor]:
        """Which places of a learnt table of positions each patch reads, and by how much, where a tower has one."""
        from transformers import vision_utils

        names = ("num_grid_per_side", "interpolation_mode", "interpolation_align_corners")
        owner = next((m for m in self.owner.modules() if all(hasattr(m, name) for name in names)), None)
        find = getattr(vision_utils, "get_vision_interpolation_indices_and_weights", None)
        if owner is None or find is None:
            return {}
        side, mode, corners = (getattr(owner, name) for name in names)
        places = find(grid, num_grid_per_side=side, mode=mode, align_corners=corners, spatial_merge_size=block)
        return dict(zip(("interp_indices", "interp_weights"), places, strict=True))

    def _count(self, batch: Mapping[str, Any]) -> None:
        """See to it that the text has as many image tokens as its images have features.

        transformers asks the same in forward, where a compiled graph would wait for the answer.

        Raises:
            ValueError: with both numbers.
        """
        token = getattr(getattr(self.owner, "config", None), "image_token_id", None)
        if not isinstance(token, int) or not self.patches or batch.get("input_ids") is None:
            return
        tokens = int((batch["input_ids"] == token).sum())
        features = int(batch[_GRID].prod(-1).sum()) // self.patches
        if tokens != features:
            raise ValueError(f"the text has {tokens} image tokens, its images have {features} features")

    def _positions(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The text's positions in time, height and width, where the model would compute them in forward."""
        find = getattr(self.owner, "get_rope_index", None)
        if find is None or batch.get("position_ids") is not None or batch.get("mm_token_type_ids") is None:
            return {}
        takes = inspect.signature(find).parameters
        positions, _ = find(**{name: value for name, value in batch.items() if name in takes})
        return {"position_ids": positions}

    def _agrees(self, batch: Mapping[str, Any], find: Callable[[Mapping[str, Any]], dict[str, Any]]) -> bool:
        """Whether the tower's features stay the same with its values given and its attention packed.

        Patches lie in the row in blocks of those that become one feature, or, where that is done behind the tower, row
        after row of their image; which of the two is asked here.
        """
        from transformers import AttentionInterface

        before = getattr(self.tower, "_attn_implementation", None)
        reasons: list[str] = []
        try:
            AttentionInterface.register(PACKED, packed_attention)
            own = self._features(batch)
            self.model.set_attn_implementation({"vision_config": PACKED})  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001  towers may take these values in any way, or not at all
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            for self.by_rows in (False, True):
                if not (reason := self._difference(own, {**batch, **find(batch)})):
                    self._compare_lengths(batch, own)
                    return True
                reasons.append(reason)
        if before is not None:
            self.model.set_attn_implementation({"vision_config": before})  # type: ignore[operator]
        warnings.warn(f"unsloth: each size of image may be compiled: {reasons[0]}", stacklevel=4)
        return False

    def _difference(self, own: list[Tensor], ready: Mapping[str, Any]) -> str:
        """Why the features of a batch made ready are not the model's own, or nothing."""
        try:
            ours = self._features(ready)
        except Exception as error:  # noqa: BLE001  as above
            return f"{type(error).__name__}: {error}"
        same = len(own) == len(ours) and all(map(_close, own, ours))
        return "" if same else "its images' features change"

    def _compare_lengths(self, batch: Mapping[str, Any], own: list[Tensor]) -> None:
        """Note how many patches of the grid a feature stands for."""
        if isinstance(batch.get(_GRID), Tensor):
            features = sum(found.numel() // found.shape[-1] for found in own)
            patches = int(batch[_GRID].prod(-1).sum())
            self.patches = patches // features if features and patches % features == 0 else 0

    def _features(self, batch: Mapping[str, Any]) -> list[Tensor]:
        find: Any = self.owner.get_image_features  # type: ignore[union-attr]
        given = {name: value for name, value in batch.items() if name == "pixel_values" or name.startswith("image_")}
        with torch.no_grad():
            found = find(**given)
        found = getattr(found, "pooler_output", found)
        return list(found) if isinstance(found, (list, tuple)) else [found]


def _close(a: Tensor, b: Tensor) -> bool:
    """To the rounding of their dtype, in norm: two attentions add in different orders."""
    difference, norm = (a - b).float().norm(), a.float().norm()
    return a.shape == b.shape and bool(difference <= 64 * torch.finfo(a.dtype).eps * norm)
