"""The command line: ``unsloth train``, ``doctor``, ``chat``, ``export``, … It prints what the functions return.

Exit codes: 0 done; 1 the answer is no (``verify``, ``plan``, ``doctor``), or the work failed; 2 the question was wrong;
130 interrupted; 143 terminated.
"""

from __future__ import annotations

import platform
import shutil
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from .cli_arguments import Batch, Device, DType, Dtype, Lora, Model, Packed, Padded, Remote, Seq, Setting, busy, show
from .cli_results import chat, export
from .doctor_command import doctor

if TYPE_CHECKING:  # torch and transformers take seconds to import, which `--help` should not
    from torch import nn

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="unsloth",
    help='Fine-tune language models through torch.compile(model, backend="unsloth").',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        Console().print(f"unsloth {__version__}", highlight=False)
        raise typer.Exit


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings, one name: value a line.")
    ] = None,
    settings: Annotated[bool, typer.Option("--settings", help="List the settings and leave.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be done, and leave.")
    ] = False,
) -> None:
    """Fine-tune a model: settings from a YAML file, as flags (--lora-r 32), or both; flags win.

    The shortest: unsloth train --model SmolLM2.gguf --data answers.jsonl
    """
    from .config import parse_flags, read_config

    if settings:
        show(_settings())
        return
    words = list(context.args)
    if config is not None and str(config).startswith("--"):  # no file: the first flag landed in its place
        config, words = None, [str(config), *words]
    resolved = read_config(config, parse_flags(words))
    if dry_run:
        from .dry_run import dry_run as resolve

        show(resolve(resolved))
        return
    from .train import train as run

    console = Console(stderr=True)
    result = run(resolved, console=console)
    show(result.explanation)
    show(result)


