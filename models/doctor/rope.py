"""Rotary embeddings in float64, from what a configuration declares: the truth that models are held against.

Su et al. 2021, arXiv:2104.09864; linear interpolation, Chen et al. 2023, arXiv:2306.15595; YaRN, Peng et al. 2023,
arXiv:2309.00071; Llama 3.1's smoothed scaling, arXiv:2407.21783.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """What rotates a head.

    Attributes:
        frequencies: radians per position, float64 [rotated / 2].
        attention_factor: both cosine and sine are multiplied by it.
    """

    frequencies: Tensor
    attention_factor: float


def declared(parameters: Mapping[str, Any], rotated: int) -> Rotation | None:
    """The rotation that ``rope_parameters`` mean.

    Args:
        parameters: ``rope_type``, ``rope_theta``, ``factor``, …, as transformers names them.
        rotated: dimensions of a head that are rotated.

    Returns:
        None for a kind of scaling that has no formula of position alone ("dynamic", "longrope", …).
    """
    theta = parameters.get("rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not theta or kind not in _SCALINGS:
        return None
    plain = float(theta) ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    return _SCALINGS[kind](plain, parameters, rotated)


def _default(plain: Tensor, parameters: Mapping[str, Any], rotated: int) -> Rotation:
    return Rotation(plain, 1.0)


def _linear(plain: Tensor, parameters: Mapping[str, Any], rotated: int) -> Rotation:
    return Rotation(plain / parameters["factor"], 1.0)


def _llama3(plain: Tensor, parameters: Mapping[str, Any], rotated: int) -> Rotation:
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the trained context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return Rotation(plain * (smooth + (1 - smooth) / parameters["factor"]), 1.0)


def yarn_attention_factor(parameters: Mapping[str, Any]) -> float:
    """What YaRN's formula gives (equation 22), or DeepSeek's ratio of two of them."""

    def mscale(weight: float) -> float:
        factor = parameters["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    one, other = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(one) / mscale(other) if one and other else mscale(1.0)


def _yarn(plain: Tensor, parameters: Mapping[str, Any], rotated: int) -> Rotation:
    theta, trained = float(parameters["rope_theta"]), parameters["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return rotated * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = ((torch.arange(rotated // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    given = parameters.get("attention_factor")
    factor = yarn_attention_factor(parameters) if given is None else given
    return Rotation(plain * (1 - ramp) + plain / parameters["factor"] * ramp, factor)


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
