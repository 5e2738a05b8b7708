"""Recognisers: which part of a graph is which operator. One file per operator family."""

from __future__ import annotations

from ..rewrite import Recogniser
from . import attention, glu, rms_norm, rope

# In this order: a formula that contains another comes first.
RECOGNISERS: tuple[Recogniser, ...] = (
    rms_norm.RECOGNISER,
    rope.RECOGNISER,
    glu.RECOGNISER,
    attention.RECOGNISER,
)
