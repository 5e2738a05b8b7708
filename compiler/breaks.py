"""Why Dynamo broke a graph, and what a user can do about it."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import exc as dynamo_errors
from torch._dynamo import utils as dynamo_utils


@dataclass(frozen=True)
class Break:
    """A graph break.

    Attributes:
        cause: Dynamo's reason, on one line.
        remedy: what to change in the model or the training script.
        source_line: ``file.py:line`` of the code that broke it, or None.
    """

    cause: str
    remedy: str
    source_line: str | None = None

    def __str__(self) -> str:
        return f"{self.cause}  ({self.source_line})" if self.source_line else self.cause


# The first row that fits is the answer. Each is a cause that real models and trainers have.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"data is not allocated yet",
        "PyTorch reads the data of a tensor that has none while it is traced, as of an index that is a list of "
        "tensors: make one tensor of them, as in x[torch.stack(places)]",
    ),
    (
        r"when making fake tensor call",
        "PyTorch refuses these arguments while it traces, even where a kernel takes them: give it shapes and types "
        "that its documentation allows",
    ),
    (
        r"requires_grad_?\b|register_(forward_)?hook|enable_input_require_grads",
        "leave out gradient_checkpointing and enable_input_require_grads(): what to recompute is the planner's choice",
    ),
    (
        r"logg(ing|er)|warn(ings|ing_once)|\bprint\b",
        "a message is logged inside of forward: avoid what it warns of, or add the logging method to "
        "torch._dynamo.config.ignore_logging_functions",
    ),
    (
        r"\.item\(\)|_local_scalar_dense|scalar",
        "a number is read off a tensor: keep it a tensor, or set torch._dynamo.config.capture_scalar_outputs = True",
    ),
    (
        r"[Dd]ynamic (output )?shape|nonzero|masked_select|unique",
        "a size depends on data, as in hidden[mask]: multiply by the mask instead, or set "
        "torch._dynamo.config.capture_dynamic_output_shape_ops = True",
    ),
    (
        r"[Dd]ata.dependent (branch|control|jump)|generic_jump|torch\.cond",
        "an if asks a tensor for its value: use torch.where, or decide before forward",
    ),
    (r"out variant|out=", "an operator writes to out= in another layout: let it return its result"),
    (r"autograd\.grad|backward\(\)|\.grad\b", "gradients are taken inside of forward: take them outside of it"),
    (r"torch\._dynamo\.(disable|graph_break)|disabled", "the code asks for it: remove the call, or train eager there"),
    (r"numpy|\bnp\.", "NumPy is used inside of forward: use torch's function of the same name"),
    (r"context manager|with block", "a context manager that Dynamo does not know: enter it around the step"),
    (r"deepcopy|pickle|open\(|\bos\.", "Python's runtime is used inside of forward: do it once, before training"),
    (
        r"builtin|C\+\+|skip(ped)? (function|file)|not traced|Attempted to call function marked as skipped",
        "a function that Dynamo cannot look into: wrap it with torch.library.custom_op, or write it in torch",
    ),
)
_COMPILATIONS = 4096  # whose outcome is kept
_ANY = "TORCH_LOGS=graph_breaks shows the line that breaks; rewrite it in torch, or move it out of forward"


def explain_break(reason: str, source_line: str | None = None) -> Break:
    """The cause on one line, with its remedy.

    Args:
        reason: Dynamo's words.
    """
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    cause = lines[0] if lines else "unknown"
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, reason):
            return Break(cause, remedy, source_line)
    return Break(cause, _ANY, source_line)


@contextmanager
def watched() -> Iterator[list[Break]]:
    """Start Dynamo afresh, and fill a list with the distinct graph breaks of what is compiled inside."""
    counters = dynamo_utils.counters["graph_break"]
    before = Counter(counters)
    found: list[Break] = []
    torch._dynamo.reset()
    try:
        with _failures() as failed:
            yield found
    finally:
        found += _distinct(Counter(counters) - before, [r for r in dynamo_utils.graph_break_reasons if r.graph_break])
        found += dict.fromkeys(failed)
        torch._dynamo.reset()


@contextmanager
def _failures() -> Iterator[list[Break]]:
    """Fill a list with the errors of Dynamo's own, for which a function and all that called it were not compiled."""
    failed: list[Break] = []
    limit = dynamo_utils.DEFAULT_COMPILATION_METRICS_LIMIT
    dynamo_utils.set_compilation_metrics_limit(_COMPILATIONS)
    before = dynamo_utils.get_compilation_metrics()
    try:
        yield failed
    finally:
        for metrics in dynamo_utils.get_compilation_metrics():
            if _is_failure(metrics.fail_type) and not any(metrics is old for old in before):
                line = f"{Path(metrics.fail_user_frame_filename or '').name}:{metrics.fail_user_frame_lineno}"
                found = explain_break(metrics.fail_reason or "", line)
                failed.append(replace(found, cause=_of_call(metrics.fail_reason or "") or found.cause))
        dynamo_utils.set_compilation_metrics_limit(limit)


def _is_failure(name: str | None) -> bool:
    """Whether an exception of this name is neither a graph break nor a frame that there is nothing to do for."""
    kind = getattr(dynamo_errors, name, Exception) if name else None
    expected = (dynamo_errors.Unsupported, dynamo_errors.UserError, dynamo_errors.SkipFrame)
    return kind is not None and not issubclass(kind, expected)


def _of_call(reason: str) -> str:
    """Which call failed while it was traced, and on what; empty where Dynamo does not say."""
    found = re.search(r"with fake tensors: \w+ (.+?)\(\*\(.*: got (\w+)\(['\"](.*?)(\\n|['\"]\))", reason)
    return f"{found[1]} cannot be traced: {found[2]}: {found[3]}" if found else ""


def _distinct(counted: Iterable[str], ended: Sequence[Any]) -> list[Break]:
    """Dynamo keeps two books: reasons that it counts, and reasons for which it ended a graph, which have a line.

    A branch on data is not counted, a frame that was given up ended no graph, and what was unsupported in the middle
    of a statement is counted under its name and ended a graph as "step_unsupported".
    """
    lines = {_first_line(r.reason): _line(r.user_stack) for r in ended}
    unnamed = lines.pop("step_unsupported", None)
    reasons = {_first_line(reason): reason for reason in (*counted, *(r.reason for r in ended))}
    if len(reasons) > 1:
        reasons.pop("step_unsupported", None)
    return [explain_break(reason, lines.get(first, unnamed)) for first, reason in reasons.items()]


def _first_line(reason: str) -> str:
    return next(iter(reason.strip().splitlines()), "")


def _line(stack: Sequence[traceback.FrameSummary]) -> str | None:
    """The innermost line that is neither PyTorch's nor Python's own."""
    library = sysconfig.get_path("stdlib")
    outside = [f for f in stack if "/torch/" not in f.filename]
    outside = [f for f in outside if not f.filename.startswith(library) or "site-packages" in f.filename] or [*stack]
    return f"{Path(outside[-1].filename).name}:{outside[-1].lineno}" if outside else None
