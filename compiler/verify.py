"""Is the compiled step the same training step? Loss and every gradient, on the user's own batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config

from ..passes.recognise import RECOGNISERS
from ..passes.recognise import recognisers as all_recognisers
from ..passes.rewrite import Match, Miss, Recogniser
from ..passes.runner import Site
from .options import Options
from .report import GraphReport
from .run import compiled, loss_of, undisturbed


@dataclass(frozen=True)
class GradientError:
    """One parameter's gradient, compared norm-wise.

    Attributes:
        parameter: its name.
        compiled: ‖compiled − truth‖ / ‖truth‖, where the truth is the float32 run (or eager, where there is none).
        eager: ‖eager − truth‖ / ‖truth‖.
    """

    parameter: str
    compiled: float
    eager: float


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`; ``print`` it, or test ``ok``.

    Attributes:
        ok: loss and every gradient are as close to the truth as eager's, within ``tolerance``.
        loss_compiled, loss_eager, loss_float32: the losses; the last is None when no float32 run was possible.
        gradients: an entry per trained parameter, worst first.
        tolerance: relative error allowed beyond eager's own.
        missing: parameters that have a gradient in eager and none (or zero) compiled, or the reverse.
        first_deviation: the first pass after which the numbers deviate, "lowering" when they only do below our
            passes, or None.
        culprit: of that pass, the first place whose rewrite makes the numbers deviate; None without such a pass.
        grad_norm: norm of all compiled gradients together; a step without one trains nothing, and is not ok.
    """

    ok: bool
    loss_compiled: float
    loss_eager: float
    loss_float32: float | None
    gradients: list[GradientError]
    tolerance: float
    missing: list[str] = field(default_factory=list)
    first_deviation: str | None = None
    culprit: Site | None = None
    grad_norm: float = float("nan")

    def __str__(self) -> str:
        truth = "eager" if self.loss_float32 is None else "a float32 run"
        lines = [
            f"{'same training step' if self.ok else 'NOT the same training step'}"
            f"  ({len(self.gradients)} gradients against {truth}, tolerance {self.tolerance:.1e})",
            f"loss      compiled {self.loss_compiled:.6f}  eager {self.loss_eager:.6f}"
            + (f"  float32 {self.loss_float32:.6f}" if self.loss_float32 is not None else ""),
        ]
        lines += [
            f"gradient  {g.parameter}: compiled {g.compiled:.2e}, eager {g.eager:.2e}" for g in self.gradients[:3]
        ]
        lines += [f"missing   {name}" for name in self.missing]
        if self.grad_norm == 0:
            lines.append("missing   every gradient is zero: such a step trains nothing")
        if self.first_deviation:
            lines.append(f"deviates  first after {self.first_deviation}")
        if self.culprit:
            site = self.culprit
            kind = f" ({site.detail})" if site.detail else ""
            line = f", {site.source_line}" if site.source_line else ""
            lines.append(f"culprit   {site.operator}{kind} in {site.module or 'graph'}{line}")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    batch: Any,
    *,
    options: dict[str, Any] | None = None,
    tolerance: float | None = None,
    recognisers: Sequence[Recogniser] | None = None,
) -> Verification:
    """Compare one training step's loss and gradients: compiled, eager, and eager in float32.

    The same random state is used for each run, so dropout draws the same masks. Gradients, buffers and random state
    are left as they were.

    Args:
        model: any module whose forward returns a loss.
        batch: keyword arguments of its forward (labels included), on the model's device.
        options: the backend's options.
        tolerance: relative error allowed beyond 1.1 times eager's own error; by default 1e-4 for a float32 model and
            four roundings of the model's dtype otherwise.
        recognisers: the passes to verify; None for all.

    Raises:
        OptionError: for an unknown option.
        BatchError: when the model returns no scalar loss, or no parameter is trained.
    """
    parsed = Options.parse(options, passes=[r.name for r in recognisers or RECOGNISERS])
    if recognisers is None:
        recognisers = all_recognisers(right_padded=parsed.padding == "right")
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    if tolerance is None:
        tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    with undisturbed(model):
        eager = _step(model, model, batch)
        ours = _compiled_step(model, batch, parsed, recognisers)
        truth = eager if dtype == torch.float32 else _float32_step(model, batch)
        result = _compare(ours, eager, truth, tolerance)
        if not result.ok:
            search = _Search(model, batch, parsed, recognisers, lambda step: _compare(step, eager, truth, tolerance).ok)
            deviation, culprit = search.run()
            result = replace(result, first_deviation=deviation, culprit=culprit)
    return result


_Step = tuple[float, dict[str, Tensor]]


