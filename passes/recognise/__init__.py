"""Recognisers: which part of a graph is which operator. One file per operator family."""

from __future__ import annotations

from ..rewrite import Recogniser
from . import glu

# In this order: a formula that contains another comes first.
RECOGNISERS: tuple[Recogniser, ...] = (glu.RECOGNISER,)
