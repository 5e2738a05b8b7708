"""Noise on the embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914), inside of the compiled graph.

The noise is uniform in ±alpha/√(tokens · hidden size), as transformers has it. Its own hook reads the magnitude back
from a tensor, which breaks the graph in two; this one draws the same numbers and computes with sizes alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class Neftune(_Base):
    """Mixin before a ``transformers.Trainer``: its ``neftune_noise_alpha``, without a break."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        alpha = self.neftune_noise_alpha
        if alpha is None:
            return super().train(*args, **kwargs)

        def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not module.training:
                return output
            magnitude = alpha / math.sqrt(output.shape[1] * output.shape[2])
            # In float32: of bfloat16's numbers between 0 and 1 there are few.
            noise = torch.rand_like(output, dtype=torch.float32) * (2 * magnitude) - magnitude
            return output + noise.to(output.dtype)

        model: Any = self.accelerator.unwrap_model(self.model)
        hook = model.get_input_embeddings().register_forward_hook(add_noise)
        self.neftune_noise_alpha = None  # else transformers would add its own
        try:
            return super().train(*args, **kwargs)
        finally:
            self.neftune_noise_alpha = alpha
            hook.remove()
