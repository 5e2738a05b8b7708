"""Models of images and text by name, and what a training step of one is given.

Shapes as published, with random weights, and cut to a quarter of their depth (``-quarter``), where a measurement does
not ask for all of it. This file needs torch and transformers only, so that a benchmark can load it into another
system's process by its path (numbers from the models' ``config.json``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

SIDE = 1024
"""Of an image, in pixels; the tiny models have images of :data:`TINY_SIDE`."""
TINY_SIDE = 70
_BEFORE = 4  # ordinary tokens before the image
_IGNORED = -100


class Shape(NamedTuple):
    """A model, and what is done with it.

    Attributes:
        settings: its configuration; ``model_type`` chooses the architecture.
        adapted: of which layers LoRA adapts, as one regular expression on the whole name: what Unsloth's
            ``FastVisionModel`` chooses unless told otherwise, all linear layers of attention and MLPs in the language
            model and in the tower.
        unquantised: of which modules QLoRA keeps in 16 bits, as Unsloth does.
    """

    settings: dict[str, Any]
    adapted: str
    unquantised: tuple[str, ...]


_BYTES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def _qwen(layers: int, text: dict[str, Any], tower: dict[str, Any], first_special: int) -> Shape:
    names = ("vision_start_token_id", "vision_end_token_id", "_", "image_token_id", "video_token_id")
    settings = {
        "model_type": "qwen2_5_vl",
        **{name: first_special + i for i, name in enumerate(names) if name != "_"},
        "tie_word_embeddings": False,
        "text_config": {"num_hidden_layers": layers, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, **text},
        "vision_config": tower,
    }
    inside = r"visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"
    text_layers = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    return Shape(settings, rf".*({inside}|{text_layers})", ("lm_head", "visual"))


def _qwen_7b(layers: int, tower: int) -> Shape:
    """Qwen/Qwen2.5-VL-7B-Instruct: every eighth layer of its tower sees whole images, the others windows."""
    text = {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    }
    vision = {"depth": tower, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return _qwen(layers, text, {**vision, "fullatt_block_indexes": list(range(7, tower, 8))}, 151_652)


def _llama(layers: int, text: dict[str, Any], tower: dict[str, Any]) -> Shape:
    settings = {
        "model_type": "mllama",
        "image_token_index": text["vocab_size"],
        "text_config": {"num_hidden_layers": layers, "rms_norm_eps": 1e-5, **text},
        "vision_config": {"max_num_tiles": 4, "patch_size": 14, **tower},
    }
    inside = r"vision_model\.(global_)?transformer\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.fc[12])"
    text_layers = r"language_model\.layers\.\d+\.((self|cross)_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    return Shape(settings, rf".*({inside}|{text_layers})", ("lm_head", "multi_modal_projector"))


def _llama_11b(layers: int, tower: int, ending: int, seen: list[int]) -> Shape:
    """meta-llama/Llama-3.2-11B-Vision: every fifth layer looks at the image, at ``seen`` layers of its tower too."""
    text = {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "cross_attention_layers": list(range(3, layers, 5)),
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_004,
    }
    vision = {
        "hidden_size": 1280,
        "attention_heads": 16,
        "intermediate_size": 5120,
        "num_hidden_layers": tower,
        "num_global_layers": ending,
        "image_size": 560,
        "intermediate_layers_indices": seen,
        "vision_output_dim": 1280 * (1 + len(seen)),
    }
    return _llama(layers, text, vision)


_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 60}

SHAPES: dict[str, Shape] = {
    "qwen2.5-vl-7b": _qwen_7b(28, 32),
    "qwen2.5-vl-7b-quarter": _qwen_7b(7, 8),
    "llama-3.2-11b-vision": _llama_11b(40, 32, 8, [3, 7, 15, 23, 30]),
    "llama-3.2-11b-vision-quarter": _llama_11b(10, 8, 2, [0, 1, 3, 5, 7]),
    "tiny-qwen2.5-vl": _qwen(
        2,
        {**_BYTES, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}},
        {**_TINY_TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        259,
    ),
    "tiny-llama-vision": _llama(
        3,
        {**_BYTES, "cross_attention_layers": [1]},
        {
            **_TINY_TOWER,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 42,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
    ),
}
"""By name."""


def config(name: str) -> PreTrainedConfig:
    """The configuration of a shape.

    Raises:
        KeyError: for a name that is not in :data:`SHAPES`.
    """
    settings = dict(SHAPES[name].settings)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def batch(name: str, rows: int, text: int, dtype: torch.dtype) -> dict[str, Any]:
    """A training batch on the CPU: in each row one square image and ``text`` ordinary tokens, all of which are learnt.

    No row is padded, and no mask says so, as in the batches of language models.

    Returns:
        what the model takes; ``input_ids`` are [rows, text + tokens of the image].
    """
    settings = config(name)
    generator = torch.Generator().manual_seed(0)
    side = TINY_SIDE if name.startswith("tiny-") else SIDE
    make = _patches if settings.model_type == "qwen2_5_vl" else _tiles
    tokens, images = make(settings, rows, side, generator)
    vocabulary = min(settings.get_text_config().vocab_size, *(_specials(settings)))
    width = text + len(tokens)
    ids = torch.randint(vocabulary, (rows, width), generator=generator)
    place = torch.zeros(rows, width, dtype=torch.bool)
    place[:, _BEFORE : _BEFORE + len(tokens)] = True
    ids[place] = torch.tensor(tokens).repeat(rows)
    images = {key: value.to(dtype) if value.is_floating_point() else value for key, value in images.items()}
    given = {"input_ids": ids, "labels": ids.masked_fill(place, _IGNORED)}
    if settings.model_type == "qwen2_5_vl":
        given["mm_token_type_ids"] = (ids == settings.image_token_id).int()
    else:
        seen = torch.ones(rows, width, 1, settings.vision_config.max_num_tiles, dtype=torch.long)
        seen[:, :_BEFORE] = 0  # text before an image does not look at it
        given["cross_attention_mask"] = seen
    return {**given, **images, "use_cache": False}


def write_processor(folder: str) -> list[str]:
    """Write what says how images are prepared, beside a model that a system loads from a folder and asks it of.

    No step uses it, so it is Llama's for all: Qwen's cannot be loaded without torchvision.

    Returns:
        words that its tokenizer needs.
    """
    kind = {"image_processor_type": "MllamaImageProcessor", "processor_class": "MllamaProcessor"}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(kind))
    return ["<|image|>", "<|python_tag|>"]


def _specials(settings: Any) -> list[int]:
    names = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    found = [getattr(settings, name, None) for name in names]
    return [token for token in found if isinstance(token, int)]


def _patches(settings: Any, rows: int, side: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """As Qwen's processor does it: the side is rounded to whole tokens, all patches of all images stand in a row."""
    vision = settings.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    across = round(side / unit) * vision.spatial_merge_size
    length = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tokens = [settings.image_token_id] * (across // vision.spatial_merge_size) ** 2
    pixels = torch.randn(rows * across**2, length, generator=generator)
    images = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, across, across]] * rows)}
    return [settings.vision_start_token_id, *tokens, settings.vision_end_token_id], images


def _tiles(settings: Any, rows: int, side: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """As Llama's processor does it: a square image larger than a tile is cut into 2 × 2, all of which are full."""
    vision = settings.vision_config
    across = 2 if side > vision.image_size else 1
    tiles = vision.max_num_tiles
    mask = (torch.arange(tiles) < across**2).long().expand(rows, 1, tiles).clone()
    number = 1 + [list(ratio) for ratio in vision.supported_aspect_ratios].index([across, across])
    images = {
        "pixel_values": torch.randn(rows, 1, tiles, 3, vision.image_size, vision.image_size, generator=generator),
        "aspect_ratio_ids": torch.full((rows, 1), number),
        "aspect_ratio_mask": mask,
    }
    return [settings.image_token_index], images
