"""What did the compiler recognise in this model, what did it nearly recognise, and why not?"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..passes.recognise.attention import KEPT
from ..passes.runner import Site
from .breaks import Break, watched
from .coverage import LEFT, Coverage, Place, Share
from .options import Options
from .report import GraphReport
from .run import compiled, loss_of, undisturbed
from .shims import declared
from .stages import stopwatch

# What names of operators have in common that are of a family. A linear layer needs no reason, and there is one loss.
_WORDS = {"norm": "norm", "rotation": "rope", "attention": "attention", "gated MLP": "glu"}


@dataclass(frozen=True)
class MaskUse:
    """A mask that attentions have, and what takes it.

    Attributes:
        mask: what was proven of it, or why it was kept.
        kernel: what computes the attention.
        proven: whether the mask is implied by the kernel, and exists as a tensor no more.
        count: how many attentions.
    """

    mask: str
    kernel: str
    proven: bool
    count: int


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``print`` it, or take it as a dictionary, as JSON or as an HTML page.

    Attributes:
        model: class name and what is trained.
        graphs: a report per graph that Dynamo made.
        breaks: graph breaks, with what to do about each.
        stages: seconds by stage of the compilation, as PyTorch's own timers have them.
        shims: what this process has changed in other libraries.
    """

    model: str
    graphs: Sequence[GraphReport] = ()
    breaks: tuple[Break, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    shims: tuple[str, ...] = field(default_factory=declared)

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

    @property
    def coverage(self) -> Coverage:
        """Places, FLOPs and bytes of all graphs, and what of them is fused."""
        return sum((g.coverage for g in self.graphs if g.coverage is not None), Coverage())

    @property
    def unexplained(self) -> list[Place]:
        """Places that no match took and of whose module no near miss tells why."""
        told = {(family, s.module) for s in self.missed for family, word in _WORDS.items() if word in s.operator}
        return [p for p in self.coverage.left if p.family in _WORDS and (p.family, p.module) not in told]

    @property
    def plans(self) -> list[Any]:
        """The memory plan of each graph that was differentiated and planned in this process."""
        found = (getattr(g.partitioner, "last_plan", None) for g in self.graphs)
        return [plan for plan in found if plan is not None]

    @property
    def masks(self) -> list[MaskUse]:
        """The masks of all attentions."""
        taken = Counter((s.detail, True) for s in self.rewritten if s.operator == "attention")
        taken += Counter((s.detail, False) for s in self.missed if s.operator == "attention" and "mask" in s.detail)
        uses = []
        for (detail, ours), n in taken.items():
            implied = ours and KEPT not in detail
            proven, _, why = detail.partition(": ")  # "causal ∧ window 16: no kernel …" or "the mask is kept: …"
            mask = detail if implied else f"not understood: {why}" if proven == KEPT else proven
            kernel = "unsloth's attention" if ours else "PyTorch's attention"
            uses.append(MaskUse(mask, kernel if implied else f"{kernel}, with the mask as a tensor", implied, n))
        return uses

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, in order."""
        ours = {
            "capture": sum(g.capture_seconds for g in self.graphs),
            "passes": sum(g.passes_seconds for g in self.graphs),
        }
        first = {name: s for name, s in self.stages.items() if name == "dynamo"}
        return {**first, **ours, **self.stages}

    @property
    def troubles(self) -> list[str]:
        """Stages and passes that had to be left out."""
        fallbacks = [f"fallback: {g.fallback}" for g in self.graphs if g.fallback]
        return fallbacks + [f"pass {p.name}: {p.error}" for g in self.graphs for p in g.passes if p.error]

    def to_dict(self) -> dict[str, Any]:
        """Everything that is printed, in lists, dictionaries, strings and numbers."""
        columns = [name for name, count in self.counts.items() if count[1]]
        coverage = self.coverage
        return {
            "model": self.model,
            "graphs": len(self.graphs),
            "breaks": [asdict(b) for b in self.breaks],
            "coverage": {
                "places": {family: list(count) for family, count in coverage.places.items()},
                "flops": _share(coverage.flops),
                "bytes": _share(coverage.bytes),
            },
            "columns": columns,
            "layers": [(layer, [_cell_facts(cells[name]) for name in columns]) for layer, cells in _cells(self)],
            "missed": [
                {
                    "operator": operator,
                    "reason": reason,
                    "source_line": line,
                    "how_far": max(s.how_far for s in sites),
                    "modules": [s.module for s in sites],
                }
                for (operator, reason, line), sites in _grouped(self.missed).items()
            ],
            "unexplained": [
                {"family": family, "source_line": line, "modules": [p.module for p in places]}
                for (family, line), places in _alike(self.unexplained).items()
            ],
            "memory": [str(plan) for plan in self.plans],
            "masks": [asdict(m) for m in self.masks],
            "troubles": self.troubles,
            "shims": list(self.shims),
            "seconds": {name: round(s, 3) for name, s in self.seconds.items()},
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def to_html(self) -> str:
        """One self-contained page: readable on a phone, printed, light and dark."""
        from .page import render

        return render(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(model: nn.Module, batch: Any, *, options: dict[str, Any] | None = None) -> Explanation:
    """Compile the model on a batch and say, place by place, what was recognised and what was not.

    The rewritten graph runs once, forward only, under eager autograd; gradients, buffers and random state are left as
    they were. With ``options={"lowering": "inductor"}`` the whole step is compiled and run, and the time of every
    stage is in the answer.

    Args:
        model: any module whose forward returns a loss, PEFT-wrapped or not.
        batch: keyword arguments of its forward (labels included), on the model's device.
        options: the backend's options; ``lowering`` is "eager" here unless it is given.

    Raises:
        OptionError: for an unknown option.
        BatchError: when the model returns no scalar loss.
    """
    parsed = Options.parse({"lowering": "eager", **(options or {})})
    reports: list[GraphReport] = []
    with undisturbed(model), watched() as breaks, stopwatch() as stages:
        loss = loss_of(compiled(model, parsed, reports), batch)
        if parsed.lowering == "inductor":
            loss.backward()
    return Explanation(describe(model), tuple(reports), tuple(breaks), stages)


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
    if (coverage := e.coverage).flops.total:
        costs = (("FLOPs", coverage.flops), ("bytes", coverage.bytes))
        shares = [f"{name} {s.covered:.0%} fused, {_library(s):.0%} library kernels" for name, s in costs]
        lines.append(f"{'covered':<12}{'; '.join(shares)}")
        places = {name: count for name, count in coverage.places.items() if name not in LEFT}
        lines.append(f"{'places':<12}{'  '.join(f'{name} {hit}/{there}' for name, (hit, there) in places.items())}")
        for family in LEFT.keys() & coverage.places.keys():
            lines.append(f"{'left':<12}{plural(coverage.places[family][1], family)}: {LEFT[family]}")
    lines += [f"{'mask':<12}{m.mask} → {m.kernel} ({m.count})" for m in e.masks]
    for (operator, reason, line), sites in _grouped(e.missed).items():
        where = f"{sites[0].module or 'graph'}" + (f" and {len(sites) - 1} more" if len(sites) > 1 else "")
        lines.append(f"{'missed':<12}{operator} in {where}: {reason}{f'  ({line})' if line else ''}")
    for (family, line), places in _alike(e.unexplained).items():
        where = f"{places[0].module or 'graph'}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")
        lines.append(f"{'left':<12}{family} in {where}: no formula of ours comes close{f'  ({line})' if line else ''}")
    for graph in e.graphs:
        if graph.dropped_outputs:
            lines.append(f"{'logits':<12}not kept (options: logits=drop)")
        if (plan := getattr(graph.partitioner, "last_plan", None)) is not None:
            told = str(plan).splitlines()
            lines += [f"{'memory':<12}{told[0]}", *(f"{'':<12}{line}" for line in told[1:])]
        if graph.fallback:
            lines.append(f"{'fallback':<12}{graph.fallback}")
        lines += [f"{'failed':<12}pass {p.name}: {p.error}" for p in graph.passes if p.error]
    for found in e.breaks:
        lines += [f"{'break':<12}{found}", f"{'':<12}→ {found.remedy}"]
    lines += [f"{'shim':<12}{shim}" for shim in e.shims]
    lines.append(f"{'time':<12}{', '.join(f'{name} {s:.2f} s' for name, s in e.seconds.items())}")
    return lines


def _alike(places: list[Place]) -> dict[tuple[str, str | None], list[Place]]:
    groups: dict[tuple[str, str | None], list[Place]] = defaultdict(list)
    for place in places:
        groups[place.family, place.source_line].append(place)
    return groups


def _library(share: Share) -> float:
    return share.library / share.total if share.total else 0.0


def _share(share: Share) -> dict[str, float]:
    return {**asdict(share), "covered": share.covered}


def _cells(e: Explanation) -> list[tuple[str, dict[str, list[Site | None]]]]:
    """By layer and operator the details of rewritten sites, and None for each that was missed."""
    cells: dict[str, dict[str, list[Site | None]]] = defaultdict(lambda: defaultdict(list))
    for site in e.rewritten:
        cells[_layer(site.module)][site.operator].append(site)
    for site in e.missed:
        cells[_layer(site.module)][site.operator].append(None)
    return sorted(cells.items(), key=lambda item: _layer_order(item[0]))


def _cell_facts(sites: Iterable[Site | None]) -> dict[str, Any]:
    found = list(sites)
    details = dict.fromkeys(s.detail for s in found if s is not None and s.detail)
    return {"hit": sum(s is not None for s in found), "of": len(found), "details": list(details)}


def _table(e: Explanation, names: list[str]) -> list[str]:
    """Layers with the same counts share a row."""
    rows: dict[str, list[str]] = defaultdict(list)
    for layer, cells in _cells(e):
        counts = {n: [sum(s is not None for s in cells[n]), len(cells[n])] for n in names}
        rows["".join(_cell(counts[n], _width(n)) for n in names)].append(layer)
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
