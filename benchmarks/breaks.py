"""In how many graphs does a training run end up? TRL's trainer with ``torch_compile``, and ours, side by side.

    python -m benchmarks.breaks [--steps 20] [--out benchmarks/results/training/breaks.json]

LoRA on a tiny Llama, rows of 3 to 60 tokens. Graphs and breaks are Dynamo's own counts; nothing is lowered, so that
the numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset

from unsloth.models import presets
from unsloth.models.adapters import add_lora
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.runtime.trainer import SFTTrainer

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded, checkpointing": {"gradient_checkpointing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "per_device_train_batch_size": 1},
}


def rows(count: int = 160) -> Dataset:
    """Tokens of documents whose lengths look random and are not."""
    lengths = [3 + (37 * i * i + 11 * i) % 58 for i in range(count)]
    return Dataset.from_list([{"input_ids": [(7 * i + j) % 250 + 4 for j in range(n)]} for i, n in enumerate(lengths)])


def count(system: str, steps: int, **layout: Any) -> dict[str, int]:
    """Train; returns ``graphs`` and ``breaks``."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours = system == "ours"
    theirs = {} if ours else {"torch_compile": True, "torch_compile_backend": "eager"}
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "max_length": 64,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **theirs,
            **layout,
        }
        made = (SFTTrainer if ours else trl.SFTTrainer)(
            add_lora(presets.build("tiny-llama"), rank=4),
            args=trl.SFTConfig(folder, **settings),
            train_dataset=rows(),
            processing_class=byte_tokenizer(),
            **({"options": {"lowering": "eager", "strict": True}} if ours else {}),
        )
        made.train()
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def main(argv: list[str] | None = None) -> None:
    """Count and print."""
    arguments = argparse.ArgumentParser("benchmarks.breaks", description=__doc__.split("\n")[0])
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--out", type=Path, help="write the counts as JSON")
    args = arguments.parse_args(argv)
    found = {name: {s: count(s, args.steps, **layout) for s in ("trl", "ours")} for name, layout in LAYOUTS.items()}
    print(f"{'':<24}{'TRL':>20}{'ours':>20}")
    for name, systems in found.items():
        print(f"{name:<24}" + "".join(f"{c['graphs']:>8} graphs, {c['breaks']:>2} br" for c in systems.values()))
    if args.out:
        versions = {"torch": torch.__version__, "trl": trl.__version__}
        args.out.write_text(json.dumps({"steps": args.steps, **versions, "counts": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
