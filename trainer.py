"""``from unsloth.trainer import UnslothVisionDataCollator, …``: names that scripts written for Unsloth import here."""

from __future__ import annotations

from .runtime.scripts.trainers import UnslothTrainer, UnslothTrainingArguments, unsloth_train
from .runtime.scripts.vision import UnslothVisionDataCollator

__all__ = ["UnslothTrainer", "UnslothTrainingArguments", "UnslothVisionDataCollator", "unsloth_train"]
