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
    from .models.fast import FastLanguageModel
    from .runtime.grpo import GRPOTrainer
    from .runtime.plan import MemoryPlan, plan
    from .runtime.preferences import DPOTrainer, ORPOTrainer
    from .runtime.trainer import SFTTrainer

__version__ = "0.1.0"
__all__ = [
    "DPOTrainer",
    "Explanation",
    "FastLanguageModel",
    "GRPOTrainer",
    "MemoryPlan",
    "ORPOTrainer",
    "SFTTrainer",
    "Verification",
    "explain",
    "plan",
    "verify",
]

# Imported on first use, so that ``import unsloth`` costs nothing and touches nothing.
_HOMES = {
    "explain": ".compiler.explain",
    "Explanation": ".compiler.explain",
    "FastLanguageModel": ".models.fast",
    "GRPOTrainer": ".runtime.grpo",
    "MemoryPlan": ".runtime.plan",
    "plan": ".runtime.plan",
    "DPOTrainer": ".runtime.preferences",
    "ORPOTrainer": ".runtime.preferences",
    "SFTTrainer": ".runtime.trainer",
    "verify": ".compiler.verify",
    "Verification": ".compiler.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
