"""Recognisers: which part of a graph is which operator. One file per operator family."""

from __future__ import annotations

from ..fuse import FUSIONS
from ..rewrite import Recogniser
from . import attention, cross_entropy, glu, lora_linear, nf4, rms_norm, rope


def recognisers(*, right_padded: bool = False) -> tuple[Recogniser, ...]:
    """All recognisers, in this order: a formula that contains another comes first. Then what fuses their finds."""
    return (
        nf4.RECOGNISER,
        cross_entropy.RECOGNISER,
        lora_linear.RECOGNISER,
        rms_norm.RECOGNISER,
        rope.RECOGNISER,
        glu.RECOGNISER,
        attention.Attention(right_padded=right_padded),
        *FUSIONS,
    )


RECOGNISERS = recognisers()
