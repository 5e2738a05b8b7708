"""Data: what can be read, what is said about the rest, and which rows are left out."""

from __future__ import annotations

import contextlib
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.runtime.tiny import conversations
from unsloth.runtime import data
from unsloth.runtime.data import DataError, Templates, is_conversational, load_data, load_rows

PAIRS = [
    {"question": "What is 1 + 1?", "answer": "2, as “ever”"},
    {"question": "Say it\nin two lines", "answer": 'A "quoted" word'},
    {"question": "Größe?", "answer": "1,5 m; or\tso"},
]


def file(tmp_path: Path, name: str, text: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def separated(path: Path, rows: list[dict[str, Any]], delimiter: str, encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def sheet(path: Path, rows: list[list[Any]], **more: list[list[Any]]) -> None:
    book = openpyxl.Workbook()
    book.active.title = "First"
    for title, content in {"First": rows, **more}.items():
        page = book[title] if title in book.sheetnames else book.create_sheet(title)
        for row in content:
            page.append(row)
    book.save(path)


def ipc(path: Path, rows: list[dict[str, Any]], open_writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], Any]]] = {
    "json list": (".json", lambda p, rows: p.write_text(json.dumps(rows, indent=2), encoding="utf-8")),
    "json columns": (".json", lambda p, rows: p.write_text(json.dumps(columns(rows)), encoding="utf-8")),
    "json wrapped": (".json", lambda p, rows: p.write_text(json.dumps({"data": rows}), encoding="utf-8")),
    "json lines": (".jsonl", lambda p, rows: p.write_text(lines(rows), encoding="utf-8")),
    "json lines, bom": (".jsonl", lambda p, rows: p.write_text(lines(rows), encoding="utf-8-sig")),
    "json lines called json": (".json", lambda p, rows: p.write_text(lines(rows), encoding="utf-8")),
    "json list called jsonl": (".jsonl", lambda p, rows: p.write_text(json.dumps(rows, indent=2), encoding="utf-8")),
    "csv": (".csv", lambda p, rows: separated(p, rows, ",")),
    "csv, semicolons": (".csv", lambda p, rows: separated(p, rows, ";", "utf-8-sig")),
    "csv, utf-16": (".CSV", lambda p, rows: separated(p, rows, "\t", "utf-16")),
    "tsv": (".tsv", lambda p, rows: separated(p, rows, "\t")),
    "excel": (".xlsx", lambda p, rows: sheet(p, [list(rows[0]), *(list(row.values()) for row in rows)])),
    "parquet": (".parquet", lambda p, rows: pq.write_table(pa.Table.from_pylist(rows), p)),
    "arrow file": (".arrow", lambda p, rows: ipc(p, rows, pa.ipc.new_file)),
    "arrow stream": (".arrow", lambda p, rows: ipc(p, rows, pa.ipc.new_stream)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, writer: str) -> None:
    end, write = WRITERS[writer]
    path = tmp_path / f"rows{end}"
    write(path, PAIRS)
    found = load_data(str(path), strict=True)
    assert found.shape.name == "a question and its answer" and found.problems.count == 0
    assert [row["prompt"][0]["content"] for row in found.rows] == [row["question"] for row in PAIRS]
    assert [row["completion"][0]["content"] for row in found.rows] == [row["answer"] for row in PAIRS]


@pytest.mark.parametrize("writer", WRITERS)
def test_conversations_in_every_format(tmp_path, writer: str) -> None:
    """Where a cell holds text only, as JSON."""
    end, write = WRITERS[writer]
    path, rows = tmp_path / f"rows{end}", conversations(3)
    flat = end.lower() in (".csv", ".tsv", ".xlsx")
    write(path, [{"messages": json.dumps(row["messages"])} for row in rows] if flat else rows)
    assert list(load_rows(str(path))) == rows


def test_text_files_have_a_row_a_line(tmp_path) -> None:
    found = load_data(file(tmp_path, "a.txt", "one\r\n\ntwo\nGröße"))
    assert found.rows["text"][:] == ["one", "two", "Größe"] and found.problems.count == 0


def test_hub_data_sets_are_recognised_as_well(monkeypatch) -> None:
    monkeypatch.setattr(data, "load_dataset", lambda name, config, split: Dataset.from_list([*PAIRS, {"answer": "x"}]))
    found = load_data("somebody/pairs")
    assert len(found.rows) == 3 and "somebody/pairs:4: column 'question' is null" in str(found)


def test_tokens_of_the_hub_stay_as_they_are(monkeypatch) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    monkeypatch.setattr(data, "load_dataset", lambda name, config, split: rows)
    assert load_rows("somebody/tokens") is rows


def test_rows_of_different_columns_become_one_table(tmp_path) -> None:
    """More rows than a batch, and what only one of them has."""
    rows = conversations(2500)
    rows[1700]["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "add"}}]
    rows[2400]["tools"] = [{"name": "add"}]
    found = load_rows(file(tmp_path, "a.jsonl", lines(rows)))
    assert len(found) == 2500 and found[2499]["messages"][0]["content"] == "What is 2499 + 2499?"
    assert found[1700]["messages"][1]["tool_calls"][0]["function"]["name"] == "add" and found[2400]["tools"]


def test_what_a_table_cannot_hold(tmp_path) -> None:
    rows = conversations(2)
    for row, value in zip(rows, [3, "three"], strict=True):
        row["messages"][1]["tool_calls"] = [{"function": {"arguments": {"x": value}}}]
    with pytest.raises(DataError, match=r"a\.jsonl': messages hold values of different types"):
        load_rows(file(tmp_path, "a.jsonl", lines(rows)))


# -- Excel and CSV have their ways -------------------------------------------------------------------------------------


def test_a_sheet_is_chosen_by_its_name(tmp_path) -> None:
    path = tmp_path / "a.xlsx"
    sheet(path, [["text"], ["first"]], Notes=[["text"], ["second"]])
    found = load_data(str(path))
    assert found.rows["text"][:] == ["first"] and "a.xlsx, sheet First: 1 row, plain text (text)" in str(found)
    assert load_rows(str(path), config="Notes")["text"][:] == ["second"]
    with pytest.raises(DataError, match="no sheet 'Nots', did you mean 'Notes'\\? its sheets are First, Notes"):
        load_rows(str(path), config="Nots")


def test_cells_that_are_no_text(tmp_path) -> None:
    path = tmp_path / "a.xlsx"
    rows = [[], ["question", "answer", None], ["1 + 1?", 2], ["half?", 0.5], [], ["broken", "#N/A"], ["none", None]]
    sheet(path, rows)
    found = load_data(str(path))
    assert [row["completion"][0]["content"] for row in found.rows] == ["2", "0.5"]
    assert found.problems.lines == [
        f"{path}:6: cell B6 holds Excel's error #N/A",
        f"{path}:7: column 'answer' is null",
    ]


def test_long_fields_and_the_limit_of_the_csv_module(tmp_path) -> None:
    before = csv.field_size_limit()
    long = "word " * 60_000
    assert load_rows(file(tmp_path, "a.csv", f"text,n\n{long},1\n"))["text"][:] == [long]
    assert csv.field_size_limit() == before


# -- bad rows ----------------------------------------------------------------------------------------------------------

GOOD = '{"question": "a", "answer": "b"}'
ASK = {"role": "user", "content": "a"}


def chat(*messages: dict[str, Any]) -> str:
    return json.dumps({"messages": messages})


CHAT = chat(ASK, {"role": "assistant", "content": "b"})

BAD_ROWS = {
    "null field": ("a.jsonl", [GOOD, '{"question": null, "answer": "b"}'], 2, "column 'question' is null"),
    "missing field": ("a.jsonl", [GOOD, '{"answer": "b"}'], 2, "column 'question' is null"),
    "empty field": ("a.jsonl", [GOOD, '{"question": "a", "answer": " "}'], 2, "column 'answer' is empty"),
    "not a number": ("a.jsonl", [GOOD, '{"question": "a", "answer": NaN}'], 2, "column 'answer' is null"),
    "a number": ("a.jsonl", [GOOD, '{"question": "a", "answer": 2}'], 2, "'answer' holds the number 2, not text"),
    "a list": ("a.jsonl", [GOOD, '{"question": "a", "answer": ["b"]}'], 2, "'answer' holds a list, not text"),
    "broken JSON": ("a.jsonl", [GOOD, "", '{"question": "a", '], 3, "not JSON: "),
    "JSON that is no object": ("a.jsonl", [GOOD, '["a", "b"]'], 2, "holds a list, not an object with columns"),
    "a JSON null": ("a.jsonl", [GOOD, "null"], 2, "holds null, not an object"),
    "an empty object": ("a.jsonl", [GOOD, "{}"], 2, "is empty"),
    "nested too deeply": ("a.jsonl", [GOOD, '{"question": ' + "[" * 100_000], 2, "nested too deeply"),
    "not UTF-8": ("a.jsonl", [GOOD, b'{"question": "a", "answer": "\xe4"}'], 2, "not UTF-8 at character 30"),
    "half a character": ("a.jsonl", [GOOD, r'{"question": "a", "answer": "\ud83d"}'], 2, "half of a surrogate pair"),
    "no messages": ("a.jsonl", [CHAT, '{"messages": []}'], 2, "column 'messages' is empty"),
    "null messages": ("a.jsonl", [CHAT, '{"messages": null}'], 2, "column 'messages' is null"),
    "messages of another type": ("a.jsonl", [CHAT, '{"messages": "hi"}'], 2, "the text 'hi', not a list of messages"),
    "a message that is text": ("a.jsonl", [CHAT, '{"messages": ["hi"]}'], 2, "message 1 is the text 'hi'"),
    "wrong role": (
        "a.jsonl",
        [CHAT, chat(ASK, {"role": "narrator", "content": "b"})],
        2,
        "message 2 has the role 'narrator'; known are system, ",
    ),
    "no role": ("a.jsonl", [CHAT, '{"messages": [{"content": "b"}]}'], 2, "message 1 has no role"),
    "no content": (
        "a.jsonl",
        [CHAT, chat(ASK, {"role": "assistant", "content": None})],
        2,
        "message 2 (assistant) has no content",
    ),
    "content of another type": (
        "a.jsonl",
        [CHAT, chat(ASK, {"role": "assistant", "content": 3})],
        2,
        "message 2 has the number 3 as content, not text",
    ),
    "no assistant": ("a.jsonl", [CHAT, chat(ASK)], 2, "no message is the assistant's"),
    "row of a JSON list": ("a.json", ["[" + GOOD + ",", "3]"], 2, "holds the number 3, not an object"),
    "bytes in a JSON list": ("a.json", ["[" + GOOD + ",", b'{"question": "\xff", "answer": "b"}]'], 2, "not UTF-8"),
    "too few fields": ("a.csv", ["question,answer", '"a\nb",c', "a"], 4, "has 1 fields; the header names 2 columns"),
    "too many fields": ("a.csv", ["question,answer", "a,b", "a,b,c"], 3, "has 3 fields"),
    "empty fields": ("a.csv", ["question,answer", "a,b", "", ","], 4, "is empty"),
    "a quote inside": ("a.csv", ["question,answer", 'a,"b" c', "a,b"], 2, "a quote inside of a field is written twice"),
    "an open quote": ("a.csv", ["question,answer", "a,b", 'a,"b', "c,d"], 3, "never closed: everything up to line 4"),
    "bytes in CSV": ("a.csv", ["question,answer", "a,b", b"a,\xe4"], 3, "not UTF-8 at character 3"),
    "bytes in text": ("a.txt", ["a", b"\xff"], 2, "not UTF-8 at character 1"),
    "tokens": ("a.jsonl", ['{"input_ids": [1]}', '{"input_ids": [-1]}'], 2, "no token's number"),
    "no tokens": ("a.jsonl", ['{"input_ids": [1]}', '{"input_ids": []}'], 2, "'input_ids' is empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_reported_and_left_out(tmp_path, case: str) -> None:
    name, content, row, reason = BAD_ROWS[case]
    path = file(tmp_path, name, b"\n".join(c if isinstance(c, bytes) else c.encode() for c in content) + b"\n")
    found = load_data(path)
    assert len(found.rows) == 1 and found.problems.count == 1
    (line,) = found.problems.lines
    assert line.startswith(f"{path}:{row}: ") and reason in line and "\n" not in line
    assert f"dropped     1 of 2 rows\n            {line}" in str(found)
    with pytest.raises(DataError, match=r"1 of 2 rows of .* cannot be used \(strict_data\)") as refused:
        load_data(path, strict=True)
    assert line in str(refused.value)


def test_bytes_in_parquet(tmp_path) -> None:
    """Parquet's writers check nothing."""
    sound = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.StringArray.from_buffers(3, *sound.buffers()[1:])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text}), path)
    found = load_data(str(path))
    assert found.rows["text"][:] == ["a", "c"] and found.problems.lines[0].startswith(
        f"{path}:2: is broken, or not UTF-8"
    )


def test_the_first_few_are_shown_and_all_are_counted(tmp_path) -> None:
    path = file(tmp_path, "a.jsonl", lines([*PAIRS, *[{"question": "a"}] * 1200, *PAIRS]))
    found = load_data(path)
    said = str(found).splitlines()
    assert len(found.rows) == 6 and said[1] == "dropped     1,200 of 1,206 rows"
    assert said[2].strip().startswith(f"{path}:4: ") and said[-1].strip() == "and 1,195 more" and len(said) == 8


def test_nothing_is_left(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no rows that can be used: all 2 were read as a question.*\n.*a\.jsonl:1: "):
        load_data(file(tmp_path, "a.jsonl", lines([{"question": "a", "answer": None}] * 2)))
    with pytest.raises(DataError, match=r"cannot be read: none of its 2 rows can\n.*a\.jsonl:1: not JSON"):
        load_data(file(tmp_path, "a.jsonl", "x\ny"))


# -- the whole is wrong ------------------------------------------------------------------------------------------------


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
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "{}", "none of its 1 rows can"),
        ("a.json", "3", "holds the number 3, not a list of rows"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}\n]', r"a\.json:3: not JSON: Expecting ':' delimiter at column 9"),
        ("a.json", '{"question": ["a"], "answer": []}', "different lengths: question has 1, answer has 0"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"messages": [}\n', "cannot be read"),
        ("a.docx", "x", r"is no \.json, \.jsonl, \.csv, \.parquet, .*\.txt file"),
        ("a.xls", "x", "save it as .xlsx"),
        ("a.xlsx", "x", "is no Excel file that can be read"),
        ("a.parquet", "x", "is no Parquet file that can be read"),
        ("a.arrow", "x", "is no Arrow file that can be read"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1: the column 'text' is there twice"),
        ("a.csv", b"t\xe4xt\na\n", r"a\.csv:1: the line of the columns' names: not UTF-8 at character 2"),
        ("a.csv", "\n\n", "holds no header"),
        ("a.csv", "text\nhello\n".encode("utf-16")[:-1], "cannot be read: utf-16-le, truncated data; save it as UTF-8"),
        ("a.csv", ",,\na,b,c\n", "the row of the columns' names is empty"),
    ],
)
def test_what_is_wrong(tmp_path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(file(tmp_path, name, text))


def test_no_such_data(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        load_rows(str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="nobody/nothing"):
        load_rows("nobody/nothing")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "read_file", refuse)
    with pytest.raises(DataError, match=r"a\.csv' cannot be read: Permission denied"):
        load_rows(str(tmp_path / "a.csv"))


def test_a_parquet_file_that_is_cut_off_inside(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["hello world"] * 10}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is broken near row 1"):
        load_rows(str(path))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_damaged_file_is_read_or_refused(tmp_path, writer: str) -> None:
    """Libraries trust what is in a file: what they raise becomes our error, and none takes the process down."""
    end, write = WRITERS[writer]
    path, chance = tmp_path / f"rows{end}", random.Random(0)
    write(path, PAIRS)
    sound = path.read_bytes()
    for index in range(25):
        content = bytearray(sound)
        for _ in range(chance.choice([1, 2, 8])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        other = tmp_path / f"damaged{index}{end}"
        other.write_bytes(content[: chance.randrange(len(content))] if chance.random() < 0.2 else content)
        with contextlib.suppress(DataError):
            load_data(str(other))


# -- what is said, and templates ---------------------------------------------------------------------------------------


def test_one_line_says_what_was_found(tmp_path) -> None:
    path = file(tmp_path, "a.csv", "id,question,answer\n1,a,b\n2,c,d\n")
    assert str(load_data(path)) == (
        f"data        {path}: 2 rows, a question and its answer (question, answer; not used: id)"
    )
    assert is_conversational(load_rows(path))


def test_templates_merge_columns(tmp_path) -> None:
    path = file(tmp_path, "a.csv", "topic,title,note\nsums,1 + 1,easy\nwords,hello,\n,nothing,x\n")
    templates = Templates.parse("{title}[[ ({note})]]", "about {topic}", "Be {{brief}}.")
    found = load_data(path, templates=templates)
    assert [row["prompt"] for row in found.rows] == [
        [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "1 + 1 (easy)"}],
        [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "hello"}],
    ]
    assert found.rows[1]["completion"] == [{"role": "assistant", "content": "about words"}]
    assert found.problems.lines == [f"{path}:4: column 'topic' is empty"] and "by templates (topic" in str(found)


