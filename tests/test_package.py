"""The package as others get it: what it contains, how it installs, and that importing it does nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BESIDE_THE_PACKAGE = {"tests", "benchmarks", "examples", "docs", "build", "dist"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command without this process's Python settings; returns its output, fails with it when it fails."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, *, cwd: Path, interpreter: str | Path = sys.executable) -> str:
    return run(interpreter, "-c", code, cwd=cwd).strip()


def source_files() -> list[Path]:
    """Every Python file of the package, relative to the root."""
    files = [path.relative_to(ROOT) for path in ROOT.glob("*.py")]
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in BESIDE_THE_PACKAGE:
            files += [path.relative_to(ROOT) for path in folder.rglob("*.py")]
    return files


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that builds leave nothing behind in it."""
    target = tmp_path_factory.mktemp("source") / "checkout"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results", "outputs")
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


@pytest.fixture(scope="module")
def distributions(checkout: Path) -> tuple[Path, Path]:
    """(wheel, sdist); the wheel is built from the sdist, so what the sdist forgets is missing from both."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", checkout / "dist", cwd=checkout)
    (wheel,), (sdist,) = (checkout / "dist").glob("*.whl"), (checkout / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel; everything else it borrows from ours.

    Ours is appended by a path file, which does not process *its* path files: an editable install stays invisible.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    interpreter = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", interpreter)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", distributions[0], cwd=folder.parent)
    (site,) = (folder / "lib").glob("python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return interpreter


def test_packages_are_the_tree():
    folders = {".".join(["unsloth", *path.parent.parts]) for path in source_files()}
    assert sorted(folders) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_wheel_holds_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        licences = [name for name in wheel.namelist() if name.endswith("LICENSE")]
    data = {"unsloth/py.typed", "unsloth/compiler/page.html.j2"}
    assert names == {f"unsloth/{path.as_posix()}" for path in source_files()} | data
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert licences


def test_sdist_holds_tests_and_benchmarks(distributions):
    with tarfile.open(distributions[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {"Makefile", "LICENSE", "README.md", "tests/pytest.ini", "tests/test_package.py", "examples/demo.py"}
    assert expected <= names
    assert not [name for name in names if "__pycache__" in name]


def test_backend_is_there_without_an_import(installed, tmp_path):
    code = """
import sys, torch._dynamo
print("unsloth" in torch._dynamo.list_backends(), "unsloth" in sys.modules)
"""
    assert python(code, cwd=tmp_path, interpreter=installed) == "True False"


def test_installed_backend_compiles(installed, tmp_path):
    code = """
import sys, torch
layer = torch.nn.Linear(4, 4)
compiled = torch.compile(layer, backend="unsloth", options={"lowering": "eager", "strict": True})
x = torch.ones(2, 4)
assert torch.equal(compiled(x), layer(x))
print(sys.modules["unsloth"].__file__)
"""
    used = python(code, cwd=tmp_path, interpreter=installed)
    assert Path(used).parent.parent.parent.parent.parent == installed.parent.parent  # not the checkout's


def test_console_script(installed, tmp_path):
    assert run(installed.parent / "unsloth", "--version", cwd=tmp_path).strip() == f"unsloth {version()}"


def version() -> str:
    return python("import unsloth; print(unsloth.__version__)", cwd=ROOT)


def test_import_costs_nothing(tmp_path):
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import unsloth
print(time.perf_counter() - start, *{name.partition(".")[0] for name in set(sys.modules) - before} - {"unsloth"})
"""
    seconds, *others = python(code, cwd=tmp_path).split()
    assert float(seconds) < 0.5
    assert others == []


def test_import_does_not_even_import_torch(tmp_path):
    assert python("import sys, unsloth; print('torch' in sys.modules)", cwd=tmp_path) == "False"


def test_public_face(tmp_path):
    code = """
import unsloth
assert {"explain", "verify"} <= set(dir(unsloth))
assert callable(unsloth.explain) and callable(unsloth.verify)
try:
    unsloth.explian
except AttributeError as error:
    print(error)
"""
    assert python(code, cwd=tmp_path) == "module 'unsloth' has no attribute 'explian'"


def test_nothing_is_patched(tmp_path):
    """No attribute of torch, transformers or PEFT, and none of their classes', is another object after our import."""
    code = """
import sys, torch, torch._dynamo, torch._inductor.compile_fx, transformers.models.llama.modeling_llama, peft

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("torch", "transformers", "peft", "accelerate"):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(name, key, inner): v for inner, v in vars(value).items() if not inner.startswith("_abc")}
    return found

before = attributes()
import unsloth
unsloth.explain, unsloth.verify
import unsloth.compiler.backend
after = attributes()
state = {"__warningregistry__"}  # Python's own bookkeeping
changed = [k for k, v in before.items() if callable(v) and after.get(k) is not v and k[1] not in state]
print(len(before) > 10_000, changed)
"""
    assert python(code, cwd=tmp_path) == "True []"


def test_our_folders_stay_out_of_others_way():
    """From the root `kernels` is importable by that name, and bitsandbytes looks for a PyPI package called so.

    To it ours is an empty module: with its content every operator would be registered a second time.
    """
    code = """
import sys
import bitsandbytes, peft, transformers
ours = ("kernels.", "compiler.", "passes.", "models.", "runtime.")
print([name for name in sys.modules if name.startswith(ours)])
"""
    assert python(code, cwd=ROOT) == "[]"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """A copy of the package under its own name, with the project's layering contracts."""
    for path in source_files():
        target = tmp_path / "unsloth" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_arrows_point_down(layered):
    done = lint_imports(layered)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("kernels", "from ..passes import runner"),
        ("kernels", "from ..models import presets"),
        ("kernels", "import transformers"),
        ("passes", "from ..compiler import options"),
        ("passes", "from ..models import presets"),
        ("compiler", "from ..runtime import cli"),
        ("compiler", "from ..models import presets"),
        ("models", "from ..compiler import options"),
        ("models", "from ..passes import runner"),
    ],
)
def test_an_arrow_that_points_up_is_found(layered, folder, line):
    (layered / "unsloth" / folder / "planted.py").write_text(line + "\n")
    done = lint_imports(layered)
    assert done.returncode == 1, done.stdout
    assert f"unsloth.{folder}.planted" in done.stdout
