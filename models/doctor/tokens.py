"""Rules over the tokenizer: special tokens, and whether every token has a row in the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .rule import ERROR, WARNING, Evidence, rule
from .subject import Subject


def ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without those that the tokenizer would put around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def shown(tokenizer: Any, token: int) -> str:
    """A token as a message names it."""
    text = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    return f"{token}" if text is None else f"{text!r} ({token})"


def listed(found: list[str], limit: int = 5) -> str:
    """The first few, and how many more."""
    more = len(found) - limit
    return ", ".join(found[:limit]) + (f" and {more:,} more" if more > 0 else "")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos] != ids(tokenizer, "a")[:1]


def numbers(value: Any) -> list[int]:
    """A token setting, which may be None, a number or a list, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def stop_ids(subject: Subject) -> list[int]:
    """Where generation stops: by the generation settings, else by the configuration."""
    found = numbers(subject.generation.get("eos_token_id"))
    return found or numbers(getattr(subject.text_config, "eos_token_id", None))


@rule(
    "tokens-outside-embedding",
    ERROR,
    "tokenizer config",
    remedy="resize the embedding (model.resize_token_embeddings(len(tokenizer))) and train the new rows, or take the "
    "tokenizer that the model was trained with",
)
def tokens_outside_embedding(subject: Subject) -> Iterator[str]:
    """The tokenizer makes tokens that have no row in the embedding: the lookup fails, on a GPU without saying where."""
    outside = sorted((i, t) for t, i in subject.tokenizer.get_vocab().items() if i >= subject.vocabulary)
    if outside:
        which = listed([f"{token!r} ({number})" for number, token in outside])
        yield f"the embedding has {subject.vocabulary:,} rows; {len(outside):,} tokens lie beyond them: {which}"


@rule(
    "pad-outside-embedding",
    ERROR,
    "tokenizer config",
    remedy="take a padding token that the model has a row for, such as a reserved one, instead of adding one",
    stops=True,
)
def pad_outside_embedding(subject: Subject) -> Iterator[str]:
    """The padding token has no row in the embedding: the first padded batch fails."""
    pad = subject.tokenizer.pad_token_id
    if pad is not None and not 0 <= pad < subject.vocabulary:
        yield f"the padding token is {shown(subject.tokenizer, pad)}; the embedding has {subject.vocabulary:,} rows"


@rule(
    "pad-missing", WARNING, "tokenizer", remedy="set tokenizer.pad_token to a token that nothing else means, never EOS"
)
def pad_missing(subject: Subject) -> Iterator[str]:
    """There is no padding token: libraries then pad with EOS, and some of them leave it out of the loss."""
    if subject.tokenizer.pad_token_id is None:
        yield "the tokenizer has no padding token"


@rule(
    "pad-is-eos",
    ERROR,
    "tokenizer",
    remedy="set tokenizer.pad_token to another token of the vocabulary (a reserved one, or the unknown token)",
)
def pad_is_eos(subject: Subject) -> Iterator[Evidence]:
    """Padding is EOS: what masks padding by its id hides EOS from the loss, and the model never learns to stop."""
    tokenizer = subject.tokenizer
    if tokenizer.eos_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        ours = subject.run is not None and subject.run.trainer == "unsloth"
        place = "; this trainer masks padding by its place, others do by its id" if ours else ""
        yield Evidence(f"both are {shown(tokenizer, tokenizer.eos_token_id)}{place}", WARNING if ours else None)


@rule(
    "eos-missing",
    WARNING,
    "tokenizer",
    remedy="set tokenizer.eos_token to the token that ends a text in the model's own vocabulary",
)
def eos_missing(subject: Subject) -> Iterator[str]:
    """There is no token that ends a text: trained answers have no end, and generation runs to its limit."""
    tokenizer = subject.tokenizer
    if tokenizer.eos_token_id is None:
        yield f"the tokenizer's EOS is {tokenizer.eos_token!r}, without an id"
    elif tokenizer.eos_token_id == tokenizer.unk_token_id:
        yield f"EOS is the unknown token, {shown(tokenizer, tokenizer.eos_token_id)}"


@rule(
    "special-token-split",
    ERROR,
    "tokenizer",
    remedy="register it: tokenizer.add_special_tokens({'eos_token': …}), with a row in the embedding",
)
def special_token_split(subject: Subject) -> Iterator[str]:
    """A special token written in a text does not come back as one token; templates and trainers write it in texts."""
    tokenizer = subject.tokenizer
    for name in ("bos_token", "eos_token"):
        text, number = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if text and number is not None and (found := ids(tokenizer, text)) != [number]:
            pieces = [str(tokenizer.convert_ids_to_tokens(i)) for i in found]
            yield f"{name} {text!r} is token {number}, and is read as {len(found)}: {listed(pieces, 8)}"


@rule(
    "eos-ids-disagree",
    WARNING,
    "tokenizer config",
    remedy="set eos_token_id in generation_config.json (a list may hold several) to the token that training ends "
    "texts with",
)
def eos_ids_disagree(subject: Subject) -> Iterator[str]:
    """Texts are trained to end with one token, and generation stops at another."""
    eos, stops = subject.tokenizer.eos_token_id, stop_ids(subject)
    if eos is not None and stops and eos not in stops:
        where = listed([shown(subject.tokenizer, i) for i in stops])
        yield f"the tokenizer's EOS is {shown(subject.tokenizer, eos)}; generation stops at {where}"


@rule("bos-ids-disagree", WARNING, "tokenizer config", remedy="set bos_token_id in config.json to the tokenizer's")
def bos_ids_disagree(subject: Subject) -> Iterator[str]:
    """Configuration and tokenizer call different tokens BOS: prompts made from the one miss what the other expects."""
    tokenizer, ours = subject.tokenizer, getattr(subject.text_config, "bos_token_id", None)
    if isinstance(ours, int) and tokenizer.bos_token_id not in (None, ours):
        yield f"config.json says {shown(tokenizer, ours)}, the tokenizer {shown(tokenizer, tokenizer.bos_token_id)}"
