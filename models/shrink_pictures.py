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
_TO_TEXT = re.compile(r"out_hidden_size|text_hidden_size|decoder_hidden_size|projection_dim")
_FEATURES = re.compile(r"(\w+_)?feature_layers?|insert_layer_id|spatial_vision_layer")


@dataclass(frozen=True)
class Pictures:
    """What the rules know of a whole configuration.

    Attributes:
        side: patches along the side of an image.
        text_width: hidden size of the text's part, once it is shrunk.
        ratio: of the new image size to the old one.
    """

    side: int
    text_width: int
    ratio: float

    def field(self, name: str, value: Any, fields: dict[str, Any], kept: list[int]) -> tuple[bool, Any]:
        """Whether a rule is for this field, and its new value.

        Args:
            fields: its neighbours, not shrunk.
            kept: numbers of the layers that its part of the configuration keeps.
        """
        new = self._field(name, value, fields, kept)
        return new is not _UNDECIDED, new

    def _field(self, name: str, value: Any, fields: dict[str, Any], kept: list[int]) -> Any:
        patch = _first(fields.get("patch_size"))
        if name.endswith("grid_pinpoints"):
            return [[max(1, round(size * self.ratio)) for size in pair] for pair in value]
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
        if name == "patch_embed_hidden_size":
            return value  # numbers of a flattened patch
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
            return Pictures(side, text.proportional(text.hidden), min(1.0, side * patch / size))
    return Pictures(side, text.proportional(text.hidden), 1.0)


def _each(value: Any, rule: Any) -> Any:
    return type(value)(rule(v) for v in value) if isinstance(value, (list, tuple)) else rule(value)


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and value > 0 else None
