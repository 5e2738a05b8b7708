"""Rows with images, in the form that :class:`~unsloth.runtime.vision.VisionCollator` reads.

==================================  ==================================================  ==============================
Shape                               Columns                                             becomes
==================================  ==================================================  ==============================
conversations with images           messages or conversations, whose contents are       messages, images
                                    lists of parts (text, image, image_url), or texts
                                    with ``<image>`` in the images' places
an image and its question, answer   image/images/file_name/…, and any columns of        prompt, completion, images
                                    :mod:`.rows`
an image and its text               image, and text/caption/label/…                     prompt, completion, images
==================================  ==================================================  ==============================

Contents become lists of parts, ``{"type": "text", "text": …}`` and ``{"type": "image", "text": ""}``; the images are
those of ``images``, in order. A row without an image is one of text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from .formats import FORMATS
from .images import SUFFIXES, ImageRules, stored
from .problems import BadRow, DataError, kind
from .rows import Row, Shape, Templates, beside, check_assistant, detect, turns_of, unpacked

COLUMNS = (
    *("images", "image", "file_name", "file_names", "image_path", "image_paths", "image_file", "image_url", "img"),
    *("picture", "photo"),
)
"""Names of columns that hold images, if what is in them can be one."""

TEXTS = ("text", "caption", "captions", "label", "description", "latex", "transcription", "ground_truth")
"""Columns that are what an image says, where there is no question about it."""

PLACE = "<image>"
"""What stands in a text where an image belongs, as in LLaVA's data."""

CHATS = ("messages", "conversations")
ARROW = pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
"""How a table holds the images of a row."""


def image_column(columns: Sequence[str], sample: Sequence[Row]) -> str | None:
    """The column that holds images; None where none does."""
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    for name in COLUMNS:
        if (column := by_name.get(name)) and any(_may_be_image(row.get(column)) for row in sample):
            return column
    return None


def has_images(columns: Sequence[str], sample: Sequence[Row]) -> bool:
    """Whether rows have images, in a column or in their messages."""
    if image_column(columns, sample) is not None:
        return True
    chats = (unpacked(row.get(column)) for column in CHATS for row in sample)
    messages = (m for chat in chats if isinstance(chat, list) for m in chat if isinstance(m, Mapping))
    contents = (m.get("content", m.get("value")) for m in messages)
    return any(is_image_part(part) for content in contents if isinstance(content, list) for part in content)


def detect_images(
    name: str,
    columns: Sequence[str],
    sample: Sequence[Row],
    *,
    templates: Templates,
    text_field: str = "text",
    rules: ImageRules,
) -> Shape:
    """Find out what rows with images are; arguments as of :func:`~unsloth.runtime.rows.detect`.

    Raises:
        DataError: when there is nothing about the images to learn.
    """
    column = image_column(columns, sample)
    others = [c for c in columns if c != column]
    chat = next((c for c in CHATS if c in others and templates.prompt is None), None)
    if chat is not None:
        used = (*((column,) if column else ()), chat)
        keeping = _keeping(lambda row: gathered(row, chat, column), rules)
        return Shape("conversations with images", used, keeping, images=True)
    assert column is not None
    try:
        texts = detect(name, others, sample, templates=templates, text_field=text_field)
    except DataError:
        said = next((c for c in others if c.strip().lower() in TEXTS), None)
        if said is None:
            raise
        texts = Shape("text", (said,), lambda row: {"text": _required_text(row, said)})
    shape = "an image and its text" if texts.name in ("text", "plain text") else f"an image, {texts.name}"
    keeping = _keeping(lambda row: _about(row, column, texts), rules)
    return Shape(shape, (column, *texts.columns), keeping, images=True)


def gathered(row: Row, chat: str = "messages", column: str | None = None) -> tuple[dict[str, Any], list[Any]]:
    """A conversation with its contents as parts, and its images as they are, in order.

    Args:
        chat: the column of messages.
        column: that of the images that are not in messages.

    Raises:
        BadRow: when messages cannot be read, or there are more places than images, or fewer.
    """
    inside: list[Any] = []
    messages = unpacked(row.get(chat))
    if isinstance(messages, list):
        messages = [_as_text(m, inside) if isinstance(m, Mapping) else m for m in messages]
    turns = turns_of(messages, chat)
    check_assistant(turns)
    turns, images = _placed(turns, inside, _listed(row.get(column)) if column else [])
    return {"messages": turns, **beside(row)}, images


def table_in(folder: Path) -> Path:
    """The file of a folder of images that says what they are: ``metadata``, or the only table in it.

    Raises:
        DataError: when there is none, or several.
    """
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in FORMATS and p.suffix.lower() != ".txt")
    named = [p for p in tables if p.stem.lower() == "metadata"]
    found = named or tables
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{folder} holds {', '.join(p.name for p in found)}: name the one to train on")
    raise DataError(
        f"{folder} is a folder without a table: a metadata.csv in it, with the columns file_name and text (or question "
        "and answer), says what its images are"
    )


# -- from columns ------------------------------------------------------------------------------------------------------


def _keeping(
    gather: Callable[[Row], tuple[dict[str, Any], list[Any]]], rules: ImageRules
) -> Callable[[Row], dict[str, Any]]:
    """Rows for a table: each image is read once, so that a damaged one is known before training."""

    def convert(row: Row) -> dict[str, Any]:
        made, images = gather(row)
        return {**made, "images": [_numbered(i, len(images), image, rules) for i, image in enumerate(images, 1)]}

    return convert


