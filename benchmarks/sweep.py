"""Every architecture that transformers has: is a compiled step of it the same step?

    python -m benchmarks.sweep [--family text|vision] [--types llama,gpt2 | --sample] [--lowering eager] [--jobs 1]
                               [--out docs/architectures.md] [--json results.json]

A tiny random model of each type (``models/shrink.py``), of causal language models and of those from images and text to
text (``benchmarks/pictures.py`` makes their batches), takes one step in eager and one compiled by our backend under
``strict`` and eager lowering; the loss and every gradient are compared. Models of images run as the trainer runs them
(``runtime/image_shapes.py``), against eager as it is. The models run in worker processes
(``benchmarks/sweep_worker.py``) that are replaced when one dies or exceeds its time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from unsloth.compiler.coverage import LEFT

from . import sweep_worker

OUT = Path(__file__).parent.parent / "docs" / "architectures.md"
LIMIT = 480.0
"""Seconds per type. Dynamo alone takes a minute for some scans, and several on a machine that does other work."""
OPERATORS = ("rms_norm", "rope", "glu", "attention", "linear_cross_entropy")
FAMILIES = ("norm", "rotation", "attention", "gated MLP")
"""Of which a decoder-only transformer's blocks are made; their places are counted without the matcher."""
SAMPLE = (
    "llama", "gemma2", "phi3", "qwen3", "mistral", "olmo2", "gpt_neox", "falcon", "mixtral", "deepseek_v3", "gpt_oss",
    "mamba",
)  # fmt: skip
"""Twelve types that differ most, for a sweep under Inductor, where one takes half a minute."""
STATUSES = ("equal", "wrong", "crashed", "random", "eager cannot run")
KNOWN = {"text": sweep_worker.causal_types, "vision": sweep_worker.image_types}
NAMES = {"text": "causal language model", "vision": "image-text-to-text"}
HEADING = "## From images and text to text"
_COMPARED = (
    "every parameter trained) and compared with eager: the loss to 1e-5, each gradient to 1e-3 of its norm, and the "
    "same parameters have one."
)
_FRESH_AFTER = 40  # types per process: compiled code and guards are never given back as a whole

Row = dict[str, Any]


def sweep(
    types: list[str], jobs: int = 1, limit: float = LIMIT, lowering: str = "eager", family: str = "text"
) -> list[Row]:
    """A row per type, in the given order; see :func:`benchmarks.sweep_worker.examine` for its fields."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in types:
        waiting.put(name)
    rows: dict[str, Row] = {}
    threads = [
        threading.Thread(target=_drain, args=(waiting, rows, limit, len(types), lowering, family)) for _ in range(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[name] for name in types]


def _drain(
    waiting: queue.SimpleQueue[str], rows: dict[str, Row], limit: float, total: int, lowering: str, family: str
) -> None:
    worker: _Worker | None = None
    while True:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            break
        if worker is None or worker.served >= _FRESH_AFTER:
            if worker is not None:
                worker.stop()
            worker = _Worker(lowering, family)
        row = worker.ask(name, limit)
        if row is None:
            worker.stop()
            worker, row = None, {"type": name, "status": "crashed", "reason": f"no answer within {limit:.0f} s"}
        rows[name] = row
        print(f"{len(rows):>4}/{total}  {name:<28}{row['status']}  {row.get('reason', '')}"[:160], flush=True)
    if worker is not None:
        worker.stop()


class _Worker:
    """A process that examines one type after the other."""

    def __init__(self, lowering: str, family: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and their locks
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=sweep_worker.serve, args=(other, lowering, family), daemon=True)
        self.process.start()
        other.close()
        self.served = 0

    def ask(self, name: str, limit: float) -> Row | None:
        """The type's row, or None when the process died or took too long."""
        self.served += 1
        if self.served == 1 and not self._ready(limit):
            return None
        try:
            self.pipe.send(name)
            return self.pipe.recv() if self.pipe.poll(limit) else None
        except (EOFError, OSError):
            return None

    def _ready(self, limit: float) -> bool:
        """Importing torch and transformers is no part of the first type's time."""
        try:
            return self.pipe.poll(limit) and self.pipe.recv() == "ready"
        except (EOFError, OSError):
            return False

    def stop(self) -> None:
        self.pipe.close()  # by which a worker that still listens ends
        self.process.join(timeout=2)
        self.process.kill()
        self.process.join()


