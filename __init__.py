"""unsloth as a compiler: ``torch.compile(model, backend="unsloth")``.

The backend needs no import: PyTorch finds it by its entry point. What is exported here is for asking it questions and
for loading models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.explain import Explanation, explain
    from .compiler.verify import Verification, verify
    from .models.doctor import Diagnosis
    from .runtime.doctor import doctor
    from .runtime.grpo import GRPOTrainer
    from .runtime.plan import MemoryPlan, plan
    from .runtime.preferences import DPOTrainer, ORPOTrainer
    from .runtime.scripts.chats import get_chat_template, standardize_data_formats, standardize_sharegpt, to_sharegpt
    from .runtime.scripts.fast import (
        FastLanguageModel,
        FastModel,
        PatchDPOTrainer,
        is_bf16_supported,
        is_bfloat16_supported,
    )
    from .runtime.scripts.responses_only import train_on_responses_only
    from .runtime.scripts.trainers import UnslothTrainer, UnslothTrainingArguments, unsloth_train
    from .runtime.scripts.vision import FastVisionModel, UnslothVisionDataCollator
    from .runtime.trainer import SFTTrainer

__version__ = "0.1.0"
__all__ = [
    "DPOTrainer",
    "Diagnosis",
    "Explanation",
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "GRPOTrainer",
    "MemoryPlan",
    "ORPOTrainer",
    "PatchDPOTrainer",
    "SFTTrainer",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "UnslothVisionDataCollator",
    "Verification",
    "doctor",
    "explain",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "plan",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
    "verify",
]

# Imported on first use, so that ``import unsloth`` costs nothing and touches nothing.
_HOMES = {
    "Diagnosis": ".models.doctor",
    "doctor": ".runtime.doctor",
    "explain": ".compiler.explain",
    "Explanation": ".compiler.explain",
    "GRPOTrainer": ".runtime.grpo",
    "MemoryPlan": ".runtime.plan",
    "plan": ".runtime.plan",
    "DPOTrainer": ".runtime.preferences",
    "ORPOTrainer": ".runtime.preferences",
    "SFTTrainer": ".runtime.trainer",
    # The names that scripts written for Unsloth import.
    **dict.fromkeys(
        ("FastLanguageModel", "FastModel", "PatchDPOTrainer", "is_bf16_supported", "is_bfloat16_supported"),
        ".runtime.scripts.fast",
    ),
    **dict.fromkeys(
        ("get_chat_template", "standardize_data_formats", "standardize_sharegpt", "to_sharegpt"),
        ".runtime.scripts.chats",
    ),
    "train_on_responses_only": ".runtime.scripts.responses_only",
    **dict.fromkeys(
        ("UnslothTrainer", "UnslothTrainingArguments", "unsloth_train"),
        ".runtime.scripts.trainers",
    ),
    **dict.fromkeys(("FastVisionModel", "UnslothVisionDataCollator"), ".runtime.scripts.vision"),
    "verify": ".compiler.verify",
    "Verification": ".compiler.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
