"""Questions and answers about Python's standard library, made from its own docstrings: real text without a network.

One row for each public function, class, method and property that is documented in prose::

    user       What does `textwrap.dedent` do?
    assistant  `textwrap.dedent(text)`

               Remove any common leading whitespace from every line in `text`.

               This can be used to make triple-quoted strings line up with ...

Answers all have this form, so that a few dozen steps teach it. Modules in Python are parsed and never imported; those
in C are imported, a short list of harmless ones. The rows are the same for everyone with the same Python.

    python -m examples.python_docs --out build/python_docs
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import inspect
import itertools
import json
import random
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHORTEST, LONGEST = 40, 700
"""Characters of an answer's text, the signature not counted."""
LONGEST_SIGNATURE = 160

# Some installations lack them (the first line), or they document nothing that anyone asks about.
LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"}
LEFT_OUT |= {"antigravity", "encodings", "ntpath", "pydoc_data", "test", "this"}
# Where a module's content is known by the name of another.
PUBLIC_NAMES = {"_collections_abc": "collections.abc", "genericpath": "os.path", "posixpath": "os.path"}
# What of these is written in C has its documentation in the object only. Every build has them, and importing them does
# nothing else.
IN_C = (
    *("array", "binascii", "builtins", "cmath", "collections", "csv", "datetime", "decimal", "functools", "gc"),
    *("hashlib", "io", "itertools", "marshal", "math", "operator", "os", "pickle", "random", "select", "signal"),
    *("socket", "struct", "sys", "threading", "time", "unicodedata", "weakref", "xml.etree.ElementTree", "zlib"),
)

QUESTIONS = {
    "function": ("What does `{}` do?", "How do I call `{}`?", "Which arguments does `{}` take?"),
    "procedure": ("What does `{}` do?", "How do I call `{}`?", "When would I call `{}`?"),
    "class": ("What is `{}`?", "What is `{}` for?", "What does the class `{}` do?"),
    "property": ("What is `{}`?", "What does `{}` hold?", "What does the attribute `{}` mean?"),
}
"""Phrasings by kind; a procedure is a function without arguments."""

UNHELPFUL = re.compile(
    r"\A(obsolete|alias|internal|private|stub|not implemented|undocumented|see |same as|like |ditto|override)"
    r"|\b(deprecated|TODO|XXX|FIXME)\b",
    re.IGNORECASE,
)
# What announces an example that is left out.
ANNOUNCEMENT = re.compile(r".*:|\W*((for )?examples?|usage)\W*", re.IGNORECASE | re.DOTALL)
LIST_ITEM = re.compile(r"\s|[-*+] |\d+[.)] |\w+ -- |\S+: |:param")


class Entry(NamedTuple):
    """Something documented: its dotted public name, its kind (a key of QUESTIONS), how it is called, its docstring."""

    name: str
    kind: str
    signature: str
    doc: str


def build() -> list[dict[str, Any]]:
    """The rows, ``{"messages": [user, assistant], "module": "textwrap"}``, no two with the same text.

    ``module`` is the top-level one: what stands in the same package shares its words.

    Raises:
        RuntimeError: where Python comes without the sources of its library.
    """
    entries = [*_from_sources(), *_from_c()]
    rows, names, texts = [], set(), set()
    # The shallower name of two with the same text is the one that people use.
    for entry in sorted(entries, key=lambda e: (e.name.count("."), e)):
        text = _prose(entry)
        fingerprint = "".join(filter(str.isalnum, text)).lower()
        if entry.name in names or fingerprint in texts or not _is_good(entry, text):
            continue
        names.add(entry.name)
        texts.add(fingerprint)
        top = entry.name.partition(".")[0]
        messages = [
            {"role": "user", "content": _question(entry)},
            {"role": "assistant", "content": f"`{entry.signature}`\n\n{text}"},
        ]
        rows.append({"messages": messages, "module": "builtins" if hasattr(builtins, top) else top})
    return rows


