"""Completions per second, system against system, and whether they are those of the model.

    python -m benchmarks.rollout --shape llama-8b --mode lora --sequences 64 --new 512 --systems ours,transformers

Prompts are random, ``--group`` completions of each; tokens are drawn at temperature 1, and none ends a completion. One
process per system, rows as ``benchmarks.step`` keeps them. ``ours`` takes ``compile=false``, ``rows=N`` and
``fp32_head=true`` (logits that are not rounded, as with TRL's ``cast_lm_head_to_fp32``), and is held against the model
as well (``rollout_worker.py``): greedy tokens against those of ``generate`` and against the likeliest ones of a forward
pass of training, log-probabilities against that pass (``generate``'s too), and both after the weights have changed.

Random weights leave the two likeliest tokens about as likely as each other, so how many greedy tokens agree in bfloat16
is asked of weights that have learnt something, which continue pieces of this project's documentation:

    python -m benchmarks.rollout --shape smollm2-135m --weights SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import step

HERE = Path(__file__).parent
SYSTEMS = ("ours", "transformers", "unsloth")
WORKLOAD = ("shape", "mode", "dtype", "sequences", "group", "prompt", "new", "check", "runs", "device")


_OPTIONS = "compile=true|false, fp32_head=true|false and rows=N"


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one system in a process of its own; whatever happens to it becomes a row."""
    system, options = parse_system(name)
    work = {"system": system, "options": options, **{n: getattr(args, n) for n in WORKLOAD}}
    if args.weights:
        work["weights"] = str(Path(args.weights).resolve())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    if system == "unsloth" and args.peer_site:
        environment["PYTHONPATH"] = str(Path(args.peer_site).resolve())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(HERE / "rollout_worker.py"), json.dumps(work)]
        row = step.in_process(command, args.limit, env=environment, cwd=folder)
    return {"system": system, "workload": workload(args, options), **row, **step.provenance("benchmarks.rollout")}


def workload(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What makes two rows of one system different measurements."""
    weights = {"weights": Path(args.weights).name} if args.weights else {}
    return {n: getattr(args, n) for n in WORKLOAD} | weights | {"options": options}


def parse_system(name: str) -> tuple[str, dict[str, Any]]:
    """A system and its options: ``ours:compile=false:rows=64``.

    Raises:
        ValueError: for another system or option.
    """
    system, *parts = name.split(":")
    if system not in SYSTEMS:
        raise ValueError(f"{system} makes no completions here; systems are {', '.join(SYSTEMS)}")
    options: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if system != "ours" or key not in ("compile", "fp32_head", "rows"):
            raise ValueError(f"{system} takes no option {part!r}; ours takes {_OPTIONS}")
        options[key] = int(value) if key == "rows" else value == "true"
    return system, options


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, fastest first."""
    head = f"{'system':<24}{'tok/s':>10}{'s':>8}{'ms/token':>10}{'first s':>9}{'peak GiB':>10}{'after':>8}"
    lines = [head + "  greedy = argmax, = generate; |log p| off; stale"]
    for row in sorted(rows, key=lambda r: -r.get("tokens_per_s", 0)):
        name = ":".join([row["system"], *(f"{k}={v}" for k, v in row["workload"]["options"].items())])
        if "error" in row:
            lines.append(f"{name:<24}failed: {row['error'][:90]}")
            continue
        memory = [f"{row[n]:.2f}" if row[n] else "–" for n in ("peak_allocated_gib", "allocated_after_gib")]
        line = f"{name:<24}{row['tokens_per_s']:>10,.0f}{row['s_median']:>8.2f}{row['ms_per_token']:>10.2f}"
        line += f"{row['first_run_s']:>9.1f}{memory[0]:>10}{memory[1]:>8}"
        if "greedy_is_argmax" in row:
            line += f"  {row['greedy_is_argmax']:.2%}, {row['greedy_is_generate']:.2%}; {row['log_p_off']:.4f};"
            line += f" {row['stale_tokens']} of {row['tokens_that_tell']}" if "tokens_that_tell" in row else ""
        lines.append(line)
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser("benchmarks.rollout", description=__doc__.split("\n")[0])
    arguments.add_argument("--shape", default="llama-8b", help="a preset of models/presets.py; a name for --weights")
    arguments.add_argument("--weights", help="a GGUF file with trained weights (default: random ones)")
    arguments.add_argument("--mode", choices=("lora", "qlora", "full"), default="lora")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments.add_argument("--sequences", type=int, default=64)
    arguments.add_argument("--group", type=int, default=8, help="completions of each prompt")
    arguments.add_argument("--prompt", type=int, default=128, help="tokens")
    arguments.add_argument("--new", type=int, default=512, help="tokens of each completion")
    arguments.add_argument("--check", type=int, default=128, help="greedy tokens of each that are compared")
    arguments.add_argument("--systems", default="ours,transformers")
    arguments.add_argument("--runs", type=int, default=2, help="timed runs, after one that compiles")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--peer-site", help="folder into which the peer was installed")
    arguments.add_argument("--limit", type=int, default=900, help="seconds per system")
    arguments.add_argument("--out", help="result file (default: results/rollouts/SHAPE-MODE-SxN-DEVICE.json)")
    arguments.add_argument("--force", action="store_true", help="measure rows again that are there")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, row by row."""
    args = parser().parse_args(argv)
    name = f"{args.shape}-{args.mode}-{args.sequences}x{args.new}-{args.device}.json"
    path = Path(args.out) if args.out else step.RESULTS / "rollouts" / name
    if args.weights and not Path(args.weights).is_file():
        raise SystemExit(f"--weights: there is no file {args.weights}")
    if args.weights and args.mode == "qlora":
        raise SystemExit("--weights: they have 4 bits already; take --mode lora or full")
    if args.sequences % args.group:
        raise SystemExit(f"--sequences {args.sequences} is no multiple of --group {args.group}")
    names = args.systems.split(",")
    parsed = [parse_system(name) for name in names]  # a misspelt system is noticed before the first one has run
    rows = [
        ({"system": system, "workload": workload(args, options)}, functools.partial(measure, name, args))
        for name, (system, options) in zip(names, parsed, strict=True)
    ]
    step.measure_missing(path, rows, table, force=args.force)


if __name__ == "__main__":
    main()
