"""Every operator against what this card can do, and against what it replaces.

    python -m benchmarks.kernels --shapes 8b,70b --operators rms_norm,rope --out kernels.json
    python -m benchmarks.kernels --quick      # shapes of 8B, fewer calls, nothing compiled: a minute on an H100

A row is one operator in one direction at one shape; "both" is forward and backward together. The ceiling of what moves
memory is a copy from device to device, counted as read and written; of what multiplies, the same base products by
cuBLAS; of attention, one large square product: all measured in the same run. Ours is called as autograd calls it, peers
run under autograd, and both forwards save what backward needs. Targets are meant for an H100.
"""

from __future__ import annotations

import argparse
import datetime
import math
import operator
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .kernel_cases import SIZES, Args, Case, Peer
from .more_kernel_cases import CASES
from .step import RESULTS, write
from .worker import environment

HEAD_START = 1_000_000
"""Clock cycles, half a millisecond, that the card idles before a timed call while Python launches all of it."""
WARM_UP = 3
"""Calls before the first that counts."""

_COMPARE = {"≥": operator.ge, "≤": operator.le}
_WAYS = ("forward", "backward")
TARGETS = {
    ("rms_norm", "forward"): ("≥", 2.7, "TB/s"),
    ("rms_norm", "backward"): ("≥", 2.4, "TB/s"),
    **{(name, way): ("≥", 2.6, "TB/s") for name in ("rope", "rope, interleaved") for way in _WAYS},
    **{(name, way): ("≥", 2.8, "TB/s") for name in ("swiglu", "geglu") for way in _WAYS},
    ("nf4_dequantize", "forward"): ("≥", 2.6, "TB/s"),
    ("linear_cross_entropy, frozen head", "both"): ("≤", 14, "ms"),
    ("linear_cross_entropy, trained head", "both"): ("≤", 20, "ms"),
    ("lora_linear", "both"): ("≤", 1.06, "× base products"),
    **{("attention", way): ("≥", 1.0, "× cudnn") for way in (*_WAYS, "both")},
}
VERDICTS = {True: "met", False: "not met", None: "unknown"}
OF_ONE_SHAPE = ("rms_norm", "linear_cross_entropy", "lora_linear")
"""Operators whose targets are stated for the shape of 8B."""


# -- time --------------------------------------------------------------------------------------------------------------


def median_ms(run: Peer, states: Sequence[Args], calls: int, prepare: Callable[..., Args] | None = None) -> float:
    """Median milliseconds of ``run(*state)`` on the device, taking turns through the states.

    ``prepare`` makes what run is given from each state, untimed, and before the first of them runs: otherwise what it
    wrote would still lie in the L2. Results are kept for a turn, so that they have places of their own too.
    """
    kept: list[Any] = [None] * len(states)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    warm = math.ceil(WARM_UP / len(states))
    for turn in range(warm + math.ceil(calls / len(states))):
        ready = [prepare(*state) for state in states] if prepare else states
        for i, state in enumerate(ready):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            kept[i] = run(*state)
            end.record()
            if turn >= warm:
                events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def ceilings(calls: int, elements: int = 1 << 28, square: int = 8192, device: str = "cuda") -> dict[str, float]:
    """What this card can do: TB/s of a copy, read and written, and TFLOP/s of a bfloat16 product."""
    source, a, b = (
        torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in ((elements,), *[(square, square)] * 2)
    )
    copy, product = median_ms(torch.empty_like(source).copy_, [(source,)], calls), median_ms(torch.mm, [(a, b)], calls)
    return {"copy TB/s": 2 * source.nbytes / copy / 1e9, "square product TFLOP/s": 2 * square**3 / product / 1e9}


# -- one case ----------------------------------------------------------------------------------------------------------