def split(
    rows: list[dict[str, Any]], held_out: float = 0.1, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to train on, rows held out), no module on both sides: the second are about modules never seen.

    Modules in the order of their sizes are cut into groups, and one of each group is held out: both sides have large
    ones and small ones.

    Args:
        held_out: about what part of the rows to hold out, at most a half.
        seed: of the choice.

    Raises:
        ValueError: when that part is not in (0, 0.5], or there are not two modules.
    """
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out is a part of the rows, more than 0 and at most 0.5, not {held_out}")
    sizes = Counter(row["module"] for row in rows)
    if len(sizes) < 2:
        raise ValueError(f"rows of {len(sizes)} module(s) cannot be split by module")
    modules = sorted(sizes, key=lambda module: (-sizes[module], module))
    group = min(round(1 / held_out), len(modules))
    rng = random.Random(seed)
    chosen = {rng.choice(modules[i : i + group]) for i in range(0, len(modules) - group + 1, group)}
    return [r for r in rows if r["module"] not in chosen], [r for r in rows if r["module"] in chosen]


def write(folder: str | Path) -> tuple[int, int]:
    """Write ``train.jsonl`` and ``held_out.jsonl``, one row a line; returns their numbers of rows."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sides = split(build())
    for name, rows in zip(("train", "held_out"), sides, strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(sides[0]), len(sides[1])


# Finding what is documented


def _from_sources() -> Iterator[Entry]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if _is_public_module(path.relative_to(root)))
    if not paths:
        raise RuntimeError(f"no sources of Python's library in {root}")
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have invalid escapes
            tree = ast.parse(path.read_bytes())
        yield from _in_tree(tree, PUBLIC_NAMES.get(module, module))


def _is_public_module(path: Path) -> bool:
    *folders, name = path.with_suffix("").parts
    if ".".join((*folders, name)) in PUBLIC_NAMES:
        return True
    top = (*folders, name)[0]
    if top not in sys.stdlib_module_names or top in LEFT_OUT or "test" in folders or "tests" in folders:
        return False
    return name == "__init__" or not any(part.startswith("_") for part in (*folders, name))


def _in_tree(scope: ast.Module | ast.ClassDef, name: str) -> Iterator[Entry]:
    in_class = isinstance(scope, ast.ClassDef)
    public = None if in_class else _exported(scope)
    for node in scope.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if public is not None and node.name not in public:
            continue
        full, doc = f"{name}.{node.name}", ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                yield Entry(full, "class", full + _constructor(node), doc)
            yield from _in_tree(node, full)
            continue
        decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
        if not doc or decorators & {"setter", "deleter", "overload"}:
            continue
        if decorators & {"property", "cached_property", "abstractproperty", "DynamicClassAttribute"}:
            yield Entry(full, "property", full, doc)
        else:
            bound = in_class and "staticmethod" not in decorators
            arguments = _arguments(node.args, bound)
            yield Entry(full, "procedure" if arguments == "()" else "function", full + arguments, doc)


def _exported(module: ast.Module) -> set[str] | None:
    """What ``__all__`` names; None where a module has none, or computes it."""
    names: set[str] | None = None
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "__all__":
                try:
                    names = (names or set()) | set(ast.literal_eval(node.value))
                except ValueError:
                    return None
    return names


def _constructor(node: ast.ClassDef) -> str:
    """The arguments that make an instance, or nothing where a base class says them."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return _arguments(inner.args, bound=True)
    return ""


def _arguments(arguments: ast.arguments, bound: bool) -> str:
    """``(text, width=70)``, as in the source, without ``self`` and without annotations."""
    if bound and (positional := arguments.posonlyargs or arguments.args):
        del positional[0]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


def _from_c() -> Iterator[Entry]:
    for name in IN_C:
        module = importlib.import_module(name)
        prefix = "" if module is builtins else f"{name}."
        public = getattr(module, "__all__", vars(module))
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or key not in public or key.endswith("hook"):  # programs put in hooks of their own
                continue
            if getattr(value, "__name__", None) != key or not value.__doc__:  # by another name it is an alias
                continue
            if inspect.isbuiltin(value):
                yield from _callable_in_c(value, prefix + key)
            elif inspect.isclass(value) and not any(inspect.isfunction(v) for v in vars(value).values()):
                yield from _class_in_c(value, prefix + key)


def _class_in_c(cls: type, name: str) -> Iterator[Entry]:
    yield Entry(name, "class", name + (_signature_in_c(cls) or ""), cls.__doc__ or "")
    for key, value in sorted(vars(cls).items()):
        if key.startswith("_") or not getattr(value, "__doc__", None):
            continue
        if inspect.isgetsetdescriptor(value) or inspect.ismemberdescriptor(value):
            yield Entry(f"{name}.{key}", "property", f"{name}.{key}", value.__doc__)
        elif callable(getattr(cls, key)):
            yield from _callable_in_c(getattr(cls, key), f"{name}.{key}")


def _callable_in_c(function: Any, name: str) -> Iterator[Entry]:
    arguments = _signature_in_c(function)
    if arguments is None:  # older ones begin their docstring with it
        found = _leading_call(name).match(function.__doc__)
        if found is None:
            return
        arguments = found["arguments"]
    yield Entry(name, "procedure" if arguments == "()" else "function", name + arguments, function.__doc__)


def _signature_in_c(function: Any) -> str | None:
    """The arguments as Python knows them, ``self`` left out; None where it does not."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError, AttributeError):  # the last where a default cannot be evaluated (select.epoll)
        return None
    parameters = list(signature.parameters.values())
    if inspect.ismethoddescriptor(function):
        del parameters[0]
    signature = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return str(signature)