def test_a_column_that_a_template_names_may_come_late(tmp_path) -> None:
    rows = [*[{"q": "a", "a": "b"}] * 150, {"q": "a", "a": "b", "hint": "c"}]
    path = file(tmp_path, "a.jsonl", lines(rows))
    found = load_data(path, templates=Templates.parse("{q}[[ {hint}]]", "{a}"))
    assert len(found.rows) == 151 and found.rows[150]["prompt"][0]["content"] == "a c"
    message = r"a\.jsonl: prompt_template: unknown column 'hnt', did you mean 'hint'\? the columns are q, a, hint"
    with pytest.raises(DataError, match=message):
        load_data(path, templates=Templates.parse("{q}[[ {hnt}]]", "{a}"))


def test_pairs_without_a_chat_template_are_plain_texts(tmp_path) -> None:
    path = file(tmp_path, "a.jsonl", lines([{"instruction": "Add", "input": "1 1", "output": "2", "system": "Short."}]))
    assert list(load_data(path).without_chat().rows) == [{"prompt": "Short.\n\nAdd\n\n1 1\n\n", "completion": "2"}]
    plain = load_data(path, templates=Templates.parse("Q: {instruction}\nA:", " {output}")).without_chat()
    assert list(plain.rows) == [{"prompt": "Q: Add\nA:", "completion": " 2"}] and "no chat template" in str(plain)
