"""Batches of rows with images: chat messages to tokens, pixels and labels, by the model's own processor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jinja2
import torch
from PIL import Image
from torch import Tensor

from ..models.turns import ANSWERS, QUESTIONS, Markers
from . import responses
from .causal_lm import IGNORED
from .image_rows import gathered
from .images import ImageRules, open_image, size_of
from .problems import BadRow, DataError
from .token_texts import pieces

Labels = Callable[[Sequence[int]], Sequence[int]]
_KNOWN = {"user": QUESTIONS[0], "assistant": ANSWERS[0]}
_NEAR = 16
"""Tokens by which a row's length may be misjudged from its images' sizes; closer to the limit it is counted."""


class Chat:
    """A processor's chat template, given messages whose contents are parts, whatever the template was written for.

    A template of a language model takes texts alone: it is given the processor's own token in an image's place.

    Attributes:
        place: what an image is in the text that a processor takes.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if not self.template:
            raise DataError(
                "the rows are conversations, and the processor has no chat template: --chat-template chatml"
            )
        candidates = [getattr(processor, name, None) for name in ("image_token", "boi_token", "start_image_token")]
        tokens = [token for token in candidates if isinstance(token, str)]
        self.in_parts = True
        place = self._place(tokens)
        if place is None:
            self.in_parts, place = False, tokens[0] if tokens else None
        if place is None:
            raise DataError("the chat template has no place for images, and the processor no token for them")
        self.place = place

    def _place(self, tokens: list[str]) -> str | None:
        """The token that the template writes for a part that is an image; None where it takes no parts."""
        texts = texts_of_parts(self.apply_chat_template)
        if texts is None:
            return None
        return next((t for t in tokens if texts[1].count(t) == texts[0].count(t) + 1), None)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tokenize: bool = False, **settings: Any
    ) -> str:
        """As a tokenizer's, which is how :mod:`unsloth.models.turns` asks what a template does."""
        settings = {name: value for name, value in settings.items() if value is not None}
        given = [{**m, "content": self._content(m.get("content"))} for m in messages]
        return self.tokenizer.apply_chat_template(given, tokenize=False, chat_template=self.template, **settings)

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not self.in_parts:
            return "".join(self.place if part["type"] == "image" else part["text"] for part in content or [])
        return [{"type": "image"} if part["type"] == "image" else part for part in content or []]


class Prepared(NamedTuple):
    """A row, ready for the processor.

    Attributes:
        text: what the template makes of it.
        images: in order.
        messages: all of them, with contents as parts.
        learnt: the first of the messages whose answers are trained on.
    """

    text: str
    images: list[Any]
    messages: list[dict[str, Any]]
    learnt: int