def _leading_call(name: str) -> re.Pattern[str]:
    """What old docstrings begin with: ``wrap(text[, width]) -> list of lines``."""
    last = re.escape(name.rpartition(".")[2])
    return re.compile(rf"\s*(?:\w+\.)*{last}(?P<arguments>\([^()\n]*\))[^\S\n]*(?:(?:->|=>|--)[^\n]*|\.?)(?:\n|$)")


# From a docstring to an answer


def _prose(entry: Entry) -> str:
    """The leading paragraphs of a docstring, up to the first example and to LONGEST characters; may be empty."""
    doc = inspect.cleandoc(entry.doc)
    while found := _leading_call(entry.name).match(doc):
        doc = inspect.cleandoc(doc[found.end() :])
    doc = re.sub(r":[a-z:]+:`~?([^`<]+?)(?: <[^`]*>)?`", r"`\1`", doc).replace("``", "`")
    lines = itertools.takewhile(lambda line: not line.lstrip().startswith((">>>", "$ ", ".. ")), doc.splitlines())
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip()):
        paragraphs.append(_unwrapped(paragraph.rstrip()))
        if len("\n\n".join(paragraphs)) > LONGEST:
            paragraphs.pop()
            while paragraphs and paragraphs[-1][:1].isspace():  # the beginning of a list
                paragraphs.pop()
            break
    while paragraphs and ANNOUNCEMENT.fullmatch(paragraphs[-1]):
        paragraphs.pop()
    return "\n\n".join(paragraphs)


def _unwrapped(paragraph: str) -> str:
    """Join the lines of running text, where line breaks say nothing. Lists and code keep theirs."""
    joined: list[str] = []
    last = " "
    for line in paragraph.splitlines():
        # A short line did not end for want of room.
        if len(last) >= 45 and not last[0].isspace() and not LIST_ITEM.match(line):
            joined[-1] += " " + line
        else:
            joined.append(line)
        last = line
    return re.sub(r"(?<=[.!?]) {2,}", " ", "\n".join(joined))


def _is_good(entry: Entry, text: str) -> bool:
    return (
        SHORTEST <= len(text) <= LONGEST
        and len(entry.signature) <= LONGEST_SIGNATURE
        and (entry.signature + text).isascii()
        and "\n" not in entry.signature
        and " object at 0x" not in entry.signature
        and "(self" not in entry.signature  # a decorator's argument that is no function (typing.Optional)
        and text[0].isalpha()
        and len(text.split()) >= 6
        and not UNHELPFUL.search(text)
    )


def _question(entry: Entry) -> str:
    phrasings = QUESTIONS[entry.kind]
    # Python's own hash differs from run to run.
    return phrasings[zlib.crc32(entry.name.encode()) % len(phrasings)].format(entry.name)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/python_docs", help="folder for train.jsonl and held_out.jsonl")
    folder = parser.parse_args(None if arguments is None else list(arguments)).out
    trained, held_out = write(folder)
    print(f"{folder}: {trained:,} rows to train on, {held_out:,} held out")


if __name__ == "__main__":
    main()
