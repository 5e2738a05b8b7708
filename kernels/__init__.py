"""Operators of the dialect: how each is computed, forward and backward. Importing this registers all of them."""

from . import attention, glu, rms_norm, rope

__all__ = ["attention", "glu", "rms_norm", "rope"]
