"""Recognisers: which part of a graph is which operator. One file per operator family."""

from __future__ import annotations

from ..rewrite import Recogniser
from . import attention, cross_entropy, glu, lora_linear, nf4, rms_norm, rope

# In this order: a formula that contains another comes first.
RECOGNISERS: tuple[Recogniser, ...] = (
    nf4.RECOGNISER,
    cross_entropy.RECOGNISER,
    lora_linear.RECOGNISER,
    rms_norm.RECOGNISER,
    rope.RECOGNISER,
    glu.RECOGNISER,
    attention.RECOGNISER,
)