def nbytes(values: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def inputs(case: Case, l2_bytes: int) -> list[Args]:
    """Arguments in as many copies as exceed the L2 four times over."""
    first = case.arguments()
    return [first, *(case.arguments() for _ in range(math.ceil(4 * l2_bytes / nbytes(first)) - 1))]


def _upstream(output: Tensor) -> Tensor:
    """A random gradient; 1 for a loss, as in training (Liger skips a kernel then)."""
    return torch.randn_like(output) if output.dim() else torch.ones_like(output)


def backward_arguments(case: Case, args: Args) -> Args:
    """What autograd hands to the backward operator: gradients, what forward saved, other arguments, what is needed."""
    op, results = case.op, case.op(*args)
    results = results if isinstance(results, tuple) else (results,)
    values = dict(zip((*op.inputs, *op.outputs), (*args, *results), strict=True))
    others = [values[name] for name in op.inputs if name not in op.tensor_inputs]
    needs = [name in case.wanted for name in op.differentiable]
    return *(_upstream(values[name]) for name in op.gradients_of), *op.saved(values), *others, needs


def _leaves(case: Case, args: Args) -> list[Any]:
    return [a.detach().requires_grad_() if n in case.wanted else a for n, a in zip(case.op.inputs, args, strict=True)]


def peer_ms(case: Case, peer: Peer, direction: str, sets: Sequence[Args], calls: int) -> float | str:
    """Milliseconds of a peer under autograd, or why there are none."""

    def forward(*args: Any) -> Any:
        return peer(*_leaves(case, args))

    def prepare(*args: Any) -> Args:
        leaves = _leaves(case, args)
        outputs = [y for y in tree_leaves(peer(*leaves)) if isinstance(y, Tensor) and y.requires_grad]
        return outputs, [x for x in leaves if isinstance(x, Tensor) and x.requires_grad], [*map(_upstream, outputs)]

    try:
        if direction == "forward":
            return median_ms(forward, sets, calls)
        return median_ms(torch.autograd.grad, sets, calls, prepare)
    except Exception as error:  # noqa: BLE001  a failure is a result
        return f"{type(error).__name__}: {error}"[:300]


@torch.no_grad()
def own(case: Case, direction: str, sets: Sequence[Args], calls: int, card: dict[str, float]) -> dict[str, Any]:
    """Time of our operator, what it moves and computes, and the time that the ceiling needs for that."""
    op, args = case.op, sets[0]
    if reason := op.supports(*args):
        raise RuntimeError(f"the operator does not apply: {reason}")
    if direction == "forward":
        states, run, moved, flops = sets, op, op.bytes(*args), op.flops(*args)
    else:
        states, run, flops = [backward_arguments(case, s) for s in sets], op.overload_backward, op.backward_flops(*args)
        moved = nbytes((states[0], run(*states[0])))
    row: dict[str, Any] = {"ms": median_ms(run, states, calls), "bytes": moved, "flops": flops}
    if op.disabled:
        raise RuntimeError(f"the kernel failed, and this was its reference: {op.disabled}")
    if pairs := [products for s in sets if (products := case.products(direction, *s))]:
        row |= {"ceiling": "base products", "ceiling_ms": median_ms(_multiply, pairs, calls)}
    elif case.arithmetic:
        row |= {"ceiling": "square product", "ceiling_ms": flops / card["square product TFLOP/s"] / 1e9}
    else:
        row |= {"ceiling": "copy", "ceiling_ms": moved / card["copy TB/s"] / 1e9}
    return row


def _multiply(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [a @ b for a, b in pairs]


def rows_of(case: Case, size: str, *, calls: int, l2_bytes: int, card: dict[str, float], compiled: bool) -> list[dict]:
    """The rows of a case: forward, backward and, where products bound it, both together."""
    sets, peers = inputs(case, l2_bytes), dict(case.peers)
    if compiled and "eager" in peers:
        torch.compiler.reset()
        peers["compiled"] = torch.compile(peers["eager"], dynamic=False)
    label = {"operator": case.name, "shape": case.shape, "size": size}
    rows = []
    for direction in _WAYS if case.wanted else _WAYS[:1]:
        try:
            measured = own(case, direction, sets, calls, card)
        except Exception as error:  # noqa: BLE001  a failure is a result
            rows.append({**label, "direction": direction, "error": f"{type(error).__name__}: {error}"[:2000]})
            continue
        times = {name: peer_ms(case, peer, direction, sets, calls) for name, peer in peers.items()}
        rows.append({**label, "direction": direction, **measured, "peers": times})
    if len(rows) == 2 and rows[0].get("ceiling") != "copy" and not any("error" in row for row in rows):
        rows.append(together(*rows))
    return [judged(row) for row in rows]


def together(forward: dict[str, Any], backward: dict[str, Any]) -> dict[str, Any]:
    """One row for both directions; a peer that failed in one of them has failed."""
    sums = {name: forward[name] + backward[name] for name in ("ms", "bytes", "flops", "ceiling_ms")}
    peers = {
        name: next((t for t in times if isinstance(t, str)), None) or sum(times)
        for name, times in ((name, (forward["peers"][name], backward["peers"][name])) for name in forward["peers"])
    }
    return {**forward, **sums, "direction": "both", "peers": peers}


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its rates, its share of the ceiling, and its target where there is one for it."""
    if "error" in row:
        return row
    ms = row["ms"]
    row = {**row, "tb_per_s": row["bytes"] / ms / 1e9, "tflop_per_s": row["flops"] / ms / 1e9}
    row["share"] = row["ceiling_ms"] / ms
    target = TARGETS.get((row["operator"], row["direction"]))
    if target is None or (row["size"] != "8b" and row["operator"].startswith(OF_ONE_SHAPE)):
        return row
    relation, figure, unit = target
    reached = {"TB/s": row["tb_per_s"], "ms": ms, "× base products": ms / row["ceiling_ms"]}
    if isinstance(cudnn := row["peers"].get("cudnn"), float):
        reached["× cudnn"] = cudnn / ms
    # To two digits: the same kernel, timed twice, differs in the third. Unknown where the peer failed.
    met = _COMPARE[relation](round(reached[unit], 2), figure) if unit in reached else None
    return {**row, "target": f"{relation} {figure:g} {unit}", "reached": reached.get(unit), "met": met}


# -- the command -------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text; behind a peer's milliseconds how many times ours fit into them."""
    lines = [
        f"{'operator':<36}{'direction':<10}{'shape':<31}{'ms':>9}{'rate':>14}  {'of ceiling':<21}{'target':<31}peers"
    ]
    for row in rows:
        label = f"{row['operator']:<36}{row['direction']:<10}{row['shape']:<31}"
        if "error" in row:
            lines.append(f"{label}failed: {row['error'][:90]}")
            continue
        memory = row["ceiling"] == "copy"
        rate = f"{row['tb_per_s']:.2f} TB/s" if memory else f"{row['tflop_per_s']:.0f} TFLOP/s"
        share = f"{row['share']:.0%} {row['ceiling']}"
        target = f"{row['target']}: {VERDICTS[row['met']]}" if "target" in row else ""
        peers = "  ".join(
            f"{name} failed" if isinstance(ms, str) else f"{name} {ms:.4g} ({ms / row['ms']:.2f}×)"
            for name, ms in row["peers"].items()
        )
        lines.append(f"{label}{row['ms']:>9.4g}{rate:>14}  {share:<21}{target:<31}{peers}".rstrip())
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser("benchmarks.kernels", description=__doc__.split("\n")[0])
    arguments.add_argument("--shapes", type=_names(SIZES), help=f"of {', '.join(SIZES)} (default: all; 8b if quick)")
    arguments.add_argument("--operators", type=_names(CASES), default=[*CASES], help=f"of {', '.join(CASES)}")
    arguments.add_argument("--calls", type=int, help="timed calls per figure (default: 50; 10 if quick)")
    arguments.add_argument("--quick", action="store_true", help="8b unless --shapes says else, without torch.compile")
    arguments.add_argument("--out", type=Path, help="result file (default: benchmarks/results/kernels/DEVICE.json)")
    return arguments


def _names(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return parse


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write case by case, so that an interrupted run leaves what it has."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if not torch.cuda.is_available():
        arguments.error("this measures CUDA kernels, and PyTorch finds no CUDA device here")
    run(args, environment("cuda"), torch.cuda.get_device_properties(0).L2_cache_size)


def run(args: argparse.Namespace, where: dict[str, Any], l2_bytes: int) -> None:
    """The measurement, on whatever device the sizes name."""
    calls = args.calls or (10 if args.quick else 50)
    # In a folder of its own: the README's tables are made of the files beside it.
    path = args.out or RESULTS / "kernels" / f"{where['device'].lower().replace(' ', '-')}.json"
    card = ceilings(calls)
    print(where["device"], *(f"{what}: {rate:.4g}" for what, rate in card.items()), sep=", ")
    command = f"python -m benchmarks.kernels {shlex.join(sys.argv[1:])}"
    stamp = {"card": card, **where, "command": command, "date": datetime.date.today().isoformat()}
    rows: list[dict[str, Any]] = []
    print(table([]))
    for size in args.shapes or (["8b"] if args.quick else [*SIZES]):
        for name in args.operators:
            for case in CASES[name](SIZES[size]):
                new = rows_of(case, size, calls=calls, l2_bytes=l2_bytes, card=card, compiled=not args.quick)
                print("\n".join(table(new).splitlines()[1:]), flush=True)
                rows += [row | stamp for row in new]
                write(path, rows)
                torch.cuda.empty_cache()
    print(f"\n{path}")


if __name__ == "__main__":
    main()
