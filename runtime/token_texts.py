"""Texts of tokens, one after the other: a character of several tokens comes with its last one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream


def pieces(tokenizer: Any, ids: Iterable[int], *, skip_special_tokens: bool = False) -> Iterator[str]:
    """The text that each token adds; their sum is the decoded text.

    Args:
        tokenizer: of transformers; a fast one takes time in proportion to the number of tokens.
        ids: may be endless.
        skip_special_tokens: those have no text then.
    """
    raw = getattr(tokenizer, "backend_tokenizer", None)
    if raw is not None:
        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        for token in ids:
            yield stream.step(raw, token) or ""
        return
    seen: list[int] = []
    before = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):  # the beginning of a character
            yield ""
            continue
        yield text[len(before) :]
        before = text
