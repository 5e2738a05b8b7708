"""Images of prompts: opened for the processor as the collator opens them, and named by row where that cannot be.

TRL hands a data set's images on as they are, and processors fetch what is a URL and take what is no RGB for such. Here
a row's images become PIL's first, so that prompts, reward functions and the model see the same.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List
from torch import nn
from transformers import ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from ..models.parts import outer_parts, unwrapped
from .image_rows import is_image_part, own_image
from .images import ImageRules, header_of, open_image
from .problems import BadRow, DataError, Problems
from .vision import texts_of_parts

COLUMNS = ("images", "image")
"""That hold a row's images; TRL reads the first of them that is there."""


def undecoded(data: Any) -> Any:
    """A data set, or several by name, that leaves it to :func:`opened` to decode images: its errors know no row."""
    if isinstance(data, Mapping):
        return {name: undecoded(one) for name, one in data.items()}
    features = dict(getattr(data, "features", None) or {})
    as_they_are = {}
    for column in COLUMNS:
        feature = features.get(column)
        one = feature.feature if isinstance(feature, List) else feature
        if isinstance(one, Image) and one.decode:
            as_they_are[column] = Image(decode=False) if one is feature else List(Image(decode=False))
    if not as_they_are:
        return data
    if isinstance(data, IterableDataset):
        for column, feature in as_they_are.items():
            data = data.cast_column(column, feature)
        return data
    data = copy.deepcopy(data)  # of the tables nothing is copied, as it would be for a column that is cast
    data.info.features = Features({**features, **as_they_are})
    return data


def opened(row: Mapping[str, Any], rules: ImageRules, read: Callable[..., Any] = open_image) -> dict[str, Any]:
    """A row whose images are PIL's, in its column as in its messages.

    Args:
        row: ``prompt``, and ``images`` or ``image`` as :func:`~unsloth.runtime.images.open_image` takes them.
        rules: what is done with images.
        read: makes an image of a value and the rules.

    Raises:
        BadRow: when an image cannot be read, or the messages have not as many places for images as there are.
    """
    made = dict(row)
    column = next((name for name in COLUMNS if name in row), None)
    beside: list[Any] = []
    if column == "images":
        beside = made[column] = [read(image, rules) for image in row[column] or ()]
    elif column is not None and row[column] is not None:
        made[column] = read(row[column], rules)
        beside = [made[column]]
    if "prompt" not in row:  # an environment is going to write it
        return made
    if not is_conversational({"prompt": row["prompt"]}):
        if beside:
            raise BadRow("its prompt is a text, and an image needs messages: [{'role': 'user', 'content': …}]")
        return made
    made["prompt"] = [_message(message, rules, read) for message in made["prompt"]]
    try:
        prepare_multimodal_messages(made["prompt"], images=beside)
    except ValueError as error:
        raise BadRow(str(error)) from None
    return made


def _message(message: Mapping[str, Any], rules: ImageRules, read: Callable[..., Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_part(part, rules, read) for part in content]}


def _part(part: Any, rules: ImageRules, read: Callable[..., Any]) -> Any:
    """As TRL takes it: a place for an image has no ``image``, where a table's column of parts has null."""
    if not is_image_part(part):
        return {name: value for name, value in part.items() if value is not None} if isinstance(part, Mapping) else part
    own = own_image(part)
    return {"type": "image"} if own is None else {"type": "image", "image": read(own, rules)}


def open_rows(
    rows: Sequence[Mapping[str, Any]], rules: ImageRules, name: Callable[[Mapping[str, Any]], str | None]
) -> list[dict[str, Any]]:
    """The rows of a batch with their images opened.

    Args:
        name: of a row; None where nobody knows, and it is named by its place in the batch.

    Raises:
        DataError: naming the rows whose images cannot be used.
    """
    made: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        used = [column for column in ("prompt", *COLUMNS) if column in row]
        if made and all(row[column] == rows[number - 2].get(column) for column in used):  # asks for another completion
            made.append({**row, **{column: made[-1][column] for column in used}})
            continue
        try:
            made.append(opened(row, rules))
        except BadRow as reason:
            raise DataError(f"{name(row) or f'row {number} of {len(rows)} in a batch'}: {reason}") from None
    if any("image" in row and "images" not in row and row["image"] is None for row in made):
        # TRL takes rows without images only as empty lists of them.
        made = [{**row, "images": [] if row["image"] is None else [row["image"]]} for row in made]
    return made


def row_of(data: Any, row: Mapping[str, Any]) -> int | None:
    """Where a row stands in its data set, by its prompt and its images; None in a stream."""
    if not isinstance(data, Dataset):
        return None
    columns = [name for name in ("prompt", *COLUMNS) if name in row and name in data.column_names]
    wanted = {name: row[name] for name in columns}
    return next((index for index, found in enumerate(data.select_columns(columns)) if found == wanted), None)


# -- before training ---------------------------------------------------------------------------------------------------


def check_images(data: Any, processor: Any, rules: ImageRules, name: Callable[[int], str]) -> None:
    """Look at the header of every image of a data set; streams are checked as they come.

    Args:
        processor: with its chat template.
        name: of a row.

    Raises:
        DataError: naming the rows, when a file is missing or no image, or when places and images differ; when the chat
            template has no place for an image.
    """
    column = _column_of_images(data)
    if column is None or not isinstance(data, Dataset):
        return
    texts = texts_of_parts(processor.apply_chat_template)
    if texts is None or texts[0] == texts[1]:
        raise DataError(
            f"the rows have images in the column {column!r}, and the chat template of {type(processor).__name__} has "
            "no place for them: give it one that takes contents in parts, [{'type': 'image'}, {'type': 'text', …}]"
        )
    problems = Problems()
    used = [column for column in ("prompt", *COLUMNS) if column in data.column_names]
    for index, row in enumerate(data.select_columns(used)):
        try:
            opened(row, rules, header_of)  # type: ignore[arg-type]
        except BadRow as reason:
            problems.note(name(index), reason)
    if problems.count:
        raise DataError(str(problems))


def refuse_images(rows: Any, model: Any, processor: Any) -> None:
    """Refuse images that nobody would look at: of a model of texts alone, or without its processor.

    Args:
        rows: a data set, or some rows; a stream is not read.
        model: or a path, of which nothing is known yet.
        processor: None where TRL is going to load it.

    Raises:
        DataError: naming the column.
    """
    column = _column_of_images(rows)
    if column is None:
        return
    load = "FastVisionModel.from_pretrained loads both"
    if isinstance(model, nn.Module):
        base = unwrapped(model)
        if not outer_parts(base) and "pixel_values" not in inspect.signature(type(base).forward).parameters:
            raise DataError(
                f"the rows have images in the column {column!r}, and {type(base).__name__} reads texts alone: it takes "
                f"a model of images and texts and its processor ({load}), or rows without that column"
            )
    if processor is not None and not isinstance(processor, ProcessorMixin):
        raise DataError(
            f"the rows have images in the column {column!r}, and {type(processor).__name__} makes tokens of texts "
            f"alone: processing_class has to be the processor of a model of images and texts ({load})"
        )


def _column_of_images(rows: Any) -> str | None:
    if isinstance(rows, Dataset):
        rows = rows.select_columns([column for column in COLUMNS if column in rows.column_names])
    elif not isinstance(rows, list):
        return None
    return next((column for row in rows for column in COLUMNS if row.get(column)), None)  # type: ignore[union-attr]
