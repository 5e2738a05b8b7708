"""``FastVisionModel`` and ``UnslothVisionDataCollator``: what scripts that fine-tune on images import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from datasets import Dataset
from torch import Tensor, nn

from ...models.processor import load_processor
from ..image_rows import table_of
from ..images import ImageRules
from ..problems import DataError
from ..vision import VisionCollator
from .fast import FastModel
from .old_names import explain_once
from .responses_only import train_on_responses_only


class FastVisionModel(FastModel):
    """:class:`~.fast.FastModel` that loads the class of a checkpoint that takes images.

    ``from_pretrained`` returns the model and its processor, which scripts call ``tokenizer``; the processor's tokenizer
    is ``processor.tokenizer``. ``get_peft_model`` puts adapters on the layers that its ``finetune_`` arguments choose.
    With ``load_in_4bit`` the language model is in NF4, and what makes embeddings of images is as it was.
    """

    _images = True
    _load_tokenizer = staticmethod(load_processor)


class UnslothVisionDataCollator:
    """Batches of chat messages with images; see :class:`~unsloth.runtime.vision.VisionCollator`.

    Args:
        model: its ``max_seq_length`` is the limit where none is given.
        processor: as :meth:`FastVisionModel.from_pretrained` returns it.
        max_seq_length: tokens of a row; longer ones are cut, and a row whose images would be is refused.
        formatting_func: makes the row to train on of what the data set holds.
        resize: the most that an image may have: pixels of its longer side, (width, height), "min" for the size that the
            model's tower was made for, or "max" (None) to leave it to the processor.
        train_on_responses_only: train on the assistant's answers alone. With ``instruction_part`` and ``response_part``
            they are what stands between those; otherwise what the chat template puts around an answer is found out.
        last_response_only: of those the last one.
        pad_to_multiple_of: round a batch's length up.
        allow_urls: fetch images that are given by a URL.
        convert_images: take animations (their first frame), CMYK and 16 bits, which are refused otherwise.
        bad_rows: "raise" for a row that cannot be used, or "drop" it from its batch.
    """

    def __init__(
        self,
        model: nn.Module | None,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Mapping[str, Any]] | None = None,
        resize: Literal["min", "max"] | int | tuple[int, int] | None = "max",
        ignore_index: int = -100,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        force_match: bool = True,
        num_proc: int | None = None,
        completion_only_loss: bool = True,
        pad_to_multiple_of: int | None = None,
        last_response_only: bool = False,
        allow_urls: bool = False,
        convert_images: bool = False,
        bad_rows: Literal["raise", "drop"] = "raise",
    ) -> None:
        if ignore_index != -100:
            raise DataError(f"ignore_index is -100, as in transformers, not {ignore_index}")
        if not hasattr(processor, "image_processor"):
            raise DataError(f"a {type(processor).__name__} takes no images: give the processor of FastVisionModel")
        self.formatting_func = formatting_func
        self.rules = ImageRules(urls=allow_urls, convert=convert_images, resize=_most(resize, model))
        labels = None
        if instruction_part is not None or response_part is not None or last_response_only:
            labels = _between(processor, instruction_part, response_part, last_response_only)
        self.collator = VisionCollator(
            processor,
            max_length=max_seq_length or getattr(model, "max_seq_length", None),
            answers_only=train_on_responses_only,
            rules=self.rules,
            bad_rows=bad_rows,
            pad_to_multiple_of=pad_to_multiple_of,
            labels=labels if train_on_responses_only else None,
        )

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        if self.formatting_func is not None:
            rows = [self.formatting_func(row) for row in rows]
        return self.collator(rows)

    def dataset(self, rows: Sequence[Any]) -> Dataset:
        """Rows of a list, which scripts give to TRL's trainer, as the data set that it wants."""
        if self.formatting_func is not None:
            rows = [self.formatting_func(row) for row in rows]
            self.formatting_func = None
            explain_once("formatting_func", "applied to the list of rows, before training")
        return table_of(rows, self.rules)


def _between(
    processor: Any, instruction_part: str | None, response_part: str | None, last_only: bool
) -> Callable[[Sequence[int]], Sequence[int]]:
    if instruction_part is None and response_part is None:
        raise DataError("last_response_only needs an instruction_part and a response_part")
    mask: Any = train_on_responses_only(
        None, instruction_part, response_part, tokenizer=processor, return_function=True, last_response_only=last_only
    )
    return lambda ids: mask({"input_ids": ids})["labels"]


def _most(resize: Any, model: Any) -> int | tuple[int, int] | None:
    """The limit of an image's size in pixels."""
    if resize in (None, "max"):
        return None
    if resize == "min":
        vision = getattr(getattr(model, "config", None), "vision_config", None)
        return getattr(vision, "image_size", None)
    sizes: list[Any] = [*resize] if isinstance(resize, tuple | list) else [resize]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or len(sizes) not in (1, 2):
        raise DataError(f"resize is 'min', 'max', pixels of the longer side or (width, height), not {resize!r}")
    return (sizes[0], sizes[1]) if len(sizes) == 2 else sizes[0]