# -- the document -----------------------------------------------------------------------------------------------------


def document(rows: list[Row], versions: dict[str, str]) -> str:
    """The rows of causal language models as Markdown: what came out of it, then a table row per type."""
    decoders = [r for r in rows if r["status"] == "equal" and is_decoder_only(r)]
    lines = [
        "# Architectures",
        "",
        "One training step of a tiny random model of every causal language model type in transformers, compiled by the "
        f'backend (`strict`, `lowering="eager"`, float32, CPU, 2×17 tokens, {_COMPARED} '
        f"Written by `make sweep` with {', '.join(f'{n} {v}' for n, v in versions.items())}.",
        "",
        *_outcome(rows),
        *_recognised(decoders, f"the {len(decoders)} decoder-only transformers (rotary attention and norms)"),
        "",
        "*Covered* is the share of the forward pass's FLOPs and bytes that operators of ours took, counted without the "
        "matcher; with every parameter trained and so little width, plain matrix products are most of both. "
        "A count such as 4/5 is places rewritten of places that look like the operator; a dash means that none does. "
        "A miss keeps the model's own formula: slower, never wrong. The logits are kept here, so that no loss is "
        "computed without them. *Breaks* are distinct reasons. *Same seed*: the model draws random numbers. "
        "*Eager cannot run*: the default configuration is incomplete, the model wants more than tokens, or the "
        "rules of `models/shrink.py` find no tiny one; the message is that of the first attempt.",
        "",
        *_table(rows),
    ]
    return "\n".join(lines) + "\n"


def document_with_images(rows: list[Row], versions: dict[str, str]) -> str:
    """The rows of models from images and text to text, likewise; it stands below the other one."""
    equal = [r for r in rows if r["status"] == "equal"]
    lines = [
        HEADING,
        "",
        "The same for every image-text-to-text type, tower and projector included: 2 rows of 17 tokens of text and the "
        f"tokens of a tiny image each, whose pixels must change the loss (float32, {_COMPARED} "
        f"Written by `make sweep` with {', '.join(f'{n} {v}' for n, v in versions.items())}.",
        "",
        *_outcome(rows),
        *_recognised(equal, f"these {len(equal)}, towers and projectors included,"),
        "",
        "The step runs as the trainer runs it: what is read off the sizes of images is a symbol of the graph, or "
        "computed before it, as [image shapes](image_shapes.md) says. *Breaks*: what is left of that, mostly numbers "
        "that a tower reads off a grid of patches, as in `torch.split(x, lengths.tolist())`, and branches on them.",
        "",
        *_table(rows),
    ]
    return "\n".join(lines) + "\n"


def joined(old: str, new: str) -> str:
    """The whole document, one of its two parts replaced; ``new`` is a part, or both."""
    text, _, images = old.partition(HEADING)
    new_text, found, new_images = new.partition(HEADING)
    images = new_images if found else images
    text = (new_text.strip() or text.strip()) + "\n"
    return f"{text}\n{HEADING}{images}" if images else text


def _outcome(rows: list[Row]) -> list[str]:
    count = Counter(row["status"] for row in rows)
    equal = [r for r in rows if r["status"] == "equal"]
    whole = sum(r["graphs"] == 1 and not r["breaks"] for r in equal)
    found = ", ".join(f"{name} in {sum(bool(r['counts'].get(name, [0])[0]) for r in equal)}" for name in OPERATORS)
    return [
        f"- {len(rows)} types; eager itself runs a tiny model of {len(rows) - count['eager cannot run']}.",
        f"- **{count['equal']} equal, {count['wrong']} wrong, {count['crashed']} crashed**"
        + (f", {count['random']} random in eager" if count["random"] else "")
        + f"; {whole} of the equal ones in one graph.",
        f"- Rewritten somewhere: {found}.",
    ]


def _table(rows: list[Row]) -> list[str]:
    ranked = sorted(rows, key=lambda r: (r["status"] == "eager cannot run", r["type"]))
    return [
        "| type | result | graphs | breaks | covered | " + " | ".join(OPERATORS) + " | missed because |",
        "|---|---|---:|---:|---:|" + "---:|" * len(OPERATORS) + "---|",
        *map(_line, ranked),
    ]