@dataclass
class VisionCollator:
    """Makes batches of conversations with images, of rows as :mod:`.image_rows` describes them.

    Rows without an image may be among them, and several images in one. Padding, and what stands for images, is never
    trained on.

    Attributes:
        processor: of the model.
        max_length: longer rows are cut off at so many tokens; one whose images would be cut cannot be used.
        answers_only: of ``messages`` train on the assistant's answers alone, as of ``completion`` always.
        rules: what is done with images.
        bad_rows: "raise" a :class:`DataError` for a row that cannot be used, or "drop" it from its batch.
        pad_to_multiple_of: round the length of a batch up.
        labels: instead of ``answers_only``: makes labels of a row's tokens.
    """

    processor: Any
    max_length: int | None = None
    answers_only: bool = False
    rules: ImageRules = field(default_factory=ImageRules)
    bad_rows: Literal["raise", "drop"] = "raise"
    pad_to_multiple_of: int | None = None
    labels: Labels | None = None

    def __post_init__(self) -> None:
        if self.bad_rows not in ("raise", "drop"):
            raise ValueError(f"bad_rows is 'raise' or 'drop', not {self.bad_rows!r}")
        self.chat = Chat(self.processor)
        self.tokenizer = self.chat.tokenizer
        self.image_ids = _image_ids(self.processor, self.chat.place)
        self._tokens_of = functools.lru_cache(maxsize=None)(self._count_image)
        self._markers: Markers | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, int64 [batch, seq], padded on the right, and what else the
            processor makes of images (``pixel_values``, …), where the batch has any.

        Raises:
            DataError: naming the row, by its place in the batch.
        """
        made, whole, problems = [], [], []
        for number, row in enumerate(rows, 1):
            try:
                prepared = self.prepare(row)
                made.append((prepared, [open_image(image, self.rules) for image in prepared.images]))
                whole.append(number)
            except BadRow as reason:
                problems.append(f"row {number} of {len(rows)} in a batch: {reason}")
        if problems and (self.bad_rows == "raise" or not made):
            raise DataError("\n".join(problems))
        batch = self._processed([p.text for p, _ in made], [images for _, images in made])
        try:
            return self._finished(batch, [prepared for prepared, _ in made], whole)
        except BadRow as reason:
            if self.bad_rows == "raise" or len(made) == 1:
                raise DataError(f"in a batch of {len(rows)}: {reason}") from None
        return self._without_bad_rows(rows)

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """A row's text and its images, not yet opened.

        Raises:
            BadRow: when its messages cannot be read, or its text holds what stands for an image.
        """
        if "prompt" in row and "completion" in row:
            asked = row["prompt"]
            whole = {**row, "messages": [*asked, *row["completion"]]}
            first = len(asked)
        else:
            whole, first = row, 0
        column = next((name for name in ("images", "image") if whole.get(name) is not None), None)
        made, images = gathered(whole, "messages" if "messages" in whole else "conversations", column)
        messages, settings = made["messages"], made.get("chat_template_kwargs") or {}
        try:
            text = self.chat.apply_chat_template(messages, tools=made.get("tools"), **settings)
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the row: {error}") from None
        if text.count(self.chat.place) != len(images):
            raise BadRow(
                f"the texts hold {self.chat.place!r}, which stands for an image, {text.count(self.chat.place)} times, "
                f"and there are {len(images)} images"
            )
        return Prepared(text, images, messages, first)

    def check(self, row: Mapping[str, Any]) -> int:
        """How many tokens a row has, before it is cut; pixels are processed only where it may be too long.

        Raises:
            BadRow: when it cannot be used: its images do not fit into ``max_length``, or nothing is left to learn.
        """
        prepared = self.prepare(row)
        if prepared.learnt or self.answers_only:
            responses.spans(prepared.text, self._asked_markers(), prepared.messages)
        count = len(self.tokenizer(prepared.text, add_special_tokens=False)["input_ids"])
        count += sum(self._tokens_of(size_of(image, self.rules)) - 1 for image in prepared.images)
        if self.max_length is None or count + _NEAR <= self.max_length:
            return count
        images = [open_image(image, self.rules) for image in prepared.images]
        batch = self._processed([prepared.text], [images])
        count = batch["input_ids"].shape[1]
        self._finished(batch, [prepared], [1])
        return count

    # -- tokens and pixels ---------------------------------------------------------------------------------------------

    def _processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        given: dict[str, Any] = {"images": images} if any(images) else {}
        try:
            batch = self.processor(
                text=texts,
                **given,
                padding=True,
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
                add_special_tokens=False,
                return_tensors="pt",
            )
        except (ValueError, IndexError) as error:
            raise DataError(f"the processor refuses a batch: {str(error).splitlines()[0]}") from error
        return dict(batch)

    def _finished(self, batch: dict[str, Any], rows: list[Prepared], numbers: list[int]) -> dict[str, Tensor]:
        """The batch with labels, cut to its length."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        is_image = torch.isin(ids, torch.tensor(self.image_ids))
        labels = torch.full_like(ids, IGNORED)
        for index, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            length = int(mask[index].sum())
            labels[index, :length] = torch.tensor(self._row_labels(ids[index, :length].tolist(), row))
            if self.max_length is None or length <= self.max_length:
                continue
            name = f"row {number}: " if len(rows) > 1 else ""
            if is_image[index, self.max_length :].any():
                raise BadRow(
                    f"{name}it has {length:,} tokens, {int(is_image[index].sum()):,} of them for its images, which do "
                    f"not fit into max_length {self.max_length:,}: allow more, or make images smaller (image_size)"
                )
            if bool((labels[index] != IGNORED).any()) and not (labels[index, : self.max_length] != IGNORED).any():
                raise BadRow(
                    f"{name}it has {length:,} tokens, and its answer begins behind max_length {self.max_length:,}"
                )
        batch["labels"] = labels.masked_fill(is_image | (mask == 0), IGNORED)
        if self.max_length is not None and ids.shape[1] > self.max_length:
            shape = ids.shape
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.shape[:2] == shape and not name.startswith(("pixel", "image")):
                    batch[name] = value[:, : self.max_length]
        return batch

    def _row_labels(self, ids: list[int], row: Prepared) -> Sequence[int]:
        if self.labels is not None:
            return self.labels(ids)
        if not row.learnt and not self.answers_only:
            return ids
        texts = list(pieces(self.tokenizer, ids))
        found = responses.spans("".join(texts), self._asked_markers(), row.messages)
        answers = [n for n, message in enumerate(row.messages) if message["role"] == "assistant"]
        found = [span for span, number in zip(found, answers, strict=True) if number >= row.learnt]
        labels, position = [], 0
        for token, text in zip(ids, texts, strict=True):
            end = position + len(text)
            # The beginning of a character has no text, and belongs where the character is.
            on = any(first < max(end, position + 1) and position < last for first, last in found)
            labels.append(token if on else IGNORED)
            position = end
        return labels

    def _asked_markers(self) -> Markers:
        if self._markers is None:
            self._markers = responses.find_markers(self.chat)
        return self._markers

    def _count_image(self, size: tuple[int, int]) -> int:
        """Tokens of an image of that size."""
        batch = self._processed([self.chat.place], [[Image.new("RGB", size)]])
        return batch["input_ids"].shape[1]

    def _without_bad_rows(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of the rows that can be used one by one."""
        alone, good, problems = replace(self, bad_rows="raise"), [], []
        for row in rows:
            try:
                alone([row])
                good.append(row)
            except DataError as reason:
                problems.append(str(reason))
        if not good:
            raise DataError("\n".join(problems))
        return alone(good)


def texts_of_parts(apply_chat_template: Callable[..., Any]) -> list[str] | None:
    """What a template makes of a question without and with an image; None where it takes no contents in parts."""
    texts = []
    for parts in ([], [{"type": "image"}]):
        content = [*parts, {"type": "text", "text": _KNOWN["user"]}]
        try:
            texts.append(apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError):
            return None
    if any(_KNOWN["user"] not in text or "'type'" in text or '"type"' in text for text in texts):
        return None
    return texts


def _image_ids(processor: Any, place: str) -> list[int]:
    """Tokens that stand for images, or parts of them, after the processor has put in as many as an image has."""
    found = {
        token for name in ("image_token_id", "image_token_ids") for token in _numbers(getattr(processor, name, None))
    }
    tokenizer = processor.tokenizer
    names = [place, getattr(processor, "image_token", None), getattr(tokenizer, "image_token", None)]
    vocabulary = tokenizer.get_vocab()
    return sorted(found | {vocabulary[name] for name in names if isinstance(name, str) and name in vocabulary})


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [v for v in value or () if isinstance(v, int)]
