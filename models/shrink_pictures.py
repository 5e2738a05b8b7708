"""Tiny images for tiny models: rules for the fields that say how large an image is and how it is cut.

Beside ``models/shrink.py``, whose rules are about widths and layers. Here a field depends on its neighbours (a window
is some patches wide) and on other parts of the configuration (a tower ends in the text's width).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_UNDECIDED = object()
_VISIBLE = 1e-3  # standard deviation of weights, below which a tower's output is lost in rounding
_DISAGREE = {"downsample_channels"}  # whose default does not fit to those of its neighbours
_CODES = 32  # words that stand for pieces of images, where images are words
_IMAGE = 100  # of models/shrink.py: the first special token
_TO_TEXT = re.compile(r"out_hidden_size|text_hidden_size|decoder_hidden_size|projection_dim")
_FEATURES = re.compile(r"(\w+_)?feature_layers?|insert_layer_id|spatial_vision_layer")


@dataclass(frozen=True)
class Pictures:
    """What the rules know of a whole configuration.

    Attributes:
        side: patches along the side of an image.
        text_width: hidden size of the text's part, once it is shrunk.
        tile: pixels along the side of an image.
    """

    side: int
    text_width: int
    tile: int

    def field(self, name: str, value: Any, widths: Any, kept: list[int], fill: bool) -> tuple[bool, Any]:
        """Whether a rule is for this field, and its new value.

        Args:
            widths: of its part of the configuration (``Widths`` of models/shrink.py), neighbours not shrunk included.
            kept: numbers of the layers that its part of the configuration keeps.
            fill: give fields that are None a value.
        """
        new = self._open(name, widths.fields) if fill and (not value or name in _DISAGREE) else _UNDECIDED
        if new is _UNDECIDED:
            new = self._field(name, value, widths, kept)
        return new is not _UNDECIDED, new

    def _open(self, name: str, fields: dict[str, Any]) -> Any:
        """What a default configuration leaves open about images although its model wants a value."""
        if name == "vocabulary_map":  # pictures as words of a text
            codes = {f"<|visual token {code:06d}|>": code for code in range(_CODES)}
            letters = str.maketrans("0123456789", "ABCDEFGHIJ")
            codes |= {f"IMGIMG{str(code).translate(letters)}Z": code for code in range(_CODES)}
            return {"<image>": _IMAGE, "<|extra_200|>": _IMAGE + 1, **codes}
        if name == "downsample_rate":
            return "1/2"
        if name == "deepstack_layer_map":
            return [[0, 0]]
        if name == "downsample_channels":  # the last as wide as the encoder that reads them
            return [16, self.text_width]
        if name == "rope_parameters" and (kinds := fields.get("layer_types")):
            return {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in kinds}
        return _UNDECIDED

    def _field(self, name: str, value: Any, widths: Any, kept: list[int]) -> Any:
        fields = widths.fields
        patch = _first(fields.get("patch_size"))
        if name.endswith("grid_pinpoints"):
            tile = min(size for pair in value for size in pair)
            return [[max(1, size * self.tile // tile) for size in pair] for pair in value]
        if name == "image_size" and value and patch:
            return _each(value, lambda size: min(size, self.side * patch))
        if name == "window_size" and patch and isinstance(value, int) and value % patch == 0:
            return 2 * (fields.get("spatial_merge_size") or 1) * patch
        if name == "mm_tokens_per_image":
            return max(1, self.side // 2) ** 2
        stages = fields.get("intermediate_layers_indices")
        if name == "vision_output_dim" and isinstance(stages, (list, tuple)):
            return self.text_width * (1 + sum(layer in kept for layer in stages))  # towers end as wide as the text
        if name == "initializer_range" and isinstance(value, float) and value < _VISIBLE:
            return 0.02  # else what images contribute is below the loss's precision
        if name.endswith("patch_to_query_dict") and isinstance(value, dict):
            return {self.side**2: 4}
        if name == "base_channels":
            return min(value, 32)  # the groups of a group norm
        if name == "image_patch_id":
            return _IMAGE
        if name == "hidden_size" and "base_channels" in fields and "channel_multiplier" in fields:
            return min(fields["base_channels"], 32) * fields["channel_multiplier"][-1]
        if name in ("latent_query_num", "num_embeddings"):
            return min(value, 16 if name == "latent_query_num" else _CODES)
        if name == "codebook_size":
            return min(value, _CODES)
        if name.endswith("_token_offset"):  # where a range of codes begins: those of images, then those of sounds
            return _CODES * (1 + (not name.startswith("image")))
        if name == "spatial_target_layers" and isinstance(value, (list, tuple)):
            return [layer % len(kept) for layer, _ in enumerate(value)]
        if re.fullmatch(r"post_conv_\w+_channels", name):
            return widths.proportional(value)
        if "pixel_shuffle_ratio" in fields and "projector_input_dim" in fields:
            if name == "intermediate_size":  # what is shuffled together
                return round(widths.proportional(widths.hidden) / fields["pixel_shuffle_ratio"] ** 2)
            if name in ("projector_input_dim", "projector_output_dim", "vision_output_dim"):
                return self.text_width
        if name == "patch_embed_hidden_size":
            return value  # numbers of a flattened patch
        if name in ("pos_emb_height", "pos_emb_width") or (
            name == "max_position_embeddings" and "pos_emb_height" in fields
        ):
            return value  # sides of a table of positions, and their product
        if name == "index_kpool":
            return min(value, 2)
        if _TO_TEXT.fullmatch(name) and isinstance(value, int):
            return self.text_width
        if _FEATURES.fullmatch(name) and value is not None:
            return _each(value, lambda layer: max(-len(kept), min(layer, len(kept) - 1)))
        return _UNDECIDED


def pictures_of(config: Any, side: int, text: Any) -> Pictures:
    """What the rules know of ``config``.

    Args:
        side: patches along the side of the new images.
        text: widths of the text's part (``Widths`` of models/shrink.py).
    """
    inside = [v for v in vars(config).values() if hasattr(v, "model_type")]
    for part in (getattr(config, "vision_config", None), *inside, config):
        size, patch = _first(getattr(part, "image_size", None)), _first(getattr(part, "patch_size", None))
        if size and patch:
            return Pictures(side, text.proportional(text.hidden), min(size, side * patch))
    return Pictures(side, text.proportional(text.hidden), side)


def _each(value: Any, rule: Any) -> Any:
    return type(value)(rule(v) for v in value) if isinstance(value, (list, tuple)) else rule(value)


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and value > 0 else None
