"""8-bit linear layers (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339) in arithmetic that a compiler can read.

y = x·Wᵀ + b with W = codes · maxima / 127: int8 codes [out, in] and the largest magnitude of each row, float32 [out].

bitsandbytes' own product rounds its input to 8 bits as well, except for the columns with outliers, whose number depends
on the data: a graph break in every layer, and a wait for the device. While training on a CPU it unpacks the weight
instead, and so do these layers everywhere: the product is that of the stored weight, without further rounding, adapters
beside it are recognised, and backward unpacks the frozen weight again instead of keeping it.

The file needs bitsandbytes; import it where 8-bit layers are wanted.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """``Linear8bitLt`` (also to PEFT, and on the disk) with a weight that is quantised already and never trained."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of x."""
        maxima: Any = self.state.SCB
        weight = (self.weight * (maxima[:, None] / 127)).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def int8_linear(layer: nn.Linear) -> FrozenLinear8bit:
    """The same layer in 8 bits, where it is."""
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    new = FrozenLinear8bit(*sizes, has_fp16_weights=False, device="meta")
    codes, maxima, _ = int8_vectorwise_quant(layer.weight.data.to(torch.float16))
    packed: Any = bnb.nn.Int8Params
    new.weight = packed(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=maxima)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    new.init_8bit_state()
    return new.train(layer.training)


def freeze_int8(model: nn.Module) -> None:
    """Turn the 8-bit layers of a model that transformers has loaded into these, in place."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear8bitLt and not module.state.has_fp16_weights:
            module.__class__ = FrozenLinear8bit
            if module.weight.CB is not None:  # type: ignore[attr-defined]
                module.init_8bit_state()
