"""Fusion: which neighbouring operators of the dialect run well as one. One file per operator."""

from __future__ import annotations

from ..rewrite import Recogniser
from . import lora_linears

FUSIONS: tuple[Recogniser, ...] = (lora_linears.FUSION,)
"""All of them, in this order; they read graphs in which the operators have been recognised."""
