"""The backend: capture, recognise, plan, lower; and at every step a way on when something fails.

``torch.compile(model, backend="unsloth", options={...})``. See :class:`~unsloth.compiler.options.Options`.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..kernels.operator import Operator, operator_of
from ..passes.recognise import RECOGNISERS
from ..passes.recognise import recognisers as all_recognisers
from ..passes.rewrite import Recogniser
from ..passes.runner import CompilerWarning, run_passes
from .capture import CaptureError, retrace
from .coverage import measure
from .logits import drop_outputs, find_logits, restore_outputs
from .lower import lower, lower_plain
from .options import Options
from .report import GraphReport

Compiled = Callable[..., Any]
Observer = Callable[[GraphReport], None]


class BackendError(RuntimeError):
    """A stage of the backend failed under ``strict``."""


class _Ignored(set[Callable[..., Any]]):
    """Functions that Dynamo traces past, copied by name: before PyTorch 2.13 it sorts a copy of them into its log."""

    def __deepcopy__(self, memo: Any) -> list[str]:
        return sorted(getattr(function, "__qualname__", repr(function)) for function in self)


def trace_past_notes() -> None:
    """Let Dynamo trace past the notes that transformers makes once, as of a loss that a configuration does not name.

    Each would end a graph: GPT-2's loss would not be in that of its head.
    """
    notes = (getattr(logging.Logger, name, None) for name in ("warning_once", "info_once"))
    ignored = torch._dynamo.config.ignore_logging_functions
    torch._dynamo.config.ignore_logging_functions = _Ignored(ignored | {note for note in notes if note is not None})


trace_past_notes()  # torch.compile imports this file before it traces


def unsloth(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The entry point that ``torch.compile`` finds under the name "unsloth".

    Args:
        gm: Dynamo's graph.
        example_inputs: its fake inputs.
        mode: Inductor's mode ("reduce-overhead", "max-autotune", …), handed on to it.
        options: see :class:`~unsloth.compiler.options.Options`.

    Raises:
        OptionError: for an unknown option or value.
    """
    parsed = Options.parse(options, passes=[r.name for r in RECOGNISERS])
    return compile_graph(gm, example_inputs, parsed, mode=mode)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    mode: str | None = None,
    recognisers: Sequence[Recogniser] | None = None,
    observe: Observer | None = None,
) -> Compiled:
    """Compile one Dynamo graph.

    Args:
        recognisers: the passes to run, for tests and bisection; None for all.
        observe: called with the graph's report once its passes have run.
    """
    report = GraphReport()
    if not any(isinstance(n.meta.get("example_value"), torch.Tensor) for n in gm.graph.find_nodes(op="placeholder")):
        # Between two graph breaks there may be only arithmetic on sizes: nothing to recognise, and no gradient.
        if observe is not None:
            observe(report)
        return lower_plain(gm, example_inputs, options, mode)
    if recognisers is None:
        recognisers = all_recognisers(right_padded=options.padding == "right")
    try:
        return _compile(gm, example_inputs, options, mode, recognisers, report, observe is not None)
    except Exception as error:
        if options.strict:
            raise
        report.fallback = f"{type(error).__name__}: {error}" if not isinstance(error, CaptureError) else str(error)
        warnings.warn(f"unsloth: a graph is left to Inductor as it is: {report.fallback}", CompilerWarning, 2)
        return lower_plain(gm, example_inputs, options, mode)
    finally:
        if observe is not None:
            observe(report)


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    recognisers: Sequence[Recogniser],
    report: GraphReport,
    observed: bool,
) -> Compiled:
    graph, gaps = _rewrite(gm, options, recognisers, report, observed)
    compiled = lower(graph, example_inputs, options, mode, report)
    return _Step(compiled, _operators(graph), gaps)


def rewritten(gm: fx.GraphModule, options: Options) -> fx.GraphModule:
    """Dynamo's graph with our operators in it, for those who ask what a step would need."""
    recognisers = all_recognisers(right_padded=options.padding == "right")
    return _rewrite(gm, options, recognisers, GraphReport(), False)[0]


def _rewrite(
    gm: fx.GraphModule, options: Options, recognisers: Sequence[Recogniser], report: GraphReport, observed: bool
) -> tuple[fx.GraphModule, dict[int, Any]]:
    """The graph with our operators in it, and how to make stand-ins for the outputs that it no longer has."""
    started = time.perf_counter()
    graph = retrace(gm, check=False)  # the passes' check covers it
    report.capture_seconds = time.perf_counter() - started
    gaps: dict[int, Any] = {}
    if options.logits == "drop" and (indices := find_logits(graph)):
        # Before the passes: logits that nobody else reads need never be computed as a whole.
        gaps = _gaps(graph, indices)
        drop_outputs(graph, indices)
        report.dropped_outputs = indices
    started = time.perf_counter()
    traced = graph
    graph, report.passes = run_passes(graph, recognisers, disable=options.disable, strict=options.strict)
    report.passes_seconds = time.perf_counter() - started
    if observed:
        report.coverage = measure(traced.graph, [name for site in report.rewritten for name in site.nodes])
    report.nodes = (len(gm.graph.nodes), len(graph.graph.nodes))
    return graph, gaps


class _Step:
    """A compiled graph as Dynamo calls it: puts dropped outputs back, and notices kernels that failed."""

    def __init__(self, compiled: Compiled, operators: list[Operator], gaps: dict[int, Any]) -> None:
        self.compiled, self.operators, self.gaps = compiled, operators, gaps

    def __call__(self, *args: Any) -> Any:
        results = self.compiled(*args)
        if self.gaps:
            sizes = {i: (shape(args), dtype, device) for i, (shape, dtype, device) in self.gaps.items()}
            results = restore_outputs(results, sizes)
        if any(op.disabled is not None for op in self.operators):
            # A kernel failed and its reference took over: numbers are right, but slow. Compile again without it.
            self.operators = []
            torch._dynamo.reset()
        return results


def _operators(gm: fx.GraphModule) -> list[Operator]:
    found = (operator_of(n.target) for n in gm.graph.nodes)
    return list({id(op): op for op in found if op is not None}.values())


def _gaps(gm: fx.GraphModule, indices: tuple[int, ...]) -> dict[int, Any]:
    """Shape (as a function of the graph's arguments: it may be symbolic), dtype and device of outputs to drop."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    gaps = {}
    for i in indices:
        value = output.args[0][i].meta["val"]
        gaps[i] = (_shape_of(value, placeholders), value.dtype, value.device)
    return gaps


def _shape_of(value: torch.Tensor, placeholders: list[fx.Node]) -> Callable[[Sequence[Any]], tuple[int, ...]]:
    """The shape as sympy expressions over symbols whose values are read off the runtime arguments."""
    if all(isinstance(s, int) for s in value.shape):
        fixed = tuple(value.shape)
        return lambda args: fixed
    sources: dict[Any, Callable[[Sequence[Any]], int]] = {}
    for position, node in enumerate(placeholders):
        example = node.meta["example_value"]
        if isinstance(example, torch.SymInt):
            sources.setdefault(example.node.expr, lambda args, p=position: int(args[p]))
        elif isinstance(example, torch.Tensor):
            for axis, size in enumerate(example.shape):
                if isinstance(size, torch.SymInt):
                    sources.setdefault(size.node.expr, lambda args, p=position, a=axis: int(args[p].shape[a]))
    expressions = [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]

    def shape(args: Sequence[Any]) -> tuple[int, ...]:
        known = {symbol: read(args) for symbol, read in sources.items()}
        return tuple(e if isinstance(e, int) else int(e.subs(known)) for e in expressions)

    return shape
