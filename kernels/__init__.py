"""Operators of the dialect: how each is computed, forward and backward. Importing this registers all of them."""

# With the repository's root on the path, libraries that look for Hugging Face's `kernels` package find this folder. To
# them it is an empty module: importing the operators under a second name would register each of them twice.
if __name__ != "kernels":
    from . import (
        attention,
        capped_attention,
        glu,
        linear_cross_entropy,
        lora_backward,
        lora_linear,
        lora_linears,
        masked_attention,
        nf4,
        packed_attention,
        paged_attention,
        rms_norm,
        rope,
        sink_attention,
        slices,
        token_cross_entropy,
    )

    __all__ = [
        "attention",
        "capped_attention",
        "glu",
        "linear_cross_entropy",
        "lora_backward",
        "lora_linear",
        "lora_linears",
        "masked_attention",
        "nf4",
        "packed_attention",
        "paged_attention",
        "rms_norm",
        "rope",
        "sink_attention",
        "slices",
        "token_cross_entropy",
    ]
