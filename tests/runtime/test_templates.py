"""Templates: columns, optional parts, and everything that is not allowed between braces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsloth.runtime.problems import BadRow, DataError
from unsloth.runtime.templates import Template


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{question}", {"question": "a"}, "a"),
        ("{q} {q}", {"q": "a"}, "a a"),
        ("no column", {}, "no column"),
        ("{question} [[Context: {context}]]", {"question": "a", "context": "b"}, "a Context: b"),
        ("{question}[[ ({context})]]!", {"question": "a", "context": ""}, "a!"),
        ("{question}[[ ({context})]]!", {"question": "a", "context": None}, "a!"),
        ("{question}[[ ({context})]]!", {"question": "a", "context": float("nan")}, "a!"),
        ("{question}[[ ({context})]]!", {"question": "a"}, "a!"),
        ("[[{a} and {b}]][[, {c}]]", {"a": "1", "b": " ", "c": "3"}, ", 3"),
        ("[[see [{a}]]]", {"a": "1"}, "see [1]"),
        ("[[two\nlines {a}]]", {"a": "1"}, "two\nlines 1"),
        ("{{a}} {a}", {"a": "{b} [[{c}]]"}, "{a} {b} [[{c}]]"),
        ("{What is it?}", {"What is it?": "a"}, "a"),
        ("{a} + {b} = {c}", {"a": 1, "b": 0.5, "c": True}, "1 + 0.5 = True"),
    ],
)
def test_what_a_template_gives(template: str, row: dict, text: str) -> None:
    assert Template.parse(template).fill(row) == text


@pytest.mark.parametrize(
    "between",
    ["a.__class__", "a.b", "a[0]", "a[b]", "0.real", "a!r", "a!s", "a:>10", "a:{b}", "", " ", "a.__init__.__globals__"],
)
def test_nothing_but_a_column_stands_between_braces(between: str) -> None:
    with pytest.raises(DataError, match=r"is not allowed; braces hold the name of a column|name, and \{\{ stands"):
        Template.parse(f"x {{{between}}} y")
    with pytest.raises(DataError):
        Template.parse(f"x [[{{{between}}}]] y")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a", "expected '}'"),
        ("a}", "Single '}'"),
        ("[[{a}", "is not closed, not opened, or holds another"),
        ("{a}]]", "is not closed, not opened, or holds another"),
        ("[[a [[{b}]] c]]", "is not closed, not opened, or holds another"),
        ("[[always]] {a}", "names no column; it would never be left out"),
        ("[[]]", "names no column"),
    ],
)
def test_what_is_no_template(template: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        Template.parse(template)
    assert message in str(error.value) and repr(template) in str(error.value)


def test_unknown_columns() -> None:
    template = Template.parse("{question}[[ {contxt}]]")
    template.check("prompt_template", ["question", "contxt"])
    with pytest.raises(DataError) as error:
        template.check("prompt_template", ["question", "context", "answer"])
    assert str(error.value) == (
        "prompt_template: unknown column 'contxt', did you mean 'context'? the columns are question, context, answer"
    )
    with pytest.raises(DataError, match=r"unknown column 'question'; the columns are a, b"):
        template.check("prompt_template", ["a", "b"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "column 'a' is null"),
        ("", "column 'a' is empty"),
        (" \n", "column 'a' is empty"),
        (["b"], "column 'a' holds a list, not text"),
        ({"b": 1}, "column 'a' holds an object, not text"),
        ("\ud83d", "column 'a' is not UTF-8 at character 1"),
    ],
)
def test_rows_that_do_not_fit(value: object, message: str) -> None:
    with pytest.raises(BadRow) as error:
        Template.parse("{a}").fill({"a": value})
    assert message in str(error.value)


@given(st.text(), st.text(min_size=1).filter(str.strip))
def test_values_are_never_read_as_templates(literal: str, value: str) -> None:
    escaped = literal.replace("{", "{{").replace("}", "}}").replace("[", "(").replace("]", ")")
    plain = literal.replace("[", "(").replace("]", ")")
    if value.encode(errors="ignore").decode() == value:
        assert Template.parse(f"{escaped}{{a}}").fill({"a": value}) == plain + value


@given(st.text(alphabet="{}[]a.!:0 "))
def test_any_text_is_a_template_or_an_error(text: str) -> None:
    try:
        template = Template.parse(text)
    except DataError:
        return
    assert all(column and not set(column) & set(".[]{}!:") for column in template.columns)
