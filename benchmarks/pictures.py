"""A batch with images for any image-text-to-text model, from what its forward takes and what its configuration says.

Models differ in how they want pixels (whole images, images by row, tiles, flattened patches) and in what comes beside
(grids, sizes, masks). :func:`batches` offers every layout that the forward's parameters allow, and the caller takes the
first that the model runs on. How many tokens an image stands for is asked of the model's ``get_image_features``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from unsloth.models.shrink import ORDINARY_TOKENS, parts

TEXT = 17  # ordinary tokens of a row
_BEFORE = 3  # of them before the image
_IGNORED = -100

Batch = dict[str, Any]


class Pictures:
    """What a configuration says of its images: side and patch in pixels, channels, patches merged into a token."""

    def __init__(self, config: Any, rows: int) -> None:
        part = _vision(config)
        self.rows = rows
        self.patch = _number(part, ("patch_size",), 16)
        self.channels = _number(part, ("num_channels", "in_channels", "in_chans"), 3)
        self.side = _number(part, ("image_size",), 0) or 4 * self.patch
        self.frames = _number(part, ("temporal_patch_size", "patch_temporal"), 1)
        self.merge = _number(part, ("spatial_merge_size", "merge_size"), 1)
        self.pool = _number(part, ("pooling_kernel_size",), 1)
        self.tiles = _number(part, ("max_num_tiles",), 1)
        self.patches = _number(part, ("num_patches", "max_num_patches"), 16)
        self.state, self.action, self.moves = (
            _number(config, (name,), 1) for name in ("max_state_dim", "max_action_dim", "chunk_size")
        )
        self.generator = torch.Generator().manual_seed(0)

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    @property
    def flat(self) -> int:
        """Numbers of a flattened patch of one frame."""
        return self.channels * self.patch * self.patch


def batches(model: Any, rows: int) -> Iterator[Callable[[], Batch]]:
    """Ways to make a batch of ``rows`` rows, an image each; making one asks the model how long its images are.

    Args:
        model: of an image-text-to-text class.
    """
    names = set(inspect.signature(type(model).forward).parameters)
    for layout in _LAYOUTS:
        pictures = Pictures(model.config, rows)
        if (images := layout(pictures, names)) is not None:
            yield lambda images=images: _with_text(model, images, names, rows)


# -- pixels -----------------------------------------------------------------------------------------------------------


def _grid(p: Pictures, names: set[str]) -> Batch | None:
    """All images' patches in one row (Qwen2-VL and what came after it); every second image lies on its side."""
    if "image_grid_thw" not in names:
        return None
    grid = torch.tensor([[1, 4, 8] if i % 2 == 0 else [1, 8, 4] for i in range(p.rows)])
    batch = {"pixel_values": p.pixels(32 * p.rows, p.flat * p.frames), "image_grid_thw": grid}
    return batch | ({"image_merge_sizes": torch.full((p.rows,), 2)} if "image_merge_sizes" in names else {})


def _grid_of_one_frame(p: Pictures, names: set[str]) -> Batch | None:
    p.frames = 1
    return _grid(p, names)


def _grid_of_images(p: Pictures, names: set[str]) -> Batch | None:
    """As above, each patch with its channels and sides apart."""
    if (batch := _grid(p, names)) is None:
        return None
    return batch | {"pixel_values": p.pixels(32 * p.rows, p.channels, p.patch, p.patch)}


def _grid_of_images_in_a_row(p: Pictures, names: set[str]) -> Batch | None:
    """As above, in a batch of one row (PaddleOCR-VL)."""
    if (batch := _grid_of_images(p, names)) is None:
        return None
    return batch | {"pixel_values": batch["pixel_values"][None]}


def _patches(p: Pictures, names: set[str]) -> Batch | None:
    """Each image's patches, padded to a common number (SigLIP 2)."""
    if "spatial_shapes" not in names:
        return None
    mask = (torch.arange(p.patches) < 16).long().expand(p.rows, -1).clone()
    shapes = torch.tensor([[2, 8] if i % 2 else [4, 4] for i in range(p.rows)])
    return {"pixel_values": p.pixels(p.rows, p.patches, p.flat), "spatial_shapes": shapes, "pixel_attention_mask": mask}


