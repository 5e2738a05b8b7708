"""DoRA (Liu et al. 2024, arXiv:2402.09353) by PEFT in one graph.

PEFT asks for a layer's weight through a function that looks at the name of the weight's class, in a way that Dynamo
does not trace: two breaks in every layer. Dynamo is told what the function returns. PEFT itself stays as it is.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn


@functools.cache
def make_dora_traceable() -> None:
    """Tell Dynamo, once in a process, what ``peft.utils.integrations.dequantize_module_weight`` does."""
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight

    if "torchao" in sys.modules:  # its weights are told apart by nothing that can be traced
        return

    @torch.compiler.substitute_in_graph(dequantize_module_weight)  # pyright: ignore[reportArgumentType]
    def weight(module: nn.Module) -> Any:
        if hasattr(module, "W_q"):  # HQQ
            return module.dequantize()  # pyright: ignore[reportCallIssue]
        if type(module.weight).__name__ in ("Params4bit", "Int8Params"):
            return dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))  # pyright: ignore
        return module.weight
