"""The reference that a policy is held near: the same weights without their adapters, while those change nothing."""

from __future__ import annotations

from typing import Any

_SECOND = ("lora_B", "lora_embedding_B")
_FIRST = ("lora_A", "lora_embedding_A")


def without_idle_copy(model: Any) -> None:
    """Delete the copy of fresh adapters that TRL makes for a reference: it then computes without adapters instead.

    Which is less, and the same. Adapters that have learnt something stay their own reference.
    """
    if "ref" in getattr(model, "peft_config", {}) and is_fresh(model):
        model.delete_adapter("ref")


def is_fresh(model: Any) -> bool:
    """Whether adapters change nothing yet: B of each is zero, and nothing else is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not all(any(part in name for part in (*_FIRST, *_SECOND)) for name in trained):
        return False
    return not any(bool(p.any()) for name, p in trained.items() if any(part in name for part in _SECOND))
