"""Fusion: which neighbouring operators of the dialect run well as one. One file per operator."""

from __future__ import annotations

from ..rewrite import Recogniser
from . import add_rms_norm, lora_linears

FUSIONS: tuple[Recogniser, ...] = (add_rms_norm.FUSION, lora_linears.FUSION)
"""All of them, in this order; they read graphs in which the operators have been recognised."""
