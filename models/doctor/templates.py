"""Rules over the chat template: what it puts before, between and after messages, found by rendering."""

from __future__ import annotations

from collections.abc import Iterator

import jinja2

from ..turns import ANSWERS, QUESTIONS, Markers, TemplateError, find_markers, known_chat, rendered
from .rule import ERROR, WARNING, Evidence, rule
from .subject import Subject
from .tokens import adds_bos, ids, listed, shown, stop_ids


def markers_of(subject: Subject) -> Markers | None:
    """What stands around an answer; None where a rule of its own says why that cannot be told."""
    try:
        return find_markers(subject.tokenizer)
    except (TemplateError, jinja2.TemplateError):
        return None


def turn_end(subject: Subject) -> int | None:
    """The token that ends an answer, where it is a single one."""
    markers = markers_of(subject) if not subject.lacks("template") else None
    found = ids(subject.tokenizer, markers.stop) if markers is not None and markers.stop else []
    return found[0] if len(found) == 1 else None


@rule(
    "template-drops-messages",
    ERROR,
    "template",
    remedy="correct the template, or replace it: --chat-template chatml (llama-3, gemma, mistral, …)",
    stops=True,
)
def template_drops_messages(subject: Subject) -> Iterator[str]:
    """The template cannot render a plain conversation, or leaves out, repeats or changes its messages."""
    try:
        whole = rendered(subject.tokenizer, known_chat())
    except jinja2.TemplateError as error:
        yield f"two questions and two answers are refused: {error}"
        return
    for text in (*QUESTIONS, *ANSWERS):
        if (count := whole.count(text)) != 1:
            what = "a question" if text in QUESTIONS else "an answer"
            yield f"{what} comes out {count} times: {whole[:160]!r}"


@rule(
    "template-drops-system",
    WARNING,
    "template",
    remedy="put the rules into the first question, or take a template with a system turn",
)
def template_drops_system(subject: Subject) -> Iterator[str]:
    """A system message vanishes without an error: rules that the data has are not trained on."""
    try:
        whole = rendered(subject.tokenizer, [{"role": "system", "content": "SYSTEMRULES"}, *known_chat()])
    except jinja2.TemplateError:  # which at least says so
        return
    if "SYSTEMRULES" not in whole:
        yield f"rendered with a system message, it is not there: {whole[:120]!r}"


@rule(
    "generation-prompt-missing",
    ERROR,
    "template",
    remedy="end the template with {% if add_generation_prompt %}…{% endif %}, writing what stands before an answer",
)
def generation_prompt_missing(subject: Subject) -> Iterator[str]:
    """The template ignores add_generation_prompt: asked a question, the model has to write its own header first, or
    goes on with the question."""
    if (around := _around(subject)) is None:
        return
    asked, prompted, before = around
    if prompted == asked and before != asked and before.removeprefix(asked).strip():
        yield (
            f"after a question it writes {asked!r} with add_generation_prompt or without, and answers begin after "
            f"{before.removeprefix(asked)!r} more"
        )


@rule(
    "generation-prompt-always",
    ERROR,
    "template",
    remedy="write the header of the assistant's turn behind {% if add_generation_prompt %} only",
)
def generation_prompt_always(subject: Subject) -> Iterator[str]:
    """The template opens another answer behind every conversation: trained on, it teaches to go on after the end."""
    if (around := _around(subject)) is None:
        return
    start = _around_start(around)
    last = rendered(subject.tokenizer, known_chat()).partition(ANSWERS[1])[2]
    if start.strip() and start.strip() in last:
        yield f"behind the last answer it writes {last!r} without being asked for a generation prompt"


@rule(
    "generation-prompt-differs",
    WARNING,
    "template",
    remedy="have the generation prompt write exactly what stands before an answer in a conversation",
)
def generation_prompt_differs(subject: Subject) -> Iterator[str]:
    """The generation prompt is not what stands before an answer in training: the model is asked in another way than
    it was taught."""
    if (around := _around(subject)) is None:
        return
    asked, prompted, before = around
    if prompted != asked and not before.startswith(prompted):
        yield f"the generation prompt is {prompted!r}, and in a conversation an answer stands behind {before!r}"


@rule(
    "template-without-turn-end",
    ERROR,
    "template",
    remedy="end the assistant's message with eos_token, or the token that ends a turn",
)
def template_without_turn_end(subject: Subject) -> Iterator[str]:
    """Nothing ends an answer: the model cannot learn to stop."""
    markers = markers_of(subject)
    if markers is not None and not markers.stop:
        yield f"an answer begins after {markers.start!r} and nothing stands behind the last one"


