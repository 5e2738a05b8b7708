"""The demo's data: real questions with real answers, the same every time, and whole modules held out."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from examples import python_docs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows():
    return python_docs.build()


def answers(rows) -> dict[str, str]:
    """Answer by the name that is asked about."""
    return {re.findall(r"`(.+)`", r["messages"][0]["content"])[0]: r["messages"][1]["content"] for r in rows}


def test_rows_are_conversations(rows) -> None:
    assert 2_000 <= len(rows) <= 6_000
    for row in rows:
        assert row.keys() == {"messages", "module"}
        user, assistant = row["messages"]
        assert user["role"] == "user" and assistant["role"] == "assistant"
        (name,) = re.fullmatch(r"[A-Z][^`]* `([\w.]+)`[^`]*\?", user["content"]).groups()
        assert row["module"] == name.partition(".")[0] or row["module"] == "builtins"
        assert not any(part.startswith("_") for part in name.split("."))
        signature, text = re.fullmatch(r"`([^`\n]+)`\n\n(.+)", assistant["content"], re.DOTALL).groups()
        assert signature == name or re.fullmatch(rf"{re.escape(name)}\(.*\)", signature)
        assert 40 <= len(text) <= 700
        assert assistant["content"].isascii() and text == text.rstrip()
        assert ">>>" not in text and "deprecated" not in text.lower()


def test_lengths_fit_the_demo(rows) -> None:
    lengths = [sum(len(m["content"]) for m in row["messages"]) for row in rows]
    assert max(lengths) < 1_000
    assert sum(length > 800 for length in lengths) < 0.02 * len(rows)  # about 256 tokens


def test_no_text_twice(rows) -> None:
    texts = Counter(row["messages"][1]["content"].partition("\n\n")[2] for row in rows)
    questions = Counter(row["messages"][0]["content"] for row in rows)
    assert texts.most_common(1)[0][1] == 1
    assert questions.most_common(1)[0][1] == 1


def test_every_phrasing_is_used(rows) -> None:
    asked = Counter(re.sub("`.+`", "`{}`", row["messages"][0]["content"]) for row in rows)
    assert set(asked) == {phrasing for kind in python_docs.QUESTIONS.values() for phrasing in kind}
    assert min(asked.values()) > 20


def test_answers_from_sources_and_from_c(rows) -> None:
    found = answers(rows)
    assert found["textwrap.dedent"].startswith("`textwrap.dedent(text)`\n\nRemove any common leading whitespace from")
    assert found["os.path.join"].startswith("`os.path.join(a, *p)`\n\nJoin two or more pathname components")
    assert found["str.split"].startswith("`str.split(sep=None, maxsplit=-1)`\n\nReturn a list of the")
    assert found["math.hypot"].startswith("`math.hypot(")
    assert {"io.BytesIO.truncate", "argparse.Action", "ipaddress.IPv6Address.is_global"} <= set(found)
    assert not {"pickle.pack", "typing.Optional", "tarfile.itn", "sys.unraisablehook"} & set(found)


@pytest.mark.parametrize(
    ("source", "signature", "kind"),
    [
        ("def f(a: int, /, b=2, *c, d: str = 'x', **e) -> int: 'doc'", "m.f(a, /, b=2, *c, d='x', **e)", "function"),
        ("async def f(): 'doc'", "m.f()", "procedure"),
        ("class C:\n 'doc'\n def __init__(self, a, *, b=1): ...", "m.C(a, *, b=1)", "class"),
        ("class C(B):\n 'doc'", "m.C", "class"),
        ("class C:\n def f(self, a): 'doc'", "m.C.f(a)", "function"),
        ("class C:\n def f(self, /): 'doc'", "m.C.f()", "procedure"),
        ("class C:\n @staticmethod\n def f(a): 'doc'", "m.C.f(a)", "function"),
        ("class C:\n @classmethod\n def f(cls, a): 'doc'", "m.C.f(a)", "function"),
        ("class C:\n @functools.cached_property\n def f(self): 'doc'", "m.C.f", "property"),
        ("__all__ = ['g']\n__all__ += ['f']\ndef f(): 'doc'\ndef h(): 'doc'", "m.f()", "procedure"),
        ("__all__ = ['g']\n__all__ += other.__all__\ndef f(): 'doc'", "m.f()", "procedure"),
    ],
)
def test_signatures(source, signature, kind) -> None:
    (entry,) = python_docs._in_tree(ast.parse(source), "m")
    assert (entry.signature, entry.kind, entry.doc) == (signature, kind, "doc")


@pytest.mark.parametrize(
    "source",
    [
        "def _f(): 'doc'",
        "def f(): ...",
        "class _C:\n def f(self): 'doc'",
        "class C:\n @f.setter\n def f(self, x): 'doc'",
        "__all__ = ['g']\ndef f(): 'doc'",
    ],
)
def test_what_is_not_asked_about(source) -> None:
    assert not list(python_docs._in_tree(ast.parse(source), "m"))


LINE = "This line is as long as a line of running text is"


@pytest.mark.parametrize(
    ("doc", "prose"),
    [
        (f"{LINE}\n    and it goes on.  So\n    does this.", f"{LINE} and it goes on. So\ndoes this."),
        (f"{LINE}:\n    - one\n    - two", f"{LINE}:\n- one\n- two"),
        ("f(x[, y]) -> int\n\nMore.", "More."),
        ("f(x) -> int\nm.f(x, y) -> float\n\nMore.", "More."),
        ("One.\n>>> f(1)\n2\n\nThree.", "One."),
        ("One.\n\nExample:\n\n    >>> f(1)", "One."),
        ("Calls :func:`~m.g` and ``h``, or :class:`C <m.C>`.", "Calls `m.g` and `h`, or `C`."),
        (f"One.\n\nTwo:\n\n    {'a' * 300}\n\n    {'b' * 500}", "One."),
        ("a" * 701, ""),
        ("Raises :exc:`E`\n\n>>> f(1)\n2", "Raises `E`"),
        (">>> f(1)\n2", ""),
    ],
)
def test_prose(doc, prose) -> None:
    assert python_docs._prose(python_docs.Entry("m.f", "function", "m.f(x)", doc)) == prose


def test_split_keeps_modules_apart(rows) -> None:
    training, held_out = python_docs.split(rows)
    assert not {r["module"] for r in training} & {r["module"] for r in held_out}
    assert len({r["module"] for r in held_out}) >= 10
    assert 0.05 * len(rows) < len(held_out) < 0.15 * len(rows)
    assert sorted(map(json.dumps, training + held_out)) == sorted(map(json.dumps, rows))


def test_split_by_seed_and_part(rows) -> None:
    first, again, other = (python_docs.split(rows, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again != other
    _, held_out = python_docs.split(rows, held_out=0.5)
    assert 0.35 * len(rows) < len(held_out) < 0.65 * len(rows)


def test_split_of_few_modules() -> None:
    few = [{"module": m} for m in "aab"]
    assert sorted(map(len, python_docs.split(few))) == [1, 2]
    with pytest.raises(ValueError, match=r"rows of 1 module\(s\) cannot be split"):
        python_docs.split(few[:2])


@pytest.mark.parametrize("part", [0, -0.1, 0.6, 1])
def test_parts_that_are_none(part) -> None:
    with pytest.raises(ValueError, match="held_out is a part of the rows"):
        python_docs.split([{"module": m} for m in "ab"], held_out=part)


def test_a_python_without_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(RuntimeError, match="no sources of Python's library"):
        python_docs.build()


def test_written_by_another_process_the_same_and_without_a_word(rows, tmp_path) -> None:
    """Another hash seed, and none of the hooks and imports of a test run."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "default", "-m", "examples.python_docs", "--out", tmp_path / "new"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert time.perf_counter() - start < 20 * 3  # 3 s alone; others may be using the machine
    for name, expected in zip(("train", "held_out"), python_docs.split(rows), strict=True):
        lines = (tmp_path / "new" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == expected
        assert f"{len(expected):,} " in done.stdout


def test_modules_are_not_imported() -> None:
    code = "import sys; from examples import python_docs; python_docs.build(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"antigravity", "this", "turtle", "tkinter", "idlelib", "pdb", "asyncio", "sqlite3"} & set(
        done.stdout.split()
    )