def _numbered_patches(p: Pictures, names: set[str]) -> Batch | None:
    """Patches that begin with their row and column (Pix2Struct)."""
    if "flattened_patches" not in names:
        return None
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).add(1).float().expand(p.rows, -1, -1)
    batch = {"flattened_patches": torch.cat([places, p.pixels(p.rows, 16, p.flat)], dim=-1)}
    if "input_ids" not in names:  # so that the mask is not of a text
        batch["attention_mask"] = torch.ones(p.rows, 16)
    sizes = {n: torch.full((p.rows,), 4) for n in ("width", "height") if n in names}
    return batch | sizes


def _patches_of_rows(p: Pictures, names: set[str]) -> Batch | None:
    """Each row's patches (Fuyu)."""
    return {"pixel_values": p.pixels(p.rows, 16, p.flat)} if "pixel_values" in names else None


def _placed_patches(p: Pictures, names: set[str]) -> Batch | None:
    """Patches, and beside them the column and row of each (Gemma 4); 6 × 6, which pools of 3 × 3 divide."""
    if "image_position_ids" not in names:
        return None
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], dim=-1).expand(p.rows, -1, -1).clone()
    return {"pixel_values": p.pixels(p.rows, 36, p.flat), "image_position_ids": places}


def _placed_pools(p: Pictures, names: set[str]) -> Batch | None:
    """As above, where a patch is what others pool afterwards (Gemma 4 in one part)."""
    if (batch := _placed_patches(p, names)) is None or p.pool == 1:
        return None
    return batch | {"pixel_values": p.pixels(p.rows, 36, p.flat * p.pool**2)}


def _packed_strips(p: Pictures, names: set[str]) -> Batch | None:
    """All images' patches side by side in one strip, and each image's rows and columns of patches (MiniCPM-V)."""
    if "target_sizes" not in names:
        return None
    strip = p.pixels(1, p.channels, p.patch, 16 * p.patch * p.rows)
    return {"pixel_values": strip, "target_sizes": torch.tensor([[4, 4]] * p.rows)}


def _grid_of_tokens(p: Pictures, names: set[str]) -> Batch | None:
    """Patches of the size of a token, colours last, and a grid that counts those (Inkling 2)."""
    if "image_grid_thw" not in names:
        return None
    side = p.patch * p.merge
    grid = torch.tensor([[1, 2, 4] if i % 2 == 0 else [1, 4, 2] for i in range(p.rows)])
    return {"pixel_values": p.pixels(8 * p.rows, side, side, p.channels), "image_grid_thw": grid}


def _frames_of_tokens(p: Pictures, names: set[str]) -> Batch | None:
    """For each token the frames of its patch, colours last (Inkling)."""
    if "pixel_values" not in names:
        return None
    return {"pixel_values": p.pixels(4 * p.rows, p.frames, p.patch, p.patch, p.channels)}


def _grid_of_sides(p: Pictures, names: set[str]) -> Batch | None:
    """All images' patches in one row, and rows and columns of each image (Nemotron-H Omni)."""
    if "image_grid_hw" not in names:
        return None
    grid = torch.tensor([[4, 8] if i % 2 == 0 else [8, 4] for i in range(p.rows)])
    return {"pixel_values": p.pixels(32 * p.rows, p.flat), "image_grid_hw": grid}


