"""A run's rows with images: its processor, its collator, and which rows can be used with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .images import ImageRules
from .problems import BadRow, DataError

if TYPE_CHECKING:  # torch and transformers take longer to import than a dry run
    from .config import TrainConfig
    from .data import Data
    from .vision import VisionCollator


def processor_for(config: TrainConfig, name: str, template: str | None) -> Any:
    """The processor of a run's model.

    Args:
        name: of the data with images.
        template: instead of its own.

    Raises:
        ModelError: when there is none, or none that can be loaded.
        DataError: when the method is not for images.
    """
    from ..models.processor import load_processor

    if config.method != "sft":
        raise DataError(f"the rows of {name!r} have images, which method {config.method} does not train on")
    processor: Any = load_processor(
        config.model_name_or_path,
        gguf_file=config.gguf_file,
        trust_remote_code=config.trust_remote_code,
        require_chat_template=template is None and "chat_template_path" not in config.trainer,
    )
    if template is not None:
        processor.chat_template = processor.tokenizer.chat_template = template
    return processor


def collator_for(config: TrainConfig, processor: Any) -> VisionCollator:
    """What makes batches of a run's rows. Their images are in the rows already, and may be what they may be."""
    from .vision import VisionCollator

    return VisionCollator(
        processor,
        max_length=config.max_length,
        answers_only=bool(config.trainer.get("assistant_only_loss")),
        rules=ImageRules(convert=config.convert_images, resize=config.image_size),
        pad_to_multiple_of=config.trainer.get("pad_to_multiple_of"),
    )


def usable(data: Data, collator: VisionCollator, strict: bool) -> Data:
    """The rows that a collator can use; the others are noted among the data's problems.

    Raises:
        DataError: when no row is left, or ``strict`` and one is bad.
    """
    kept, wrong = [], []
    for index, row in enumerate(data.rows):
        try:
            collator.check(row)  # type: ignore[arg-type]
            kept.append(index)
        except BadRow as reason:
            wrong.append((data.numbers[index] if data.numbers else index + 1, reason))
    for number, reason in wrong:
        data.problems.add(data.name, number, reason)
    if not kept or (strict and wrong):
        raise DataError(f"{data.problems.count:,} rows of {data.name!r} cannot be used:\n{data.problems}")
    if not wrong:
        return data
    numbers = [data.numbers[index] if data.numbers else index + 1 for index in kept]
    return replace(data, rows=data.rows.select(kept), numbers=numbers)


def first_row(collator: VisionCollator, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of a row, for people: an image is one token."""
    batch = collator([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    images = set(collator.image_ids)
    kept = [n for n, token in enumerate(ids) if not (n and token in images and ids[n - 1] == token)]
    return {"input_ids": [ids[n] for n in kept], "labels": [labels[n] for n in kept]}
