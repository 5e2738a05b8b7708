"""Operators of the dialect: how each is computed, forward and backward. Importing this registers all of them."""

if __name__ == "kernels":
    # With the repository's root on the path, libraries that look for Hugging Face's `kernels` package would find this
    # folder, and register every operator a second time.
    raise ModuleNotFoundError("No module named 'kernels' (this folder is unsloth.kernels)", name="kernels")

from . import attention, glu, rms_norm, rope

__all__ = ["attention", "glu", "rms_norm", "rope"]
