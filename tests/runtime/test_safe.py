"""Nothing that is loaded can run code: over the syntax tree of the whole package, and for what a file may ask for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from unsloth.runtime.config import ConfigError, parse_flags, read_config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("compiler", "kernels", "models", "passes", "runtime")

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"}
KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def offences(source: str) -> Iterator[str]:
    """What in a module could run code that it loads."""
    aliases: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                n.asname or n.name.partition(".")[0]: n.name if n.asname else n.name.partition(".")[0]
                for n in node.names
            }
            names = [n.name for n in node.names]
        elif isinstance(node, ast.ImportFrom):
            aliases |= {n.asname or n.name: f"{node.module}.{n.name}" for n in node.names}
            names = [f"{node.module}.{n.name}" for n in node.names]
        else:
            continue
        yield from (f"line {node.lineno}: imports {name}" for name in names if name.partition(".")[0] in PICKLES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func, aliases)
        given = {k.arg: k.value for k in node.keywords if k.arg}
        if name in CALLS:
            yield f"line {node.lineno}: calls {name}"
        safe = given.get("weights_only")
        if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        for keyword, value in KEYWORDS.items():
            if isinstance(found := given.get(keyword), ast.Constant) and found.value is value:
                yield f"line {node.lineno}: {keyword}={value}"


def _name(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def modules() -> list[Path]:
    return [ROOT / "__init__.py", *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]


def test_the_package_loads_nothing_that_could_run_code() -> None:
    found = {str(p.relative_to(ROOT)): problems for p in modules() if (problems := list(offences(p.read_text())))}
    assert len(modules()) > 60 and found == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as safe",
        "import torch\ntorch.load(path)",
        "from torch import load as read\nread(path, weights_only=flag)",
        "torch.load(path, weights_only=False)",
        "import yaml as y\ny.load(text, Loader=y.Loader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "import os as o\no.system(command)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_what_the_search_would_find(line: str) -> None:
    assert list(offences(line))


def test_what_is_allowed() -> None:
    assert not list(offences("import torch, yaml\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)\nmodel.eval()"))


NEEDED = "model_name_or_path: m\ndataset_name: d.csv\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trust_remote_code: true\n", 3),
        ("trust_remote_code: yes\n", 3),
        ("seed: 3\ntrust_remote_code: 1\n", 4),
        ("model_init_kwargs: {trust_remote_code: true}\n", 3),
        ("dataset_kwargs:\n  inner: [{trust_remote_code: true}]\n", 3),
    ],
)
def test_a_file_cannot_switch_on_foreign_code(tmp_path, text: str, line: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(NEEDED + text)
    for flags in ({}, parse_flags(["--trust-remote-code"])):  # nor may it stand there beside the flag
        with pytest.raises(ConfigError) as error:
            read_config(path, flags)
        assert f"run.yaml:{line}: trust_remote_code is switched on by the flag --trust-remote-code alone" in str(
            error.value
        )


def test_the_command_line_can(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(NEEDED + "trust_remote_code: false\n")
    assert read_config(path, parse_flags(["--trust-remote-code"])).trust_remote_code
    assert not read_config(path).trust_remote_code