def _line(row: Row) -> str:
    reason = _cell(row.get("reason", ""), 160)
    status = row["status"] + (", same seed" if row.get("seeded") else "")
    result = f"{status}: {reason}" if reason else status
    counts = [row.get("counts", {}).get(name, [0, 0]) for name in OPERATORS]
    cells = [f"{hit}/{seen}" if seen else "–" for hit, seen in counts]
    misses = "; ".join(_cell(m, 70) for m in row.get("misses", []))
    graphs = [str(row.get(name, "–")) for name in ("graphs", "breaks")]
    covered = " / ".join(f"{share:.0%}" for share in row.get("covered", [])) or "–"
    return f"| {' | '.join([row['type'], result, *graphs, covered, *cells, misses])} |"


def _recognised(rows: list[Row], whose: str) -> list[str]:
    """How much was recognised of what transformers are made of."""
    lines = [f"- Of the places in {whose} recognised:"]
    for family in FAMILIES:
        counts = [r["places"].get(family, (0, 0)) for r in rows]
        hit, there = (sum(c[i] for c in counts) for i in (0, 1))
        whole = sum(c[0] == c[1] for c in counts)
        share = f"{hit / there:.1%}" if there else "–"
        lines.append(f"  - {family}: **{share}** ({hit} of {there}), all of them in {whole} types")
    for family, why in LEFT.items():
        counts = [r["places"].get(family, (0, 0))[1] for r in rows]
        lines.append(f"  - {family}: {sum(counts)} in {sum(map(bool, counts))} types, {why}")
    return lines


def is_decoder_only(row: Row) -> bool:
    """Whether a type is built as today's decoders are: rotated queries and keys, softmax attention, and norms.

    Decided by what its graph holds, not by its name: encoders' positions are learned, and scans have no softmax.
    """
    there = {family for family, (_, count) in row.get("places", {}).items() if count}
    return {"rotation", "attention"} <= there and bool({"norm", "layer norm"} & there)


def _cell(text: str, width: int) -> str:
    """On one line, shortened, and without what ends a table's cell or starts HTML."""
    text = re.sub(r"\s+", " ", text).strip()
    text = text if len(text) <= width else text[: width - 1].rstrip() + "…"
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(argv: list[str] | None = None) -> int:
    """Sweep and write; the exit code is 1 when a type is wrong or crashed."""
    arguments = argparse.ArgumentParser("benchmarks.sweep", description=__doc__.split("\n")[0])
    arguments.add_argument("--family", choices=tuple(KNOWN), help="causal language models, or models that take images")
    arguments.add_argument("--types", help="a comma-separated list (default: all)")
    arguments.add_argument("--sample", action="store_true", help=f"twelve types that differ most: {', '.join(SAMPLE)}")
    arguments.add_argument("--lowering", choices=("eager", "inductor"), default="eager", help="as the backend's option")
    arguments.add_argument("--jobs", type=int, default=1, help="worker processes")
    arguments.add_argument("--out", type=Path, help=f"the document (default: {OUT.name}, for a sweep of all types)")
    arguments.add_argument("--json", type=Path, help="the rows, for a closer look")
    args = arguments.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = args.types.split(",") if args.types else list(SAMPLE) if args.sample else None
    families = [args.family] if args.family else list(KNOWN) if chosen is None else ["text"]
    rows: list[Row] = []
    for family in families:
        limit = LIMIT * (2 if args.lowering == "inductor" else 1)
        known = KNOWN[family]()
        if unknown := sorted(set(chosen or ()) - set(known)):
            arguments.error(f"transformers has no {NAMES[family]} type {', '.join(unknown)}")
        found = sweep(chosen or known, args.jobs, limit, args.lowering, family)
        rows += found
        if (out := args.out or (OUT if chosen is None and args.lowering == "eager" else None)) is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            part = (document_with_images if family == "vision" else document)(found, sweep_worker.versions())
            out.write_text(joined(out.read_text() if out.exists() else "", part))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    count = Counter(row["status"] for row in rows)
    print(", ".join(f"{count[status]} {status}" for status in STATUSES))
    return int(bool(count["wrong"] or count["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
