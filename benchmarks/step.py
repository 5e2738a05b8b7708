"""Time and memory of one training step, system against system.

    python -m benchmarks.step --shape llama-1b --mode lora --batch 4 --seq 2048 --systems ours,inductor,hf
    python -m benchmarks.step --suite peers --peer-site DIR [--only 8b-qlora]      # the rows of benchmarks/suites.py

One process per system. Every row is written as soon as it is measured, so an interrupted run goes on where it stopped.
A variant of ours carries its options in its name: ``ours:logits=drop``, ``ours:disable=rope+glu``. A peer that has our
import name is installed into a folder of its own, which ``--peer-site`` names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .suites import SUITES, Work

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SYSTEMS = ("ours", "recorded", "inductor", "hf", "float32", "trl", "liger", "unsloth")
PEERS = ("trl", "liger", "unsloth")
CLOSE = {"loss": 1e-3, "grad_norm": 2e-2}
"""Relative to float32. bfloat16 rounds by up to 2^-9 = 2e-3 at each operator; a mean over thousands of tokens and a
norm over millions of gradients keep little of it: 1e-4 and 3e-3 between systems that compute the same. A system that
leaves out a token, a layer or a gradient is off by more."""
WORKLOAD = ("shape", "mode", "batch", "seq", "steps", "warmup", "device", "regime", "checkpointing")
"""Arguments of the command line that make two rows of one system different measurements, beside its options."""


def parse_system(name: str) -> tuple[str, dict[str, Any]]:
    """``"ours:logits=drop:disable=rope+glu"`` to the system and its options.

    Raises:
        ValueError: for an unknown system, or options to a system that takes none.
    """
    system, *settings = name.split(":")
    if system not in SYSTEMS:
        raise ValueError(f"unknown system {system!r}; systems are {', '.join(SYSTEMS)}")
    if settings and system not in ("ours", "recorded"):
        raise ValueError(f"{system} takes no options, {name!r} has some")
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{name!r}: an option is written name=value")
        if key == "disable":
            options[key] = value.split("+")
        else:
            options[key] = int(value) if value.isdigit() else {"true": True, "false": False}.get(value, value)
    return system, options


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file, none if it does not exist."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a result file as a whole: a reader sees the old rows or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    os.replace(temporary, path)


def measure_missing(
    path: Path,
    rows: Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]],
    table: Callable[[list[dict[str, Any]]], str],
    *,
    force: bool,
    parallel: int = 1,
) -> None:
    """Measure what a result file lacks or has as a failure, row by row, and print the whole.

    Args:
        path: the file; it is written after every row.
        rows: of each the system and workload that ``key`` tells it by, and what measures it.
        table: rows as text, a head and a line for each.
        force: measure again what is there.
        parallel: rows that are measured at one time.
    """
    there = {} if force else {key(r) for r in read(path) if "error" not in r}
    missing = [measure for wanted, measure in rows if key(wanted) not in there]
    with ThreadPoolExecutor(parallel) as pool:
        for future in as_completed([pool.submit(measure) for measure in missing]):
            row = future.result()
            write(path, [r for r in read(path) if key(r) != key(row)] + [row])
            print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{table(read(path))}\n\n{path}")


def key(row: dict[str, Any]) -> str:
    """What makes two rows the same measurement."""
    return json.dumps({"system": row["system"], **row["workload"]}, sort_keys=True)


def measure(name: str, args: argparse.Namespace, path: Path, turns: str | None = None) -> dict[str, Any]:
    """Measure one system in a process of its own; whatever happens to it becomes a row."""
    system, options = parse_system(name)
    peer = system in PEERS
    profile = f"{path.resolve().with_suffix('')}-{re.sub(r'[:=+]', '-', name)}.txt" if args.profile else None
    work = {"system": system, "options": options, **{n: getattr(args, n) for n in WORKLOAD}, "profile": profile}
    work["turns"] = turns
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    if peer and args.peer_site:
        environment["PYTHONPATH"] = str(Path(args.peer_site).resolve())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(HERE / "worker.py"), json.dumps(work)]
        row = in_process(command, args.limit, env=environment, cwd=folder)
    workload = {n: work[n] for n in WORKLOAD} | {"options": options}
    return {"system": system, "workload": workload, **row, **provenance("benchmarks.step")}


def in_process(
    command: list[str], limit: int, *, env: dict[str, str], cwd: str | None = None, log: Path | None = None
) -> dict[str, Any]:
    """The row that a process writes as JSON to the file named by its last argument, which is added to the command.

    Args:
        limit: seconds after which it is stopped.
        log: where it prints to; None for a file that is dropped.

    Returns:
        the row; with "error" and the end of the "log" if there is none, or it says so itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "row.json", log or Path(folder) / "log.txt"
        try:
            with log.open("w") as sink:
                code = subprocess.run(
                    [*command, str(output)], env=env, cwd=cwd, stdout=sink, stderr=sink, timeout=limit, check=False
                ).returncode
            row = json.loads(output.read_text()) if output.exists() else {"error": f"exit code {code}"}
        except subprocess.TimeoutExpired:
            row = {"error": f"not done after {limit} s"}
        return row if "error" not in row else {**row, "log": log.read_text(errors="replace")[-3000:]}


