"""``UnslothTrainer`` and ``UnslothTrainingArguments``: our trainers, given arguments as those scripts give them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trl
from datasets import Dataset
from transformers import TrainingArguments

from ..preferences import DPOTrainer, ORPOConfig, ORPOTrainer, _ORPOTrainer
from ..trainer import SFTTrainer
from .old_names import explain_once, fields_of, positional, renamed, with_old_names

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


@dataclass
class UnslothTrainingArguments(trl.SFTConfig):
    """TRL's ``SFTConfig``, with a learning rate of its own for embeddings and head where they are trained."""

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the input embedding and the head, where they are trained."}
    )

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        return object.__new__(with_old_names(cls) if cls is UnslothTrainingArguments else cls)


class _OldNames(_Base):
    """Mixin before one of our trainers: arguments of earlier versions of TRL become those of this one.

    What a trainer took itself once (``max_seq_length``, ``packing``, ``beta``, …) goes into its configuration. Without
    a ``max_length`` the model's ``max_seq_length`` is it. Precision is the model's: one in float32 on a CPU is trained
    so.
    """

    _theirs: type
    _config: type

    def __init__(self, *args: Any, **given: Any) -> None:
        given = positional(self._theirs.__init__, args, given)
        if "tokenizer" in given:
            given.setdefault("processing_class", given.pop("tokenizer"))
        own = set(positional_names(self._theirs)) | {"compile", "options", "cuda_graphs", *_RATES}
        known = fields_of(self._config)
        loose = {name: given.pop(name) for name in list(given) if name not in own}
        settings = renamed(loose, known)
        given |= {name: settings.pop(name) for name in list(settings) if name not in known}  # refused there, by name
        config = self._arguments(given.get("args"), settings)
        model = given.pop("model")
        self._suit(config, model, settings)
        collator: Any = given.get("data_collator")
        of_images = hasattr(collator, "dataset")
        if of_images:
            config.remove_unused_columns = False  # it makes all that the model is given
        for name in ("train_dataset", "eval_dataset"):
            if isinstance(rows := given.get(name), list):  # as scripts have it that TRL once took lists
                given[name] = collator.dataset(rows) if of_images else Dataset.from_list(rows)
        rate = getattr(given.get("args"), "embedding_learning_rate", None)
        if rate is not None:
            given.setdefault("embedding_learning_rate", rate)
        super().__init__(model, **{**given, "args": config})

    def _arguments(self, args: Any, settings: dict[str, Any]) -> Any:
        """The configuration, of the class that the trainer has, with further settings."""
        known = fields_of(self._config)
        if args is None:
            return self._config(**{"output_dir": "trainer_output", **settings})
        if isinstance(args, self._config):
            config = copy.copy(args)
            for name, value in settings.items():
                setattr(config, name, value)
            return config
        assert isinstance(args, TrainingArguments)
        whole = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init and f.name in known}
        return self._config(**{**whole, **settings})

    def _suit(self, config: Any, model: Any, settings: dict[str, Any]) -> None:
        length = getattr(model, "max_seq_length", None)
        default = next(f.default for f in dataclasses.fields(self._config) if f.name == "max_length")
        if length is not None and "max_length" not in settings and config.max_length == default:
            config.max_length = length
        if model.device.type == "cpu" and (config.bf16 or config.fp16):
            explain_once("bf16, fp16", f"on a CPU the model is trained in its own precision, {model.dtype}")
            config.bf16 = config.fp16 = False
            config.mixed_precision = "no"  # what the two were made of when it was built


class UnslothTrainer(_OldNames, SFTTrainer):
    """:class:`~unsloth.runtime.trainer.SFTTrainer`, given arguments as scripts for Unsloth give them."""

    _theirs, _config = trl.SFTTrainer, trl.SFTConfig


class _Dpo(_OldNames, DPOTrainer):
    _theirs, _config = trl.DPOTrainer, trl.DPOConfig


class _Orpo(_OldNames, ORPOTrainer):
    _theirs, _config = _ORPOTrainer, ORPOConfig


OURS: dict[type, type] = {trl.SFTTrainer: UnslothTrainer, trl.DPOTrainer: _Dpo, _ORPOTrainer: _Orpo}
"""TRL's classes and what they become."""

_RATES = ("embedding_learning_rate", "loraplus_lr_ratio")


def positional_names(cls: Any) -> list[str]:
    """The arguments of a trainer of TRL."""
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


def unsloth_train(trainer: Any, *args: Any, **settings: Any) -> Any:
    """``trainer.train()``: the loss of accumulated batches is right without help."""
    return trainer.train(*args, **settings)