@app.command()
def explain(
    model: Model,
    batch: Batch = 2,
    seq: Seq = 64,
    lora: Lora = False,
    dtype: Dtype = None,
    device: Device = None,
    option: Setting = None,
    packed: Packed = False,
    padded: Padded = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write it as one self-contained page, too.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write it as JSON, too.")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """What is recognised in a model's training graph, what nearly is, and why not."""
    options = _options(option)
    shaped = _shape(packed, padded)
    subject, inputs = _subject(model, batch, seq, lora, dtype, device, trust_remote_code)
    from ..compiler.explain import explain as ask

    with busy(f"tracing {model}"):
        explanation = ask(subject, shaped(inputs), options=options)
    show(explanation)
    for path, write in ((html, "to_html"), (json, "to_json")):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(getattr(explanation, write)(), encoding="utf-8")


@app.command()
def verify(
    model: Model,
    batch: Batch = 2,
    seq: Seq = 64,
    lora: Lora = False,
    dtype: Dtype = None,
    device: Device = None,
    option: Setting = None,
    packed: Packed = False,
    padded: Padded = False,
    trust_remote_code: Remote = False,
) -> None:
    """Whether the compiled step is the same training step: loss and every gradient, on random tokens."""
    options = _options(option)
    shaped = _shape(packed, padded)
    subject, inputs = _subject(model, batch, seq, lora, dtype, device, trust_remote_code)
    from ..compiler.verify import verify as ask

    with busy(f"compiling {model} and comparing it with eager"):
        verification = ask(subject, shaped(inputs), options=options)
    show(verification)
    if not verification.ok:
        raise typer.Exit(FAILED)


@app.command()
def plan(
    model: Model,
    budget: Annotated[str | None, typer.Option(help="Peak memory of the step, such as 20GiB.")] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of the card instead, of which a part stays free: 24GiB.")
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Host memory in which values may wait for backward: 64GiB; 0 for none. [half of this one's]"),
    ] = None,
    card: Annotated[str, typer.Option(help="Whose speed is assumed: H100, A100, 4090, …")] = "H100",
    batch: Batch = 1,
    seq: Seq = 2048,
    lora_r: Annotated[int, typer.Option(min=0, help="Rank of the adapters; 0 trains all weights.")] = 16,
    quantization: Annotated[str, typer.Option(help="nf4 or none: how the frozen weights are held.")] = "none",
    png: Annotated[Path | None, typer.Option("--png", help="Draw the memory timeline of a step, too.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers as JSON, too.")] = None,
) -> None:
    """What a training step needs of memory, and how it fits: from the configuration, without weights or a GPU."""
    from json import dumps

    from .plan import plan as ask

    with busy(f"tracing {model}"):
        found = ask(
            model,
            batch=batch,
            seq=seq,
            budget=budget,
            device_memory=device_memory,
            host_memory=host_memory,
            device=card,
            lora_r=lora_r or None,
            quantization=quantization,  # pyright: ignore[reportArgumentType]  checked there
        )
    show(found)
    for path, write in ((png, found.draw), (json, lambda p: p.write_text(dumps(found.to_dict(), indent=1)))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    if not found.fits:
        raise typer.Exit(FAILED)


app.command()(chat)
app.command()(export)
app.command()(doctor)


@app.command()
def env() -> None:
    """Versions and device, for a bug report."""
    import torch

    rows = {"unsloth": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes"):
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = "–"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            rows[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}"
    else:
        rows["device"] = "cpu (torch sees no GPU)"
    rows["compiler"] = shutil.which("g++") or shutil.which("clang++") or "none: Inductor needs a C++ compiler"
    show("\n".join(f"{name:<14}{value}" for name, value in rows.items()))


def main() -> None:
    """The ``unsloth`` command."""
    try:
        app(prog_name="unsloth")
    except ValueError as error:
        if not isinstance(error, _bad_input()):
            raise
        # Ours say what was wrong with the question; where they were raised helps nobody.
        Console(stderr=True).print(f"unsloth: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
    except (RuntimeError, OSError) as error:
        if not isinstance(error, _failure()):
            raise
        Console(stderr=True).print(f"unsloth: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:  # while importing; while a command runs typer turns it into the same code
        sys.exit(INTERRUPTED)


def _bad_input() -> tuple[type[ValueError], ...]:
    """The errors that say what was wrong with the question."""
    from ..compiler.options import OptionError
    from ..compiler.run import BatchError
    from ..models.load import ModelError

    ours = (
        ("config", "ConfigError"),
        ("doctor", "DoctorError"),
        ("data", "DataError"),
        ("outputs", "OutputError"),
        ("checkpoints", "CheckpointError"),
    )
    return (BatchError, ModelError, OptionError, *_loaded(*ours))


def _failure() -> tuple[type[Exception], ...]:
    """The errors that say why the work failed, and are no bug."""
    return _loaded(("finite", "TrainingError"), ("train", "SavingError"))


def _loaded(*errors: tuple[str, str]) -> tuple[type[Any], ...]:
    """Those (module, name) whose module is imported; nobody can have raised the others."""
    modules = [(sys.modules.get(f"{__package__}.{module}"), name) for module, name in errors]
    return tuple(getattr(module, name) for module, name in modules if module is not None)


def _settings() -> str:
    from .config import TrainConfig
    from .trainer_settings import METHODS, trainer_settings

    width = max(map(len, TrainConfig.model_fields)) + 2
    lines = []
    for name, setting in TrainConfig.model_fields.items():
        default = "required" if setting.is_required() else f"default {setting.default}"
        lines.append(f"{name:<{width}}{setting.description}  [{default}]")
    shown = set(TrainConfig.model_fields)
    for method, (_, name) in METHODS.items():
        others = sorted(trainer_settings(method).keys() - shown)
        what = "and" if method == "sft" else f"with method {method}"
        lines += ["", f"{what} of TRL's {name}:", *textwrap.wrap(", ".join(others), 110)]
        shown |= set(others)
    return "\n".join(lines)


def _subject(
    name: str, batch: int, seq: int, lora: bool, dtype: DType | None, device: str | None, trust_remote_code: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that is asked about, and a batch for it."""
    import torch

    from ..models.load import ModelError, load, random_batch, with_lora

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(place).type
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"no device {place!r}: {str(error).splitlines()[0]}") from error
    types = {DType.fp32: torch.float32, DType.bf16: torch.bfloat16, DType.fp16: torch.float16}
    precision = types[dtype or (DType.fp32 if kind == "cpu" else DType.bf16)]
    with busy(f"loading {name}"):
        model = load(name, dtype=precision, device=place, trust_remote_code=trust_remote_code)
        subject = with_lora(model) if lora else model
    return subject, random_batch(model, batch, seq)


def _shape(packed: bool, padded: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What to make of a batch of sequences of one length."""
    if packed and padded:
        raise typer.BadParameter("a batch is packed or padded, not both", param_hint="--packed")
    from ..compiler import batches

    return batches.packed if packed else batches.padded if padded else lambda batch: batch


def _options(given: list[str] | None) -> dict[str, Any]:
    """``["strict=true", "disable=rope,rms_norm", "memory_budget=24GiB"]`` as the backend takes them."""
    words: dict[str, Any] = {"true": True, "false": False}
    options: dict[str, Any] = {}
    for setting in given or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} is not NAME=VALUE", param_hint="--option")
        options[name] = value.split(",") if name == "disable" else words.get(value, value)
    return options
