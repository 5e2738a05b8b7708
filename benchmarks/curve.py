"""Is it the same training run? The loss curve of the compiled step beside float32 eager's, and beside another seed's.

    python -m benchmarks.curve [--model FILE_OR_NAME] [--steps 200] [--batch 2] [--seq 64] [--dtype float32] [--seeds 2]
                               [--out benchmarks/results/training/curve-….json]

LoRA (rank 16 on every linear layer) of a real model on questions and answers about Python. A seed decides how the
adapters begin and in which order rows come; for each, the same run is made twice, by the compiled step in ``--dtype``
and by eager PyTorch in float32. Curves are smoothed over 20 steps. The two runs of one seed have to be closer to each
other than eager runs of two seeds are, at every step (the largest distance) and on the whole (root mean square).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from examples import python_docs
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled
from unsloth.models.adapters import add_lora
from unsloth.models.load import load_model, load_tokenizer
from unsloth.models.smollm2 import smollm2_gguf
from unsloth.runtime.causal_lm import causal_lm_step

SMOOTHING = 20
"""Steps that a point of a smoothed curve is the mean of."""

SYSTEMS = ("eager", "compiled")


@dataclass(frozen=True)
class Setting:
    """What is trained: ``steps`` optimiser steps of ``batch`` rows of ``seq`` tokens each."""

    steps: int
    batch: int
    seq: int
    dtype: str
    lr: float = 1e-3
    rank: int = 16


def blocks(tokenizer: Any, seq: int, count: int) -> Tensor:
    """Rows of tokens, int64 [count, seq], cut from the questions and answers one after the other."""
    tokens: list[int] = []
    for row in itertools.cycle(python_docs.split(python_docs.build())[0]):
        tokens += tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
        if len(tokens) >= seq * count:
            return torch.tensor(tokens[: seq * count]).view(count, seq)
    raise ValueError("there are no questions")


def begin(model: nn.Module, seed: int) -> None:
    """Give the adapters the values that they begin with: A random, as PEFT has it, and B zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
        elif "lora_B" in name:
            nn.init.zeros_(parameter)


def curve(run: Any, model: nn.Module, rows: Tensor, setting: Setting, seed: int) -> list[float]:
    """The loss of every step of one training run, nats per token."""
    begin(model, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=setting.steps)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(setting.batch)
    device = next(model.parameters()).device
    half = setting.dtype != "float32" and run is not causal_lm_step
    losses = []
    for indices in order[: setting.steps]:
        ids = rows[indices].to(device)
        with torch.autocast(device.type, getattr(torch, setting.dtype)) if half else contextlib.nullcontext():
            loss = run(model, {"input_ids": ids, "use_cache": False}, ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def curves(name: str, setting: Setting, seeds: list[int]) -> Iterator[tuple[str, int, list[float], float]]:
    """Run everything; yields (system, seed, losses, seconds)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = blocks(load_tokenizer(name), setting.seq, setting.steps * setting.batch)
    for system in SYSTEMS:
        dtype = torch.float32 if system == "eager" else getattr(torch, setting.dtype)
        model = add_lora(load_model(name, dtype=dtype, device=device), rank=setting.rank)
        # Strict: a graph that falls back would be measured as something else.
        ours = compiled(causal_lm_step, Options(logits="drop", strict=True), [])
        for seed in seeds:
            started = time.perf_counter()
            losses = curve(causal_lm_step if system == "eager" else ours, model, rows, setting, seed)
            yield system, seed, losses, time.perf_counter() - started


def smoothed(losses: list[float]) -> np.ndarray:
    """Means over ``SMOOTHING`` steps, float64 [steps - SMOOTHING + 1]."""
    return np.convolve(losses, np.ones(SMOOTHING) / SMOOTHING, mode="valid")


def compare(losses: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """The distances between smoothed curves, and whether compiled runs are within the noise.

    Args:
        losses: by system and seed, at least two seeds.
    """
    eager, ours = ({seed: smoothed(run) for seed, run in losses[system].items()} for system in SYSTEMS)
    ours_apart = [ours[seed] - eager[seed] for seed in eager]
    seeds_apart = [eager[one] - eager[other] for one, other in itertools.combinations(eager, 2)]

    def largest(differences: list[np.ndarray]) -> float:
        return max(float(np.abs(d).max()) for d in differences)

    def rms(differences: list[np.ndarray]) -> float:
        return max(float(np.sqrt(np.square(d).mean())) for d in differences)

    found = {
        "compiled_from_eager": {"largest": largest(ours_apart), "rms": rms(ours_apart)},
        "seed_from_seed": {"largest": largest(seeds_apart), "rms": rms(seeds_apart)},
    }
    within = all(found["compiled_from_eager"][n] < found["seed_from_seed"][n] for n in ("largest", "rms"))
    return {**found, "within_noise": within}


def main(argv: list[str] | None = None) -> int:
    """Train, compare, print; returns 0 when the compiled curves are within the noise."""
    arguments = argparse.ArgumentParser("benchmarks.curve", description=__doc__.split("\n")[0])
    arguments.add_argument("--model", help="as load_model takes it (default: SmolLM2-135M-Instruct)")
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--seq", type=int, default=64)
    arguments.add_argument("--dtype", default="float32", help="of the compiled run")
    arguments.add_argument("--seeds", type=int, default=2, help="how many, at least 2")
    arguments.add_argument("--out", type=Path, help="write everything as JSON")
    args = arguments.parse_args(argv)
    if args.seeds < 2 or args.steps < SMOOTHING:
        arguments.error(f"noise needs two seeds, and a curve {SMOOTHING} steps")
    setting = Setting(args.steps, args.batch, args.seq, args.dtype)
    name = args.model or str(smollm2_gguf())
    losses: dict[str, dict[int, list[float]]] = {system: {} for system in SYSTEMS}
    seconds: dict[str, float] = {}
    for system, seed, run, took in curves(name, setting, list(range(args.seeds))):
        losses[system][seed] = run
        seconds[f"{system} {seed}"] = round(took, 1)
        print(f"{system:<9} seed {seed}: loss {run[0]:.3f} to {smoothed(run)[-1]:.3f} in {took:.0f} s", flush=True)
    found = compare(losses)
    for what, distances in list(found.items())[:2]:
        print(f"{what.replace('_', ' '):<20} largest {distances['largest']:.2e}, rms {distances['rms']:.2e}")
    print("within the noise" if found["within_noise"] else "NOT within the noise")
    if args.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        report = {"model": Path(name).name, **asdict(setting), "device": device, **versions, "seconds": seconds}
        args.out.write_text(json.dumps({**report, **found, "losses": losses}) + "\n", encoding="utf-8")
    return 0 if found["within_noise"] else 1


if __name__ == "__main__":
    sys.exit(main())