@rule(
    "turn-end-is-not-eos",
    ERROR,
    "template tokenizer config",
    remedy="add the turn's end to eos_token_id in generation_config.json, or make it tokenizer.eos_token",
)
def turn_end_is_not_eos(subject: Subject) -> Iterator[Evidence]:
    """Answers end with one token and generation stops at another: it runs on, into turns of its own invention."""
    end = turn_end(subject)
    stops = stop_ids(subject)
    known = stops or [i for i in [subject.tokenizer.eos_token_id] if i is not None]
    if end is None or end in known or not known:
        return
    tokenizer = subject.tokenizer
    # Applications that stop at the tokenizer's EOS are not misled; generate() is.
    mild = end == tokenizer.eos_token_id or subject.run is not None
    yield Evidence(
        f"the template ends an answer with {shown(tokenizer, end)}; generation stops at "
        f"{listed([shown(tokenizer, i) for i in known])}",
        WARNING if mild else None,
    )


@rule(
    "turn-end-is-no-token",
    WARNING,
    "template tokenizer",
    remedy="take a template whose marks are in this vocabulary, or add them as special tokens and train their rows",
)
def turn_end_is_no_token(subject: Subject) -> Iterator[str]:
    """What ends an answer is no token of this tokenizer but a piece of text: the template belongs to another model, and
    no stop token can stand for it."""
    markers = markers_of(subject)
    if markers is None or not markers.stop:
        return
    pieces = subject.tokenizer.convert_ids_to_tokens(ids(subject.tokenizer, markers.stop))
    known = {t for t in subject.tokenizer.all_special_tokens if t} | set(subject.tokenizer.get_added_vocab())
    if len(pieces) > 1 and not any(mark in markers.stop for mark in known):
        yield f"{markers.stop!r} is read as {len(pieces)} tokens: {listed([str(p) for p in pieces], 8)}"


@rule(
    "pad-hides-turn-end",
    ERROR,
    "template tokenizer",
    remedy="set tokenizer.pad_token to a token that no text holds",
)
def pad_hides_turn_end(subject: Subject) -> Iterator[Evidence]:
    """Padding is the token that ends an answer: what masks padding by its id hides every end from the loss."""
    tokenizer, end = subject.tokenizer, turn_end(subject)
    if end is not None and end == tokenizer.pad_token_id and end != tokenizer.eos_token_id:
        ours = subject.run is not None and subject.run.trainer == "unsloth"
        yield Evidence(f"both are {shown(tokenizer, end)}", WARNING if ours else None)


@rule(
    "bos-doubled",
    ERROR,
    "template tokenizer",
    remedy="have the template write bos_token once, before the first message",
)
def bos_doubled(subject: Subject) -> Iterator[str]:
    """A rendered conversation begins with BOS twice: a start that the model has never seen."""
    bos = subject.tokenizer.bos_token_id
    found = ids(subject.tokenizer, _rendered(subject))
    if bos is not None and found[:2] == [bos, bos]:
        yield f"the template's text begins with {shown(subject.tokenizer, bos)} twice"


@rule(
    "bos-missing",
    WARNING,
    "template tokenizer",
    remedy="write {{ bos_token }} at the template's start",
)
def bos_missing(subject: Subject) -> Iterator[str]:
    """The tokenizer puts BOS before every text, and the template, whose text is tokenised without it, does not: some
    models fall apart without their BOS."""
    tokenizer = subject.tokenizer
    if not adds_bos(tokenizer):
        return
    text = _rendered(subject)
    if text and tokenizer.bos_token_id not in ids(tokenizer, text)[:1]:
        yield f"plain texts begin with {shown(tokenizer, tokenizer.bos_token_id)}, conversations with {text[:40]!r}"


def _rendered(subject: Subject) -> str:
    try:
        return rendered(subject.tokenizer, known_chat())
    except jinja2.TemplateError:
        return ""


def _around(subject: Subject) -> tuple[str, str, str] | None:
    """What follows a first question: alone, with a generation prompt, and before its answer."""
    chat = known_chat()
    try:
        whole = rendered(subject.tokenizer, chat)
        asked = rendered(subject.tokenizer, chat[:1])
        prompted = rendered(subject.tokenizer, chat[:1], add_generation_prompt=True)
    except jinja2.TemplateError:
        return None
    if not all(whole.count(text) == 1 for text in (*QUESTIONS, *ANSWERS)) or QUESTIONS[0] not in asked:
        return None
    before = whole.partition(QUESTIONS[0])[2].partition(ANSWERS[0])[0]
    return asked.partition(QUESTIONS[0])[2], prompted.partition(QUESTIONS[0])[2], before


def _around_start(around: tuple[str, str, str]) -> str:
    """The header of an answer: what stands before one and not behind a question's own end."""
    asked, prompted, before = around
    if prompted != asked and prompted.startswith(asked):
        return prompted.removeprefix(asked)
    # A template that always opens an answer leaves no difference; its last line is the header.
    lines = before.rstrip("\n").split("\n")
    return lines[-1] if len(lines) > 1 else ""
