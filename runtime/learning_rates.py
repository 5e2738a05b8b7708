"""Learning rates of their own for embeddings and for the B of adapters.

Embeddings that are trained whole beside adapters want a smaller rate than those. LoRA+ (Hayou et al. 2024,
arXiv:2402.12354) gives B a rate that is a fixed multiple of A's, because B starts at zero and A does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


def set_learning_rates(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    embedding: float | None = None,
    loraplus_ratio: float | None = None,
) -> None:
    """Split an optimiser's groups so that some parameters have rates of their own; before its first step.

    The schedule is applied to each group's own rate, and all else of a group (weight decay) stays.

    Args:
        embedding: rate of the trained parameters of the input embedding and of the head.
        loraplus_ratio: the rate of every adapter's B (and of embedding adapters' B) is this times the group's.

    Raises:
        ValueError: when no trained parameter is what was asked for.
    """
    embeddings = set(map(id, _embeddings(model)))
    of_b = {id(p) for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name}
    for wanted, there, what in (
        (embedding, embeddings, "embedding_learning_rate: no embedding is trained; modules_to_save: [embed_tokens]"),
        (loraplus_ratio, of_b, "loraplus_lr_ratio: there are no adapters; use_peft: true"),
    ):
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if wanted is not None and not there & trained:
            raise ValueError(f"{what} would make some")
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        rate = group["lr"]
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            own = rate
            if embedding is not None and id(parameter) in embeddings:
                own = embedding
            elif loraplus_ratio is not None and id(parameter) in of_b:
                own = rate * loraplus_ratio
            parts.setdefault(own, []).append(parameter)
        groups += [{**group, "params": parameters, "lr": own} for own, parameters in parts.items()]
    optimizer.param_groups[:] = groups


class LearningRates(_Base):
    """Mixin before a ``transformers.Trainer``, whose optimiser it splits."""

    _rates: Mapping[str, float | None] = MappingProxyType({})  # of set_learning_rates

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and any(rate is not None for rate in self._rates.values()):
            set_learning_rates(optimizer, self.model, **self._rates)  # type: ignore[arg-type]
        return optimizer


def _embeddings(model: Any) -> Iterable[nn.Parameter]:
    """The trained parameters of the input embedding and of the head."""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, nn.Module):
            yield from (p for p in layer.parameters() if p.requires_grad)
