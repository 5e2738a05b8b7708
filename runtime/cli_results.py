"""The commands for what training leaves: ``unsloth chat`` and ``unsloth export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .cli_arguments import Device, DType, FourBits, Remote, Trained, busy, show


def chat(
    model: Trained,
    compare: Annotated[bool, typer.Option(help="Let the base answer beside the adapter.")] = True,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Of the likely tokens, those with this share.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 3407,
    load_in_4bit: FourBits = False,
    device: Device = None,
    trust_remote_code: Remote = False,
) -> None:
    """Talk to a model; an adapter answers beside its base. Lines come from the terminal, or from a pipe."""
    import torch

    from ..models.load import load_model, load_tokenizer
    from .chat import Manner
    from .chat import chat as talk
    from .quiet import quiet

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with quiet(), busy(f"loading {model}"):
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        subject = load_model(
            model,
            dtype=torch.float32 if place == "cpu" else torch.bfloat16,
            device=place,
            quantise="nf4" if load_in_4bit else None,
            trust_remote_code=trust_remote_code,
        )
    manner = Manner(max_new_tokens, temperature, top_p, seed)
    talk(subject, tokenizer, manner=manner, system=system, compare=compare, console=Console(highlight=False))


def export(
    model: Trained,
    output_dir: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it goes: a new or an empty folder.")],
    format: Annotated[str, typer.Option(help="merged (16 bits), merged-4bit, gguf, or adapter (as it is).")] = "merged",
    dtype: Annotated[DType | None, typer.Option(help="Of merged weights (default: the base's, or bf16).")] = None,
    type: Annotated[
        list[str] | None, typer.Option(help="Of a GGUF file: f32, f16, bf16, q8_0; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of GGUF files, before .Q8_0.gguf.")] = None,
    load_in_4bit: FourBits = False,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Gigabytes of a safetensors file.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """Write a trained model for others: adapters merged into the weights, as GGUF, or the adapter with its card."""
    import torch

    from .export import export as write
    from .quiet import quiet

    types = {DType.fp32: torch.float32, DType.bf16: torch.bfloat16, DType.fp16: torch.float16}
    with quiet(), busy(f"exporting {model}"):
        written = write(
            model,
            output_dir,
            format=format,
            dtype=None if dtype is None else types[dtype],
            types=type or ["q8_0"],
            name=name,
            quantise="nf4" if load_in_4bit else None,
            max_shard_bytes=int(max_shard_gb * 10**9),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    show(written)