def _pooled_patches(p: Pictures, names: set[str]) -> Batch | None:
    """Crops of flattened patches, and which four of them each token of an image is pooled from (Molmo 2)."""
    if "image_token_pooling" not in names:
        return None
    side = p.side // p.patch
    numbers = torch.arange(p.rows * side * side).view(p.rows, side // 2, 2, side // 2, 2)
    pools = numbers.transpose(2, 3).reshape(-1, 4)
    grids = torch.tensor([[0, 0, side // 2, side // 2]] * p.rows)
    images = {"image_token_pooling": pools, "image_grids": grids, "image_num_crops": torch.ones(p.rows).long()}
    return {"pixel_values": p.pixels(p.rows, side * side, p.flat), **images}


def _tiles(p: Pictures, names: set[str]) -> Batch | None:
    """Tiles of images of rows, of which the first is no padding (Llama 3.2 Vision)."""
    if "aspect_ratio_ids" not in names:
        return None
    mask = torch.zeros(p.rows, 1, p.tiles, dtype=torch.long)
    mask[:, :, 0] = 1
    return {
        "pixel_values": p.pixels(p.rows, 1, p.tiles, p.channels, p.side, p.side),
        "aspect_ratio_ids": torch.ones(p.rows, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def _tiles_of_rows(p: Pictures, names: set[str]) -> Batch | None:
    """A list of tiles for each row, and which of them are real (Granite Docling)."""
    if "tile_fine_mask" not in names:
        return None
    pixels = p.pixels(p.rows, 1, p.channels, p.side, p.side)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(p.rows, 1, dtype=torch.bool)}


def _cameras_of_rows(p: Pictures, names: set[str]) -> Batch | None:
    """What a robot's one camera sees, where its joints are, and the moves that it is to make (π₀)."""
    if "state" not in names or "actions" not in names:
        return None
    moves = {name: p.pixels(p.rows, p.moves, p.action) for name in ("actions", "noise")}
    images = {
        "pixel_values": p.pixels(p.rows, 1, p.channels, p.side, p.side),
        "pixel_attention_mask": torch.ones(p.rows, 1, dtype=torch.bool),
    }
    return {**images, **moves, "state": p.pixels(p.rows, p.state), "timestep": torch.linspace(0.2, 0.8, p.rows)}


def _images(p: Pictures, names: set[str]) -> Batch | None:
    """An image for each row."""
    return _beside(p, names, p.pixels(p.rows, p.channels, p.side, p.side))


def _images_without_sizes(p: Pictures, names: set[str]) -> Batch | None:
    """An image for each row, for towers that take no sizes although the model around them does (LLaVA with CLIP)."""
    return _images(p, names - {"image_sizes"}) if "image_sizes" in names else None


def _images_of_rows(p: Pictures, names: set[str]) -> Batch | None:
    """A list of images for each row."""
    return _beside(p, names, p.pixels(p.rows, 1, p.channels, p.side, p.side))


def _crops_of_rows(p: Pictures, names: set[str]) -> Batch | None:
    """For each row the whole image and what it was cut into, which is two pieces here (LLaVA-NeXT)."""
    return _beside(p, names, p.pixels(p.rows, 3, p.channels, p.side, p.side))


def _frames_of_rows(p: Pictures, names: set[str]) -> Batch | None:
    """For each row the four frames of a video (InstructBLIP Video)."""
    return _beside(p, names, p.pixels(p.rows, 4, p.channels, p.side, p.side))


def _beside(p: Pictures, names: set[str], pixels: Tensor) -> Batch | None:
    name = next((n for n in ("pixel_values", "pixel_values_images") if n in names), None)
    if name is None:
        return None
    batch: Batch = {name: pixels}
    shape = pixels.shape[:-3] + pixels.shape[-2:]
    if "image_sizes" in names:
        batch["image_sizes"] = torch.tensor([[p.side, p.side]] * p.rows)
    if "high_res_pixel_values" in names:
        batch["high_res_pixel_values"] = p.pixels(*pixels.shape)
    for mask in ("pixel_attention_mask", "pixel_mask"):
        if mask in names:
            batch[mask] = torch.ones(shape, dtype=torch.long if mask == "pixel_attention_mask" else torch.bool)
    return batch


_LAYOUTS: tuple[Callable[[Pictures, set[str]], Batch | None], ...] = (
    _grid, _grid_of_one_frame, _grid_of_images, _grid_of_images_in_a_row, _patches, _numbered_patches, _placed_patches,
    _placed_pools, _grid_of_tokens, _grid_of_sides, _pooled_patches, _packed_strips, _tiles, _tiles_of_rows,
    _cameras_of_rows, _images, _images_without_sizes, _images_of_rows, _crops_of_rows, _frames_of_rows,
    _patches_of_rows, _frames_of_tokens,
)  # fmt: skip


# -- text -------------------------------------------------------------------------------------------------------------


def _with_text(model: Any, images: Batch, names: set[str], rows: int) -> Batch:
    """The batch: in each row some text, the image's tokens, and more text."""
    token, generator = image_token(model.config), torch.Generator().manual_seed(0)
    marked = token is not None or "image_embeds_position_mask" in names
    if "qformer_input_ids" in names:  # text that the images are read with
        words = torch.randint(ORDINARY_TOKENS.start, ORDINARY_TOKENS.stop, (rows, _BEFORE), generator=generator)
        images = images | {"qformer_input_ids": words}
    lengths = _tokens_of_images(model, images, rows) if marked else [0] * rows
    width = TEXT + max(lengths)
    ids = torch.randint(ORDINARY_TOKENS.start, ORDINARY_TOKENS.stop, (rows, width), generator=generator)
    place = torch.zeros(rows, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place[row, _BEFORE : _BEFORE + length] = True
    if token is not None:
        ids[place] = token
    labels = ids.masked_fill(place, _IGNORED)
    batch = {"input_ids": ids, "labels": labels, **images}
    if "use_cache" in names:
        batch["use_cache"] = False
    for name, make in _PER_TOKEN.items():
        if name in names and name not in batch:
            batch[name] = make(place)
    if "aspect_ratio_ids" in images:
        batch["cross_attention_mask"] = (~place)[:, :, None, None] & images["aspect_ratio_mask"].bool()[:, None]
        batch["cross_attention_mask"] = batch["cross_attention_mask"].long()
    if "input_ids" not in names:  # the labels are all that its decoder reads
        del batch["input_ids"]
    if "actions" in images:  # which are learnt instead of a text
        del batch["labels"]
    return batch


_PER_TOKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": lambda place: place.new_ones(place.shape, dtype=torch.long),
    "mm_token_type_ids": lambda place: place.int(),
    "moe_mm_token_type_ids": lambda place: place.int(),
    "token_type_ids": lambda place: place.long(),
    "image_embeds_position_mask": lambda place: place,
    "image_attention_mask": lambda place: place.new_ones((*place.shape, 1), dtype=torch.long),
    "bbox": lambda place: place.new_zeros((*place.shape, 4), dtype=torch.long),
}


def image_token(config: Any) -> int | None:
    """The token that stands for a part of an image, or None where a configuration names none."""
    for names in (("image_token_id", "image_token_index", "image_patch_id"), ("video_token_id", "video_token_index")):
        for part in (config, *parts(config)):
            for name in names:
                if isinstance(found := getattr(part, name, None), int):
                    return found
    return None


_FEATURES = ("get_image_features", "get_video_features")


def _tokens_of_images(model: Any, images: Batch, rows: int) -> list[int]:
    """How many tokens each row's image stands for."""
    insides = (getattr(model, "model", None), model, *model.modules())
    owners = [(m, name) for name in _FEATURES for m in insides if hasattr(m, name)]
    if not owners or "aspect_ratio_ids" in images:  # cross-attention: one token marks the image
        return [1] * rows
    find = getattr(*owners[0])
    takes = set(inspect.signature(find).parameters)
    if "state" in images:  # the model of images and text inside of a robot's takes them without a row
        images = {**images, "pixel_values": images["pixel_values"].flatten(0, 1)}
    with torch.no_grad():
        found = find(**{k: v for k, v in images.items() if k in takes})
    pooled = getattr(found, "pooler_output", found)
    if pooled is None and found.last_hidden_state is None:
        pooled = found.deepstack_features[0][1]  # of the first layer of the text that is given any
    found = pooled if pooled is not None else found.last_hidden_state
    features = list(found) if isinstance(found, (list, tuple)) else [found]
    lengths = [f.numel() // f.shape[-1] for f in features]
    if any(f.dim() == 0 or not f.is_floating_point() for f in features):
        lengths = [f.numel() for f in features]  # a tokenizer of images
    if len(lengths) == rows:
        return lengths
    if sum(lengths) % rows:
        raise ValueError(f"{sum(lengths)} image tokens for {rows} rows")
    return [sum(lengths) // rows] * rows


def _vision(config: Any) -> Any:
    """The part that says how images are cut."""
    candidates = [getattr(config, "vision_config", None), *parts(config), config]
    for name in ("patch_size", "image_size"):
        for part in candidates:
            if part is not None and getattr(part, name, None) is not None:
                return part
    return config


def _number(part: Any, names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = getattr(part, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return default