def provenance(module: str) -> dict[str, str]:
    """Which command measured a row, and when."""
    command = f"python -m {module} {shlex.join(sys.argv[1:])}".strip()
    return {"command": command, "date": datetime.date.today().isoformat()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, fastest first."""
    lines = [f"{'system':<36}{'tok/s':>9}{'ms':>9}{'peak GiB':>10}{'reserved':>10}{'first s':>9}  loss"]
    for row in sorted(rows, key=lambda r: -r.get("tokens_per_s", 0)):
        if "error" in row:
            lines.append(f"{label(row):<36}failed: {row['error'][:90]}")
            continue
        peak = [f"{row[n]:.2f}" if row[n] else "–" for n in ("peak_allocated_gib", "peak_reserved_gib")]
        ms = row.get("ms_in_a_row", row["ms_median"])  # as older rows have it
        lines.append(
            f"{label(row):<36}{row['tokens_per_s']:>9,.0f}{ms:>9.1f}{peak[0]:>10}{peak[1]:>10}"
            f"{row['first_step_s']:>9.1f}  {row['losses'][0]:.4f} → {row['losses'][-1]:.4f}"
        )
        if "profile" in row:
            lines.append(_profile_line(row["profile"], row.get("floor", {})))
    return "\n".join(lines)


def _profile_line(profile: dict[str, float], floor: dict[str, float]) -> str:
    parts = [
        f"{kind} {profile[f'{kind}_ms']:.1f}" + (f" (floor {floor[f'{kind}_ms']:.1f})" if f"{kind}_ms" in floor else "")
        for kind in ("products", "attention", "rest", "idle")
    ]
    return f"    {profile['span_ms']:.1f} ms in {profile['kernels']:.0f} kernels: {', '.join(parts)}"


def label(row: dict[str, Any]) -> str:
    """A system with what sets it apart."""
    options = row["workload"]["options"]
    parts = [f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in options.items()]
    if row["workload"]["checkpointing"] != "none":
        parts.append(f"checkpointing={row['workload']['checkpointing']}")
    return ":".join([row["system"], *parts])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser("benchmarks.step", description=__doc__.split("\n")[0])
    arguments.add_argument("--shape", default="llama-1b", help="a preset of models/presets.py")
    arguments.add_argument("--mode", choices=("lora", "qlora", "full"), default="lora")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--seq", type=int, default=2048)
    arguments.add_argument("--systems", default="ours:logits=drop,ours,inductor,hf")
    arguments.add_argument("--steps", type=int, default=15, help="timed steps")
    arguments.add_argument("--warmup", type=int, default=5)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--regime", choices=("bf16", "peft"), default="bf16")
    arguments.add_argument("--checkpointing", choices=("none", "hf", "unsloth"), default="none")
    arguments.add_argument("--peer-site", help="folder into which the peers were installed")
    arguments.add_argument("--limit", type=int, default=600, help="seconds per system")
    arguments.add_argument("--suite", choices=SUITES, help="measure the workloads of a suite, each into its own file")
    arguments.add_argument("--only", default="", help="of a suite the workloads whose name has this in it")
    arguments.add_argument("--out", help="result file (default: benchmarks/results/SHAPE-MODE-BATCHxSEQ-CARD.json)")
    arguments.add_argument("--card", help="how the result file calls the device, as h100 (default: as --device)")
    arguments.add_argument("--force", action="store_true", help="measure rows again that are there")
    arguments.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="systems that load and compile at one time; each is timed alone, and all must fit into memory (default 1)",
    )
    arguments.add_argument(
        "--profile",
        action="store_true",
        help="split a step into products, attention, rest and idle, beside the floor, and write its kernels by time",
    )
    return arguments


def result_file(args: argparse.Namespace) -> Path:
    """Where the rows of a workload are kept."""
    default = RESULTS / f"{args.shape}-{args.mode}-{args.batch}x{args.seq}-{args.card or args.device}.json"
    return Path(args.out) if args.out else default


def missing(args: argparse.Namespace) -> list[str]:
    """Which of the systems asked for have no row yet, or one of a failure.

    Raises:
        ValueError: for a system that there is not: it is noticed before the first one has run for minutes.
    """
    wanted = {}
    for name in args.systems.split(","):
        system, options = parse_system(name)
        wanted[name] = {"system": system, "workload": {n: getattr(args, n) for n in WORKLOAD} | {"options": options}}
    there = set() if args.force else {key(row) for row in read(result_file(args)) if "error" not in row}
    return [name for name, row in wanted.items() if key(row) not in there]


def measure_workload(args: argparse.Namespace) -> None:
    """Measure what one workload's file lacks, row by row, and print the whole."""
    path = result_file(args)
    names = missing(args)
    with tempfile.TemporaryDirectory() as turns, ThreadPoolExecutor(args.parallel) as pool:
        together = turns if args.parallel > 1 else None
        for future in as_completed([pool.submit(measure, name, args, path, together) for name in names]):
            row = future.result()
            write(path, [r for r in read(path) if key(r) != key(row)] + [row])
            print(*table([row]).splitlines()[1:], sep="\n", flush=True)
    print(f"\n{table(read(path))}\n\n{path}", *deviations(read(path)), sep="\n")


def deviations(rows: list[dict[str, Any]]) -> list[str]:
    """Which systems train something else than float32 does, by their first loss and the norm of their first gradient.

    Args:
        rows: of one shape, mode and batch. Without one of "float32" nothing is known; older rows lack the norm.
    """
    truth = next((r for r in rows if r["system"] == "float32" and "error" not in r), None)
    found = []
    for row in rows if truth else ():
        if "first_grad_norm" not in row:
            continue
        for name, ours, its in (
            ("loss", row["losses"][0], truth["losses"][0]),
            ("grad_norm", row["first_grad_norm"], truth["first_grad_norm"]),
        ):
            if not abs(ours - its) <= CLOSE[name] * abs(its):
                found.append(f"{label(row)}: {name} of the first step is {ours:.6g}, in float32 {its:.6g}")
    return found


def of_suite(work: Work, args: argparse.Namespace) -> argparse.Namespace:
    """The command line with a workload of a suite in place of the one that it names."""
    settings = {name: value for name, value in work._asdict().items() if name != "name"}
    return argparse.Namespace(**{**vars(args), **settings, "systems": ",".join(work.systems)})


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, row by row."""
    args = parser().parse_args(argv)
    if args.suite is None:
        return measure_workload(args)
    chosen = [of_suite(work, args) for work in SUITES[args.suite] if args.only in work.name]
    for each in chosen:
        missing(each)  # a misspelt system is noticed before the first one has run for minutes
    for each in chosen:
        measure_workload(each)
    return None


if __name__ == "__main__":
    main()
