"""A conversation in the terminal, as it is written; base and adapter answer side by side.

Both are one model: the base is the adapter's model with its adapters switched off. Each has its own conversation, with
its own answers in it, and its own cache of keys and values.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache

from ..models.parts import unwrapped
from . import responses
from .generation.cache import cache_argument
from .problems import DataError
from .token_texts import pieces

RESET, LEAVE = "/reset", ("/exit", "/quit")
PROMPT = "> "


@dataclass(frozen=True)
class Manner:
    """How answers are drawn.

    Attributes:
        max_new_tokens: of one answer.
        temperature: 0 takes the most likely token.
        top_p: of the most likely tokens, those that together have this probability (Holtzman et al. 2019,
            arXiv:1904.09751).
        seed: of the draws; the same question gets the same answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 3407


@dataclass
class Speaker:
    """One side of the comparison.

    Attributes:
        name: "base" or "adapter".
        state: a context in which the model is that side.
        messages: the conversation so far.
    """

    name: str
    state: Callable[[], AbstractContextManager[Any]] = nullcontext
    messages: list[dict[str, str]] = field(default_factory=list)


def speakers(model: Any, *, compare: bool = True) -> list[Speaker]:
    """Base and adapter, or the model alone."""
    if not hasattr(model, "peft_config"):
        return [Speaker("model")]
    adapter = Speaker("adapter")
    return [Speaker("base", model.disable_adapter), adapter] if compare else [adapter]


def chat(
    model: Any,
    tokenizer: Any,
    *,
    manner: Manner | None = None,
    system: str | None = None,
    compare: bool = True,
    lines: Iterable[str] | None = None,
    console: Console | None = None,
) -> list[Speaker]:
    """Answer line after line, until there are no more.

    Args:
        model: a causal language model, with adapters or without.
        tokenizer: its own. Without a chat template lines are continued as plain text.
        system: the system message.
        compare: let the base answer as well.
        lines: what the user says; None asks in the terminal, or reads what is piped in.
        console: where answers go.

    Returns:
        the speakers with their conversations.
    """
    manner, console = manner or Manner(), console or Console()
    sides = speakers(model, compare=compare)
    opening = [{"role": "system", "content": system}] if system else []
    for side in sides:
        side.messages = list(opening)
    was_training = model.training
    model.eval()
    try:
        # What is compiled for training would be compiled again for every length.
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            for line in _asked(console) if lines is None else lines:
                text = line.strip()
                if text in LEAVE:
                    break
                if text == RESET:
                    for side in sides:
                        side.messages = list(opening)
                elif text:
                    for side in sides:
                        side.messages.append({"role": "user", "content": text})
                    _answer(model, tokenizer, sides, manner, console)
    finally:
        model.train(was_training)
    return sides


def _asked(console: Console) -> Iterator[str]:
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                console.print(Text(PROMPT + line.strip(), style="bold"), soft_wrap=True)
            yield line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  history and editing
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            console.print()
            return


# -- answering ---------------------------------------------------------------------------------------------------------


def _answer(model: Any, tokenizer: Any, sides: list[Speaker], manner: Manner, console: Console) -> None:
    """Let all sides answer: in columns that grow together in a terminal, elsewhere one after the other."""
    streams = [_stream(model, tokenizer, side, manner) for side in sides]
    if len(sides) > 1 and console.is_terminal:
        texts = ["" for _ in sides]
        with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
            for parts in itertools.zip_longest(*streams, fillvalue=""):
                texts = [text + part for text, part in zip(texts, parts, strict=True)]
                live.update(_columns(sides, texts))
    else:
        texts = []
        for side, stream in zip(sides, streams, strict=True):
            if len(sides) > 1:
                console.print(Text(f"{side.name:<8} ", style="dim"), end="")
            text = ""
            for part in stream:
                text += part
                console.print(Text(part), end="", soft_wrap=True)
            console.print()
            texts.append(text)
    for side, text in zip(sides, texts, strict=True):
        side.messages.append({"role": "assistant", "content": text.strip()})


def _columns(sides: list[Speaker], texts: list[str]) -> Table:
    table = Table(expand=True, show_edge=False, pad_edge=False)
    for side in sides:
        table.add_column(side.name, ratio=1, overflow="fold")
    table.add_row(*(Text(text.strip()) for text in texts))
    return table


def _stream(model: Any, tokenizer: Any, side: Speaker, manner: Manner) -> Iterator[str]:
    ids = _prompt(model, tokenizer, side, manner.max_new_tokens)
    return pieces(
        tokenizer, generate(model, ids, manner, stop_tokens(model, tokenizer), side.state), skip_special_tokens=True
    )


def _prompt(model: Any, tokenizer: Any, side: Speaker, reserve: int) -> list[int]:
    """The conversation's tokens; its oldest questions and answers go where it grows longer than the model reads."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    while True:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(side.messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = tokenizer("\n".join(message["content"] for message in side.messages)).input_ids
        first = next(i for i, message in enumerate(side.messages) if message["role"] != "system")
        if limit is None or len(ids) + reserve <= limit or len(side.messages) - first <= 2:
            return ids[-limit:] if limit is not None else ids
        del side.messages[first : first + 2]


def generate(
    model: Any,
    ids: list[int],
    manner: Manner,
    stop: set[int],
    state: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[int]:
    """Tokens that follow ``ids``, one at a time, up to one of ``stop``, which is not among them.

    ``state`` is entered for every token, so that generations of base and adapter can take turns.
    """
    device = next(model.parameters()).device
    draws = torch.Generator().manual_seed(manner.seed)
    # Newer transformers call `cache` what was `past_key_values`, and warn of the old name.
    cached = {cache_argument(unwrapped(model)) or "past_key_values": DynamicCache()}
    step = torch.tensor([ids], device=device)
    for _ in range(manner.max_new_tokens):
        with state():
            output = model(input_ids=step, **cached, use_cache=True, logits_to_keep=1)
        token = _drawn(output.logits[0, -1].float().cpu(), manner, draws)
        if token in stop:
            return
        yield token
        step = torch.tensor([[token]], device=device)


def _drawn(logits: torch.Tensor, manner: Manner, draws: torch.Generator) -> int:
    if manner.temperature <= 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / manner.temperature, -1).sort(descending=True)
    kept = probabilities.cumsum(-1) - probabilities < manner.top_p  # at least the first
    return int(order[torch.multinomial(probabilities * kept, 1, generator=draws)])


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """What ends an answer: EOS, of tokenizer and model, and the chat template's end of a turn."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
    if tokenizer.chat_template:
        with contextlib.suppress(DataError):
            ids = tokenizer(responses.find_markers(tokenizer).stop, add_special_tokens=False).input_ids
            found |= set(ids) if len(ids) == 1 else set()
    return found - {None}