def _step(run: Any, owner: nn.Module, batch: Any) -> _Step:
    for parameter in owner.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    loss = loss_of(run, batch)
    loss.backward()
    gradients = {n: p.grad.detach().clone() for n, p in owner.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def _compiled_step(
    model: nn.Module,
    batch: Any,
    options: Options,
    recognisers: Sequence[Recogniser],
    reports: list[GraphReport] | None = None,
) -> _Step:
    torch._dynamo.reset()
    # Inductor draws dropout masks of its own unless told to draw eager's.
    with inductor_config.patch(fallback_random=True):
        step = _step(compiled(model, options, [] if reports is None else reports, recognisers), model, batch)
    torch._dynamo.reset()
    return step


def _float32_step(model: nn.Module, batch: Any) -> _Step | None:
    if any(not p.dtype.is_floating_point for p in model.parameters()):
        return None  # quantised weights have no float32 twin
    twin = copy.deepcopy(model).float()
    return _step(twin, twin, batch)


def _compare(ours: _Step, eager: _Step, truth: _Step | None, tolerance: float) -> Verification:
    exact = truth or eager
    names = sorted(set(exact[1]) | set(eager[1]) | set(ours[1]))
    missing = [n for n in names if _vanished(ours[1].get(n), eager[1].get(n))]
    errors = [
        GradientError(n, _error(ours[1][n], exact[1][n]), _error(eager[1][n], exact[1][n]))
        for n in names
        if n in ours[1] and n in exact[1] and n in eager[1]
    ]
    errors.sort(key=lambda g: g.compiled - 1.1 * g.eager, reverse=True)
    off_loss = abs(ours[0] - exact[0]) - 1.1 * abs(eager[0] - exact[0])
    grad_norm = sum(float(g.double().norm()) ** 2 for g in ours[1].values()) ** 0.5
    ok = (
        not missing
        and grad_norm > 0
        and bool(errors)
        and off_loss <= tolerance * abs(exact[0])  # a NaN is never fine
        and all(g.compiled <= 1.1 * g.eager + tolerance for g in errors)
    )
    return Verification(
        ok, ours[0], eager[0], truth[0] if truth else None, errors, tolerance, missing, grad_norm=grad_norm
    )


def _vanished(ours: Tensor | None, eager: Tensor | None) -> bool:
    """Whether only one of the two runs has a gradient that is there and not all zero."""
    return (ours is not None and bool(ours.any())) != (eager is not None and bool(eager.any()))


def _error(value: Tensor, truth: Tensor) -> float:
    difference, norm = (value.double() - truth.double()).norm(), truth.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


@dataclass(frozen=True)
class _Search:
    """Looks for the first rewrite after which the numbers deviate: over the passes, then over the places of one.

    Attributes:
        same: whether a step is still the same.
    """

    model: nn.Module
    batch: Any
    options: Options
    recognisers: Sequence[Recogniser]
    same: Callable[[_Step], bool]

    def run(self) -> tuple[str, Site | None]:
        """Under eager autograd; what deviates only under Inductor is the lowering's."""
        active = [r for r in self.recognisers if r.name not in self.options.disable]
        if not self._is_same(active[:0]):
            return "capture", None
        for end in range(1, len(active) + 1):
            if not self._is_same(active[:end]):
                return f"pass {active[end - 1].name}", self._place(active[: end - 1], active[end - 1])
        return "lowering", None

    def _place(self, before: list[Recogniser], guilty: Recogniser) -> Site | None:
        """Halve the number of the pass's matches until one more of them is one too many."""
        reports: list[GraphReport] = []
        self._is_same([*before, guilty], reports)
        good, bad = 0, max((len(g.rewritten) + len(g.missed) for g in reports), default=0)
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._is_same([*before, _First(guilty, middle)]):
                good = middle
            else:
                bad = middle
        reports.clear()
        self._is_same([*before, _First(guilty, bad)], reports)
        sites = [s for g in reports for p in g.passes if p.name == guilty.name for s in p.rewritten]
        return sites[-1] if sites else None

    def _is_same(self, recognisers: Sequence[Recogniser], reports: list[GraphReport] | None = None) -> bool:
        plain = Options(lowering="eager", logits=self.options.logits)
        return self.same(_compiled_step(self.model, self.batch, plain, recognisers, reports))


class _First:
    """A pass that applies the first of its matches in a graph and leaves the others alone."""

    def __init__(self, recogniser: Recogniser, count: int) -> None:
        self.name, self.recogniser, self.count = recogniser.name, recogniser, count

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        return itertools.islice((i for i in self.recogniser.find(graph) if isinstance(i, Match)), self.count)
