"""``train_on_responses_only``: the loss on answers alone, by the words around them, after a trainer has been made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from .. import responses
from ..causal_lm import IGNORED
from ..problems import DataError, shown
from ..token_texts import pieces
from .old_names import explain_once


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """Have a trainer learn the answers only; returns the trainer.

    Args:
        trainer: an SFT trainer whose rows are tokens already, as its constructor makes them; None with
            ``return_function``.
        instruction_part: what begins a question, such as ``"<|im_start|>user\\n"``: an answer reaches up to the next.
            None for both parts asks the tokenizer's chat template what stands around an answer.
        response_part: what stands before an answer, such as ``"<|im_start|>assistant\\n"``.
        tokenizer: None takes the trainer's.
        return_function: return the function of a row instead: ``{"input_ids": …}`` → ``{"labels": …}``.
        last_response_only: of a conversation's answers the last one.

    Raises:
        DataError: when one part is given without the other, the rows are no tokens, or no row has an answer.
    """
    if (instruction_part is None) != (response_part is None):
        raise DataError("instruction_part and response_part belong together: give both, or none")
    if tokenizer is None:
        tokenizer = getattr(trainer, "processing_class", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if instruction_part is None or response_part is None:
        markers = responses.find_markers(tokenizer)
        between = _spans_up_to(markers.start, markers.stop, inclusive=True)
    else:
        between = _spans_up_to(response_part, instruction_part, inclusive=False)
    mask = _masking(tokenizer, between, last_response_only)
    if return_function:
        return mask
    for name in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, name, None)
        if isinstance(rows, dict):
            setattr(trainer, name, {key: _masked(each, mask, key, tokenizer) for key, each in rows.items()})
        elif rows is not None:
            setattr(trainer, name, _masked(rows, mask, name, tokenizer))
    return trainer


def _spans_up_to(start: str, end: str, *, inclusive: bool) -> Callable[[str], list[tuple[int, int]]]:
    """Where answers are in a text: from behind ``start`` to ``end``, or to the end of the text."""

    def find(text: str) -> list[tuple[int, int]]:
        found, position = [], 0
        while (place := text.find(start, position)) >= 0:
            first = place + len(start)
            stop = text.find(end, first) if end else -1
            position = len(text) if stop < 0 else stop + len(end) * inclusive
            found.append((first, position))
        return found

    return find


def _masking(
    tokenizer: Any, find: Callable[[str], list[tuple[int, int]]], last_only: bool
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def labels(ids: Sequence[int], before: Sequence[int]) -> list[int]:
        # By the tokens' own texts: markers that are encoded alone may be other tokens than in their place.
        texts = list(pieces(tokenizer, ids))
        spans = find("".join(texts))
        spans = spans[-1:] if last_only else spans
        made, position, index = [], 0, 0
        for token, text, label in zip(ids, texts, before, strict=True):
            end = position + len(text)
            while index < len(spans) and spans[index][1] <= position:
                index += 1
            # The beginning of a character has no text, and belongs where the character is.
            on = index < len(spans) and spans[index][0] < max(end, position + 1)
            made.append(token if on and label != IGNORED else IGNORED)
            position = end
        return made

    def mask(row: dict[str, Any]) -> dict[str, Any]:
        ids, before = row["input_ids"], row.get("labels", row["input_ids"])
        if ids and isinstance(ids[0], list):  # a batch
            return {"labels": [labels(one, other) for one, other in zip(ids, before, strict=True)]}
        return {"labels": labels(ids, before)}

    return mask


def _masked(rows: Any, mask: Callable[[dict[str, Any]], dict[str, Any]], name: str, tokenizer: Any) -> Any:
    if not isinstance(rows, Dataset):
        return rows.map(mask)  # a stream
    if "input_ids" not in rows.column_names:
        raise DataError(f"{name} holds no tokens: train_on_responses_only comes after the trainer is made")
    masked = rows.map(mask, desc="Masking questions")
    kept = masked.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    if len(kept) == 0:
        text = shown(tokenizer.decode(rows[0]["input_ids"]), 200) if len(rows) else "nothing"
        raise DataError(f"no row of {name} has an answer between those parts; the first is {text}")
    if len(kept) < len(rows):
        explain_once(
            "train_on_responses_only", f"{len(rows) - len(kept)} of {len(rows)} rows have no answer, and are left out"
        )
    return kept
