"""Runs recognisers over a graph, applies what they find behind the soundness checks, and keeps account of it.

The passes work on a copy. If one raises, or if its result fails a check, the copy is dropped, one warning names the
pass, and the others start again without it; under ``strict`` the error is raised instead.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._logging import trace_structured

from .rewrite import Known, Match, Miss, Recogniser, Refused, apply, module_path, regions, source_line
from .soundness import (
    LostGradient,
    Unsound,
    assert_keeps_gradients,
    assert_same_mathematics,
    count_guards,
    forget_record,
)

# What AOTAutograd and Inductor read from Dynamo's graph module besides its graph.
MODULE_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "shape_env", "compile_subgraph_reason")


class CompilerWarning(UserWarning):
    """Something was left out of the compiled graph; the numbers are still right."""


class PassError(RuntimeError):
    """A pass failed under ``strict``."""


@dataclass(frozen=True)
class Site:
    """One place in the model where a pass matched or nearly did.

    Attributes:
        operator: what it is, or nearly is ("rms_norm").
        module: dotted path of the module it came from, ``""`` when unknown.
        source_line: ``file.py:line`` of the model's source, or None.
        detail: the variant that matched, or the reason why nothing did.
        how_far: for near misses, how many nodes of the formula had matched.
        nodes: names, in the graph before all passes, of the nodes that the operator took the place of.
    """

    operator: str
    module: str
    source_line: str | None
    detail: str
    how_far: int = 0
    nodes: frozenset[str] = frozenset()


@dataclass
class PassReport:
    """What one pass did to one graph."""

    name: str
    seconds: float = 0.0
    rewritten: list[Site] = field(default_factory=list)
    missed: list[Site] = field(default_factory=list)
    error: str | None = None


def run_passes(
    gm: fx.GraphModule,
    recognisers: Sequence[Recogniser],
    *,
    disable: Iterable[str] = (),
    strict: bool = False,
) -> tuple[fx.GraphModule, list[PassReport]]:
    """Apply the recognisers in order.

    Args:
        gm: a functionalised pre-dispatch ATen graph whose nodes carry ``meta["val"]`` and whose placeholders carry
            fake inputs (with their ``requires_grad``) in ``meta["example_value"]``. It is not changed.
        recognisers: the passes.
        disable: names of passes to leave out.
        strict: raise where a pass fails, instead of dropping its result.

    Returns:
        The rewritten graph and a report per pass, disabled ones excluded.

    Raises:
        PassError: a pass raised or was unsound, and ``strict`` is set.
        LostGradient: the graph carries a record (:func:`~unsloth.passes.soundness.record`) of gradients that it lacks
            itself, whatever the passes do.
    """
    disabled = set(disable)
    active = [r for r in recognisers if r.name not in disabled]
    result, reports = _run_all(gm, active, strict)
    if any(r.rewritten for r in reports):
        result = _verified(gm, result, active, reports, strict)
    else:
        result = gm
        assert_keeps_gradients(gm)
    forget_record(result)
    return result, reports


def _run_all(
    gm: fx.GraphModule, recognisers: Sequence[Recogniser], strict: bool
) -> tuple[fx.GraphModule, list[PassReport]]:
    """All passes on one copy; when one raises, what it left behind goes with the copy, and the others start again."""
    failed: dict[str, PassReport] = {}
    while True:
        work, reports = copy_graph(gm), []
        for recogniser in recognisers:
            if (report := failed.get(recogniser.name)) is None:
                try:
                    report = _run(work, recogniser)
                except Exception as error:  # noqa: BLE001  whatever a pass raises, training goes on without it
                    failed[recogniser.name] = PassReport(recogniser.name, error=_describe(error))
                    _give_up(recogniser.name, error, strict)
                    break
            reports.append(report)
        else:
            work.recompile()
            return work, reports


def _run(gm: fx.GraphModule, recogniser: Recogniser) -> PassReport:
    """Change the graph as the recogniser finds; its code is not generated anew."""
    report = PassReport(recogniser.name)
    started = time.perf_counter()
    _artifact(f"unsloth_{recogniser.name}_before", gm)
    guards = count_guards(gm)
    _apply_all(gm.graph, recogniser, report)
    if count_guards(gm) != guards:
        raise Unsound("the pass guarded on a symbolic shape")
    report.seconds = time.perf_counter() - started
    _artifact(f"unsloth_{recogniser.name}_after", gm)
    return report


def _apply_all(graph: fx.Graph, recogniser: Recogniser, report: PassReport) -> None:
    found = list(recogniser.find(graph))
    region = regions(graph)
    gone: set[fx.Node] = set()
    replaced: dict[fx.Node, fx.Node] = {}
    known: Known = {}
    for item in found:
        if isinstance(item, Match):
            if item.interior & gone:
                continue  # an earlier, overlapping match has taken these nodes
            site = _site(recogniser.name, item.anchor, item.variant, nodes=item.interior)
            # An argument may be the output of a match that has been replaced since this one was found.
            outcome = apply(graph, item.reading(replaced), region, known)
            if not isinstance(outcome, Refused):
                gone |= item.interior
                replaced |= outcome
                report.rewritten.append(site)
                continue
            item = Miss(outcome.reason, item.anchor, site.source_line, len(item.interior))
        report.missed.append(_site(recogniser.name, item.node, item.reason, item.source_line, item.how_far))
    if report.rewritten:
        graph.eliminate_dead_code()
        graph.lint()


def _verified(
    original: fx.GraphModule,
    result: fx.GraphModule,
    recognisers: Sequence[Recogniser],
    reports: list[PassReport],
    strict: bool,
) -> fx.GraphModule:
    """Check the result of all passes at once; only when that fails, find the pass that is to blame and drop it."""
    try:
        assert_same_mathematics(original, result)
        return result
    except LostGradient:
        raise  # before any pass
    except Unsound:
        gm = original
    for i, recogniser in enumerate(recognisers):
        if reports[i].error:
            continue
        candidate = copy_graph(gm)
        try:
            again = _run(candidate, recogniser)
            candidate.recompile()
            assert_same_mathematics(original, candidate)
            gm, reports[i] = candidate, again
        except Exception as error:  # noqa: BLE001
            reports[i] = PassReport(recogniser.name, reports[i].seconds, error=_describe(error))
            _give_up(recogniser.name, error, strict)
    return gm


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """An independent copy of the graph; submodules, attributes and node values are shared."""
    graph = fx.Graph()
    value_map: dict[fx.Node, fx.Node] = {}
    results: Any = graph.graph_copy(gm.graph, value_map, return_output_node=True)
    assert results is not None, "every graph has an output"
    graph.output(results[0]).meta.update(results[1].meta)
    for before, after in value_map.items():
        after.meta = dict(before.meta)
        copy_source(before, after)
    copied = fx.GraphModule(gm, graph)
    for name in MODULE_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    copied.meta.update(gm.meta)
    return copied


def copy_source(before: fx.Node, after: fx.Node) -> None:
    """Hand on Dynamo's note of where an input came from, by which AOTAutograd knows the static parameters."""
    if hasattr(before, "_dynamo_source"):
        after._dynamo_source = before._dynamo_source  # pyright: ignore[reportAttributeAccessIssue]


def _site(
    name: str,
    node: fx.Node,
    detail: str,
    line: str | None = None,
    how_far: int = 0,
    nodes: Iterable[fx.Node] = (),
) -> Site:
    taken = frozenset(n.name for n in nodes)
    return Site(name, module_path(node), line or source_line(node), detail, how_far, taken)


def _give_up(name: str, error: Exception, strict: bool) -> None:
    if strict:
        raise PassError(f"pass {name}: {_describe(error)}") from error
    warnings.warn(f"unsloth: pass {name} was left out: {_describe(error)}", CompilerWarning, stacklevel=2)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, Unsound) else f"{type(error).__name__}: {error}"


def _artifact(name: str, gm: fx.GraphModule) -> None:
    """Leave the graph in torch's structured trace (``TORCH_TRACE``), where ``tlparse`` shows it."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True),
    )


def graph_inputs(gm: fx.GraphModule) -> list[torch.Tensor | torch.SymInt | int]:
    """The fake inputs that a retraced graph's placeholders carry."""
    return [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