def _numbered(number: int, count: int, image: Any, rules: ImageRules) -> dict[str, Any]:
    try:
        return stored(image, rules)
    except BadRow as reason:
        raise BadRow(f"image {number} of {count}: {reason}" if count > 1 else str(reason)) from None


def _about(row: Row, column: str, texts: Shape) -> tuple[dict[str, Any], list[Any]]:
    made = texts.convert({name: value for name, value in row.items() if name != column})
    prompt = made.get("prompt", PLACE if row.get(column) else "")
    completion: Any = made.get("completion", made.get(next(iter(made))))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not asked[-1]["content"].strip():
        raise BadRow("there is neither an image nor a question")
    turns, images = _placed([*asked, *said], [], _listed(row.get(column)))
    extras = {name: made[name] for name in ("tools", "chat_template_kwargs") if name in made}
    return {"prompt": turns[: len(asked)], "completion": turns[len(asked) :], **extras}, images


def _required_text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | int | float) or not str(value).strip() or value != value:
        raise BadRow(
            f"column {column!r} holds {'no text' if value in (None, '') else kind(value)}: an image with no text"
        )
    return str(value)


def _listed(value: Any) -> list[Any]:
    """The images of a column: one, several, or none."""
    value = unpacked(value)
    if value is None or (isinstance(value, str | bytes) and not value) or value != value:
        return []
    return [*value] if isinstance(value, list | tuple) else [value]


def _may_be_image(value: Any) -> bool:
    for one in _listed(value):
        if isinstance(one, str):
            text = one.strip().lower()
            return text.endswith(SUFFIXES) or text.startswith(("http://", "https://", "data:image", "file://"))
        return not isinstance(one, bool | int | float)
    return False


# -- in messages -------------------------------------------------------------------------------------------------------


def is_image_part(part: Any) -> bool:
    """Whether a part of a message's contents is an image, in any of the usual spellings."""
    return isinstance(part, Mapping) and (
        str(part.get("type") or "") in ("image", "image_url", "input_image")
        or ("text" not in part and any(part.get(name) for name in ("image", "image_url")))
    )


def _as_text(message: Mapping[str, Any], inside: list[Any]) -> dict[str, Any]:
    """A message whose content is one text with places; its own images are put behind ``inside``, None where it has
    a place only."""
    key = "content" if "content" in message else "value"
    parts = message.get(key)
    if not isinstance(parts, list | tuple):
        return dict(message)
    texts = []
    for part in parts:
        if is_image_part(part):
            inside.append(own_image(part))
            texts.append(PLACE)
        elif isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            name = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise BadRow(f"a message holds a part that is neither text nor an image: {name}")
    return {**message, key: "".join(texts)}


def own_image(part: Mapping[str, Any]) -> Any:
    """The image that a part of a message holds; None where it is a place for one."""
    for name in ("image", "image_url", "url", "path", "bytes", "base64"):
        value = part.get(name)
        if isinstance(value, Mapping) and not any(value.values()):
            continue
        if value is not None and not (isinstance(value, str | bytes) and not value):
            return value
    return None


def _placed(turns: list[dict[str, Any]], inside: list[Any], beside_them: list[Any]) -> tuple[list[Any], list[Any]]:
    """Contents as parts, and the images in the order of their places.

    Images of a column fill the places that have none of their own; without any place they come first.
    """
    places = sum(turn["content"].count(PLACE) for turn in turns)
    if not places and beside_them:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise BadRow("there is an image, and no message of the user's for it")
        first["content"] = PLACE * len(beside_them) + first["content"]
        places = len(beside_them)
    images = inside if len(inside) == places else [None] * places
    rest = iter(beside_them)
    images = [next(rest, None) if image is None else image for image in images]
    left = len(list(rest))
    if left or any(image is None for image in images):
        there = len(beside_them) + sum(image is not None for image in inside)
        raise BadRow(f"the messages have {places} places for images ({PLACE}), and there are {there} images")
    return [{**turn, "content": _parts(turn["content"])} for turn in turns], images


def _parts(text: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(PLACE)):
        if index:
            found.append({"type": "image", "text": ""})
        if piece.strip():
            found.append({"type": "text", "text": piece})
    return found


def table_of(rows: Sequence[Any], rules: ImageRules) -> Dataset:
    """Rows of messages, with images in them or beside them, as a data set.

    Raises:
        DataError: naming the first row that cannot be used, by its place.
    """
    made = []
    for number, row in enumerate(rows, 1):
        chat = next((column for column in CHATS if column in row), None)
        if chat is None:
            raise DataError(f"row {number} has no messages: its columns are {', '.join(row)}")
        column = next((name for name in ("images", "image") if row.get(name) is not None), None)
        try:
            made.append(_keeping(lambda row, chat=chat, column=column: gathered(row, chat, column), rules)(row))
        except BadRow as reason:
            raise DataError(f"row {number}: {reason}") from None
    if not made:
        raise DataError("there are no rows")
    columns = dict.fromkeys(name for row in made for name in row)
    return Dataset(pa.table({name: as_array(name, [row.get(name) for row in made]) for name in columns}))  # type: ignore


def as_array(column: str, values: list[Any]) -> Any:
    """A column for a table: images have one type, even where the rows at hand have none."""
    return pa.array(values, type=ARROW) if column == "images" else values
