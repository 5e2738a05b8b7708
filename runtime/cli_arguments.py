"""What several commands take, declared once."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer
from rich.console import Console


class DType(enum.StrEnum):
    """Precision of the weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A preset with random weights (tiny-llama, llama-1b, …), a folder with config.json, or a hub id.",
    ),
]
Trained = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder that train has filled, a model, a GGUF file, or a hub id.")
]
FourBits = Annotated[bool, typer.Option("--load-in-4bit", help="On the base in NF4, as QLoRA trained it.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in the batch.")]
Seq = Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")]
Lora = Annotated[bool, typer.Option(help="Freeze the model and train LoRA adapters on every linear layer (PEFT).")]
Dtype = Annotated[DType | None, typer.Option(help="Precision of the weights (default: bf16 on a GPU, else fp32).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … (default: the GPU, if there is one).")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the backend, such as disable=rms_norm."),
]
Packed = Annotated[
    bool, typer.Option("--packed", help="The sequences as documents of one row: position ids restart, no mask.")
]
Padded = Annotated[bool, typer.Option("--padded", help="Sequences of different lengths, padded on the right.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along.")]


def busy(what: str) -> Any:
    return Console(stderr=True).status(what)


def show(result: Any) -> None:
    # Tables keep their columns: no wrapping, and nothing in a module's path is markup.
    Console().print(str(result), markup=False, highlight=False, soft_wrap=True)
