"""Shapes: what columns are taken for, and what rows become."""

from __future__ import annotations

from typing import Any

import pytest

from unsloth.runtime.problems import BadRow, DataError
from unsloth.runtime.rows import Shape, Templates, detect


def found(*rows: dict[str, Any], text_field: str = "text", **templates: str) -> Shape:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return detect("rows", columns, rows, templates=Templates.parse(**templates), text_field=text_field)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
CHAT = [user("a"), assistant("b")]
PAIR = {"prompt": [user("a")], "completion": [assistant("b")]}

DETECTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "messages": ("a conversation", {"messages": CHAT, "id": 1}, {"messages": CHAT}),
    "conversations with roles": ("a conversation", {"conversations": CHAT}, {"messages": CHAT}),
    "messages as JSON": (
        "a conversation",
        {"messages": '[{"role": "assistant", "content": "b"}]'},
        {"messages": CHAT[1:]},
    ),
    "ShareGPT": ("ShareGPT", {"conversations": SHAREGPT}, {"messages": CHAT}),
    "ShareGPT called messages": ("ShareGPT", {"messages": SHAREGPT}, {"messages": CHAT}),
    "ShareGPT with a system message": (
        "ShareGPT",
        {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]},
        {"messages": [system("s"), *CHAT]},
    ),
    "ShareGPT with a column for it": (
        "ShareGPT",
        {"system": "s", "conversations": SHAREGPT},
        {"messages": [system("s"), *CHAT]},
    ),
    "an empty system message": ("a conversation", {"messages": [system(""), *CHAT]}, {"messages": CHAT}),
    "content in parts": (
        "a conversation",
        {"messages": [user("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
        {"messages": CHAT},
    ),
    "a call of a tool": (
        "a conversation",
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}], "tools": "[]"},
        {"messages": [user("a"), {**assistant(""), "tool_calls": [{}]}], "tools": "[]"},
    ),
    "Alpaca": ("Alpaca", {"instruction": "a", "output": "b"}, PAIR),
    "Alpaca with an empty input": ("Alpaca", {"instruction": "a", "input": "", "output": "b"}, PAIR),
    "Alpaca with input": (
        "Alpaca",
        {"instruction": "a", "input": "c", "output": "b", "text": "all of it"},
        {**PAIR, "prompt": [user("a\n\nc")]},
    ),
    "Alpaca with a system column": (
        "Alpaca",
        {"instruction": "a", "input": "", "output": "b", "system": "s"},
        {**PAIR, "prompt": [system("s"), user("a")]},
    ),
    "Dolly": (
        "Alpaca",
        {"instruction": "a", "context": "c", "response": "b", "category": "d"},
        {**PAIR, "prompt": [user("a\n\nc")]},
    ),
    "prompt and completion": ("a prompt and its completion", {"prompt": "a", "completion": "b"}, None),
    "prompt and completion of messages": ("a prompt and its completion", PAIR, PAIR),
    "question and answer": ("a question and its answer", {"question": "a", "answer": "b"}, PAIR),
    "query and response": ("a question and its answer", {"query": "a", "response": "b"}, PAIR),
    "capital letters": ("a question and its answer", {"Question": "a", " Answer ": "b"}, PAIR),
    "prompt and response": ("a question and its answer", {"prompt": "a", "response": "b"}, PAIR),
    "input and output": ("a question and its answer", {"input": "a", "output": "b"}, PAIR),
    "problem and solution": ("a question and its answer", {"problem": "a", "solution": "b"}, PAIR),
    "text": ("plain text", {"text": "a", "source": "b"}, {"text": "a"}),
    "tokens": ("tokens", {"input_ids": [1, 2], "labels": [1, 2]}, None),
}


@pytest.mark.parametrize("case", DETECTED)
def test_shapes_are_known_by_their_columns(case: str) -> None:
    name, row, becomes = DETECTED[case]
    shape = found(row)
    assert shape.name == name and shape.convert(row) == (row if becomes is None else becomes)
    assert set(shape.columns) <= row.keys()


@pytest.mark.parametrize("name", ["human", "Human", "user"])
def test_names_of_the_user(name: str) -> None:
    row = {"conversations": [{"from": name, "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert found(row).convert(row) == {"messages": CHAT}


def test_a_text_column_that_was_asked_for_wins() -> None:
    row = {"question": "a", "answer": "b", "body": "c"}
    assert found(row, text_field="body").convert(row) == {"body": "c"}


def test_the_first_row_that_shows_it_decides() -> None:
    rows = [{"conversations": None}, {"conversations": []}, {"conversations": SHAREGPT}]
    assert found(*rows).name == "ShareGPT"


def test_a_column_called_messages_may_be_something_else() -> None:
    row = {"label": "spam", "messages": "win a prize", "text": "a"}
    assert found(row).name == "plain text"


def test_what_only_later_rows_have() -> None:
    """The columns of JSON are those of the first rows; what comes after is not lost."""
    shape = found({"instruction": "a", "output": "b"})
    row = {"instruction": "a", "input": "c", "output": "b", "system": "s"}
    assert shape.convert(row) == {**PAIR, "prompt": [system("s"), user("a\n\nc")]}


def test_no_shape_fits() -> None:
    with pytest.raises(DataError) as error:
        found({"frage": "a", "antwort": "b"})
    said = str(error.value)
    assert "has the columns antwort, frage, and none of these: messages (a conversation); conversations (Sh" in said
    assert "prompt_template and completion_template" in said


def test_templates_win_over_names() -> None:
    row = {"question": "a", "answer": "b", "why": "c"}
    shape = found(row, prompt="{why}", completion="{question}")
    assert (shape.name, shape.columns) == ("by templates", ("question", "why"))
    assert shape.convert(row) == {"prompt": [user("c")], "completion": [assistant("a")]}


def test_a_system_template_beside_found_pairs() -> None:
    row = {"question": "a", "answer": "b", "topic": "sums"}
    assert found(row, system="About {topic}.").convert(row)["prompt"] == [system("About sums."), user("a")]
    with pytest.raises(DataError, match="system_template is for pairs; these rows are plain text"):
        found({"text": "a"}, system="Be brief.")
    with pytest.raises(DataError, match="rows: system_template: unknown column 'topik', did you mean 'topic'"):
        found(row, system="About {topik}.")


def test_templates_come_in_pairs() -> None:
    with pytest.raises(DataError, match="prompt_template needs a completion_template"):
        Templates.parse(prompt="{a}")
    with pytest.raises(DataError, match="completion_template needs a prompt_template"):
        Templates.parse(completion="{a}")


def test_a_prompt_of_optional_parts_may_be_empty() -> None:
    shape = found({"a": "", "b": "x"}, prompt="[[{a}]]", completion="{b}")
    with pytest.raises(BadRow, match="the prompt is empty"):
        shape.convert({"a": "", "b": "x"})


def test_a_template_looks_nowhere_but_in_the_row() -> None:
    for template in ("{q.__class__}", "{q[0]}", "{q!r}"):
        with pytest.raises(DataError, match="is not allowed"):
            Templates.parse(prompt=template, completion="{q}")
