"""What did the compiler recognise in this model, what did it nearly recognise, and why not?"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..passes.runner import Site
from .options import Options
from .report import GraphReport
from .run import compiled, loss_of, undisturbed


@dataclass
class Explanation:
    """The result of :func:`explain`; ``print`` it.

    Attributes:
        model: class name and what is trained.
        graphs: a report per graph that Dynamo made.
        breaks: reasons of graph breaks, as Dynamo words them.
    """

    model: str
    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Site]:
        return [s for g in self.graphs for s in g.rewritten]

    @property
    def missed(self) -> list[Site]:
        return [s for g in self.graphs for s in g.missed]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Per operator: how many sites were rewritten, and how many there are with the near misses."""
        hits, misses = Counter(s.operator for s in self.rewritten), Counter(s.operator for s in self.missed)
        names = [p.name for g in self.graphs for p in g.passes]
        return {n: (hits[n], hits[n] + misses[n]) for n in dict.fromkeys(names)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(model: nn.Module, batch: Any, *, options: dict[str, Any] | None = None) -> Explanation:
    """Compile the model on a batch and say, place by place, what was recognised and what was not.

    The rewritten graph runs once, forward only, under eager autograd; gradients, buffers and random state are left as
    they were.

    Args:
        model: any module whose forward returns a loss, PEFT-wrapped or not.
        batch: keyword arguments of its forward (labels included), on the model's device.
        options: the backend's options; ``lowering`` is always "eager" here.

    Raises:
        OptionError: for an unknown option.
        BatchError: when the model returns no scalar loss.
    """
    parsed = Options.parse({**(options or {}), "lowering": "eager"})
    explanation = Explanation(describe(model))
    breaks = torch._dynamo.utils.counters["graph_break"]
    before = Counter(breaks)
    torch._dynamo.reset()
    with undisturbed(model):
        loss_of(compiled(model, parsed, explanation.graphs), batch)
    torch._dynamo.reset()
    explanation.breaks = list(Counter(breaks) - before)
    return explanation


def describe(model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inner = getattr(model, "get_base_model", lambda: model)()
    share = "all parameters trained" if trained == total else f"{trained:,} of {total:,} parameters trained"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{type(inner).__name__}, {share}, {dtype}"


def _lines(e: Explanation) -> list[str]:
    def plural(n: int, what: str) -> str:
        return f"{n} {what}" if n == 1 else f"{n} {what}s"

    lines = [f"{e.model}     {plural(len(e.graphs), 'graph')}, {plural(len(e.breaks), 'break')}"]
    counts = {name: count for name, count in e.counts.items() if count[1]}
    if counts:
        lines += _table(e, list(counts))
        total = "  ".join(f"{name} {hit}/{seen}" for name, (hit, seen) in counts.items())
        lines.append(f"{'total':<12}{total}")
    lines += [f"{'variant':<12}{op}: {detail} ({n})" for (op, detail), n in _details(e.rewritten).items() if detail]
    for (operator, reason, line), sites in _grouped(e.missed).items():
        where = f"{sites[0].module or 'graph'}" + (f" and {len(sites) - 1} more" if len(sites) > 1 else "")
        lines.append(f"{'missed':<12}{operator} in {where}: {reason}" + (f"  ({line})" if line else ""))
    for graph in e.graphs:
        if graph.fallback:
            lines.append(f"{'fallback':<12}{graph.fallback}")
        lines += [f"{'failed':<12}pass {p.name}: {p.error}" for p in graph.passes if p.error]
    lines += [f"{'break':<12}{reason.splitlines()[0]}" for reason in e.breaks]
    seconds = sum(g.capture_seconds for g in e.graphs), sum(p.seconds for g in e.graphs for p in g.passes)
    lines.append(f"{'time':<12}capture {seconds[0]:.2f} s, passes {seconds[1]:.2f} s")
    return lines


def _table(e: Explanation, names: list[str]) -> list[str]:
    """Layers with the same counts share a row."""
    cells: dict[str, dict[str, list[int]]] = defaultdict(lambda: {n: [0, 0] for n in names})
    for site in e.rewritten:
        cells[_layer(site.module)][site.operator][0] += 1
        cells[_layer(site.module)][site.operator][1] += 1
    for site in e.missed:
        cells[_layer(site.module)][site.operator][1] += 1
    rows: dict[str, list[str]] = defaultdict(list)
    for layer in sorted(cells, key=_layer_order):
        rows["".join(_cell(cells[layer][n], _width(n)) for n in names)].append(layer)
    header = f"{'layer':<12}" + "".join(f"{n:<{_width(n)}}" for n in names)
    return [header.rstrip(), *(f"{_span(layers):<12}{row}".rstrip() for row, layers in rows.items())]


def _width(name: str) -> int:
    return max(12, len(name) + 2)


def _cell(count: list[int], width: int) -> str:
    return f"{f'{count[0]}/{count[1]}' if count[1] else '–':<{width}}"


def _layer(module: str) -> str:
    found = re.search(r"\.(\d+)(?:\.|$)", module)
    return found.group(1) if found else "other"


def _layer_order(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdigit() else (1 << 30, layer)


def _span(layers: list[str]) -> str:
    """``["0", "1", "2", "5"]`` reads "0–2, 5"."""
    parts: list[list[str]] = []
    for layer in layers:
        if parts and layer.isdigit() and parts[-1][-1].isdigit() and int(layer) == int(parts[-1][-1]) + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(p[0] if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def _details(sites: list[Site]) -> Counter[tuple[str, str]]:
    return Counter((s.operator, s.detail) for s in sites)


def _grouped(sites: list[Site]) -> dict[tuple[str, str, str | None], list[Site]]:
    groups: dict[tuple[str, str, str | None], list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.operator, site.detail, site.source_line].append(site)
    return groups
