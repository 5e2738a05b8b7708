"""Rows: what can be read, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime.tiny import conversations
from unsloth.runtime.data import DataError, is_conversational, load_rows


def file(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_conversations_from_json_lines(tmp_path) -> None:
    rows = load_rows(file(tmp_path, "a.jsonl", "\n".join(json.dumps(r) for r in conversations(3))))
    assert len(rows) == 3 and is_conversational(rows)
    assert rows[2]["messages"] == conversations(3)[2]["messages"]


def test_text_from_csv(tmp_path) -> None:
    rows = load_rows(file(tmp_path, "a.csv", "text\nhello\nworld\n"))
    assert rows["text"][:] == ["hello", "world"] and not is_conversational(rows)


def test_another_text_column(tmp_path) -> None:
    name = file(tmp_path, "a.csv", "body\nhello\n")
    assert len(load_rows(name, text_field="body")) == 1
    with pytest.raises(DataError, match=r"has the columns body, and none of these: messages \(a conversation\)"):
        load_rows(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "text\n", "has no rows"),
        ("a.jsonl", '{"messages": [}\n', "cannot be read"),
        ("a.docx", "x", r"is no \.json, \.jsonl, \.csv, \.parquet file"),
    ],
)
def test_what_is_wrong(tmp_path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(file(tmp_path, name, text))


def test_no_such_data(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        load_rows(str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="nobody/nothing"):
        load_rows("nobody/nothing")
