"""A tokenizer as GGUF holds it: tokens and their kinds, merges or scores, special tokens, the chat template.

Two kinds of byte-pair encoding are known there: "gpt2", over characters that stand for bytes, with merges and the name
of the rule that splits text before them; and "llama", sentencepiece's, in which a token's score says when it is merged.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import gguf
from gguf.constants import TokenType
from transformers import PreTrainedTokenizerBase

from ..source import ModelError

logger = logging.getLogger(__name__)

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad", "sep": "sep"}


def write_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, *, pre: str | None = None
) -> None:
    """Write a tokenizer.

    Args:
        writer: in which nothing is written yet.
        tokenizer: a fast one, of byte-pair encoding.
        size: rows of the embedding; those that no token has get placeholders.
        pre: llama.cpp's name of the rule that splits texts, where it is known; None finds it out.

    Raises:
        ModelError: for a tokenizer that GGUF has no form for.
    """
    raw: Any = getattr(tokenizer, "backend_tokenizer", None)
    if raw is None:
        raise ModelError("GGUF needs a fast tokenizer (tokenizer.json), from which its merges are read")
    state = json.loads(raw.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"a {model.get('type')} tokenizer cannot be written into a GGUF: byte-pair encodings can")
    names = {**model["vocab"], **{token["content"]: token["id"] for token in state["added_tokens"]}}
    if len(names) and max(names.values()) >= size:
        raise ModelError(f"the tokenizer has {max(names.values()) + 1} tokens, and the embedding {size} rows")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    of_bytes = not model.get("byte_fallback")
    tokens, kinds = _tokens(names, state["added_tokens"], tokenizer, size, of_bytes)
    writer.add_tokenizer_model("gpt2" if of_bytes else "llama")
    writer.add_tokenizer_pre((pre or _splitting(state)) if of_bytes else "default")
    writer.add_token_list(tokens)
    if of_bytes:
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(_blank(part) for part in pair) for pair in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_token_types(kinds)
    _special(writer, tokenizer)
    writer.add_add_space_prefix(not of_bytes and _prepends(state))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(
    names: dict[str, int], added: list[dict[str, Any]], tokenizer: Any, size: int, of_bytes: bool
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    for text, number in names.items():
        tokens[number] = text
        is_byte = not of_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kinds[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in added:
        kinds[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    if not of_bytes and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Sentencepiece merges the pair whose result has the highest score; the order of the merges says the same."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair), place)
    return [-float(rank.get(token, 0)) for token in tokens]


def _blank(part: str) -> str:
    """Merges stand one a line with a blank between their parts: a blank inside becomes the byte's character."""
    return part.replace(" ", chr(ord(" ") + 256))


def _special(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    for name, attribute in _SPECIAL.items():
        number = getattr(tokenizer, f"{attribute}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    # By what it does, because a tokenizer's settings do not always say it.
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])


def _prepends(state: dict[str, Any]) -> bool:
    """Whether a text begins with a blank that nobody wrote, as sentencepiece's do."""
    steps = [state.get("normalizer") or {}, state.get("pre_tokenizer") or {}]
    steps += [inner for step in steps for inner in step.get("normalizers", []) + step.get("pretokenizers", [])]
    return any(s.get("type") == "Prepend" or s.get("prepend_scheme") in ("always", "first") for s in steps)


def _splitting(state: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which text is split before it is encoded.

    The rules are regular expressions in tokenizer.json, and names in llama.cpp.
    """
    step = state.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    types = [s.get("type") for s in steps]
    pattern = next((s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"), "")
    if types == ["ByteLevel"]:
        return "gpt-2"
    if types == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if r"\p{Lu}" in pattern and r"\p{N}|" in pattern:
        return "tekken"
    if r"\p{N}{1,3}" in pattern and r"\p{Lu}" not in pattern:
        return "llama-bpe"
    if r"|\p{N}|" in pattern:
        return "qwen2"
    logger.warning(
        "how this tokenizer splits text has no name in llama.cpp that is known here: the file says 'default', and some "
        "texts will be encoded otherwise there"
    )
    return "default"
