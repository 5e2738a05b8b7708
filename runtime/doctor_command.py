"""``unsloth doctor``. Exit codes: 0 clean, or warnings only; 1 errors were found; 2 the question was wrong."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


class Precision(enum.StrEnum):
    """Of a run's arithmetic."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


_DTYPES = {Precision.fp32: "float32", Precision.bf16: "bfloat16", Precision.fp16: "float16"}


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a hub id, or a preset.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="What it is to be trained on: a file, or a hub id.")] = None,
    weights: Annotated[
        bool | None, typer.Option("--weights/--no-weights", help="Read embedding, head and norms (default: if local).")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="Instead of the tokenizer's: chatml, …, a file.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Rows would be cut off there.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of the run that is meant.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, …: what it is to run with.")] = None,
    assistant_only: Annotated[bool, typer.Option(help="Only the assistant's answers would be trained on.")] = False,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw lengths, labels, norms and PCA there.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write it as JSON, too; - prints that alone.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules and leave.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along.")
    ] = False,
) -> None:
    """Errors that raise nothing: in configuration, tokenizer, chat template, weights, code and data."""
    from .doctor import doctor as ask
    from .doctor import rule_list

    out = Console()
    if rules:
        out.print(rule_list(), markup=False, highlight=False, soft_wrap=True)
        return
    if model is None:
        raise typer.BadParameter("which model?", param_hint="MODEL")
    with Console(stderr=True).status(f"examining {model}"):
        found = ask(
            model,
            data=data,
            weights=weights,
            chat_template=chat_template,
            max_length=max_length,
            dtype=None if dtype is None else _DTYPES[dtype],
            attn_implementation=attn_implementation,
            assistant_only=assistant_only,
            plots=plots,
            trust_remote_code=trust_remote_code,
        )
    if str(json) == "-":
        out.print(found.to_json(), markup=False, highlight=False, soft_wrap=True)
    else:
        out.print(found)
    if json is not None and str(json) != "-":
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(found.to_json(), encoding="utf-8")
    if not found.ok:
        raise typer.Exit(1)
