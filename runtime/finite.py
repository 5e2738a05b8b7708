"""Steps whose loss or gradient is NaN or infinite: skipped before the optimiser sees them, reported, counted.

One such step ruins every parameter and the optimiser's moments for good. Whether a step is sound is known on the device
only, and asking would make every step wait for it. So the answer stays there: fused optimisers skip a step by
themselves where ``found_inf`` is set, as they do under gradient scaling. The host reads the answer one step late, when
it is there anyway. Optimisers that cannot do this are asked about each step.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

IN_A_ROW = 3
"""So many skipped steps one after the other end the run."""


class TrainingError(RuntimeError):
    """Training cannot go on; the text says why, and where it stopped is no bug."""


class Verdict(NamedTuple):
    """What is known about a step once the device has said it.

    Attributes:
        step: its number, from 1.
        skipped: whether the optimiser left it out.
        loss: its mean loss, nats per token.
        norm: of its gradient, before clipping.
        stop: whether any process was asked to stop (see :meth:`FiniteGuard.judge`).
        batch: describes its rows.
    """

    step: int
    skipped: bool
    loss: float
    norm: float
    stop: bool
    batch: Callable[[], Sequence[str]]


class FiniteGuard:
    """Judges every step between its gradient and the optimiser.

    Attributes:
        skipped: steps left out since the last log.
        lost: those among them whose loss is not finite, and is in no mean.
    """

    def __init__(self, device: torch.device) -> None:
        self.skipped = self.lost = 0
        self._in_a_row = 0
        self._sum = torch.zeros((), device=device)  # of the losses before this step
        self._waiting: deque[tuple[int, Tensor, Any, Callable[[], Sequence[str]]]] = deque()

    def begin(self, losses: Tensor) -> None:
        """Take over the running sum of losses where a run starts or goes on."""
        self._sum = losses.clone()

    def judge(
        self,
        optimizer: Any,
        losses: Tensor,
        norm: Tensor | float | None,
        step: int,
        batch: Callable[[], Sequence[str]],
        *,
        stop: bool = False,
        scaled: bool = False,
    ) -> None:
        """Have the optimiser skip the step that comes if its loss or gradient is not finite.

        Args:
            optimizer: about to step; PyTorch's own.
            losses: 0-dimensional, the running sum of the steps' losses. A loss that is not finite is taken out again.
            norm: of the gradient over all parameters, not finite where any of them is not.
            step: the number of this step, from 1.
            batch: describes the rows, a line each; called only when they are reported.
            stop: whether this process was asked to stop. All processes hear of it at the same step.
            scaled: whether a gradient scaler is at work. It looks for gradients that overflow, which is its trade.
        """
        loss = losses - self._sum
        norm = torch.as_tensor(0.0 if norm is None else norm, device=losses.device, dtype=torch.float32).detach()
        bad = ~torch.isfinite(losses)
        if not scaled:
            bad = bad | ~torch.isfinite(norm)
        flags = torch.stack([bad.float(), torch.full_like(loss, float(stop))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)  # a loss is this process's alone
        losses.copy_(torch.where(torch.isfinite(losses), losses, self._sum))
        self._sum = losses.clone()
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaled:
            optimizer.found_inf = flags[0]
        elif bool(flags[0]):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # which every optimiser passes over
        self._waiting.append((step, *_to_host(torch.stack([*flags, loss, norm])), batch))

    def read(self, *, all_steps: bool = False) -> list[Verdict]:
        """What is known by now: on a GPU, about all steps but the last, for which one would have to wait.

        Raises:
            TrainingError: at the third skipped step in a row.
        """
        verdicts = []
        while self._waiting and (all_steps or len(self._waiting) > 1 or self._waiting[0][2] is None):
            step, values, copied, batch = self._waiting.popleft()
            if copied is not None:
                copied.synchronize()
            bad, stop, loss, norm = values.tolist()
            verdicts.append(verdict := Verdict(step, bool(bad), loss, norm, bool(stop), batch))
            self._count(verdict)
        return verdicts

    def _count(self, verdict: Verdict) -> None:
        if not verdict.skipped:
            self._in_a_row = 0
            return
        self.skipped += 1
        self.lost += not math.isfinite(verdict.loss)
        self._in_a_row += 1
        what = f"loss {verdict.loss:.4g}, gradient norm {verdict.norm:.4g}"
        said = "\n".join([f"step {verdict.step} was skipped: {what}; its batch:", *verdict.batch()])
        if self._in_a_row < IN_A_ROW:
            logger.warning(said)
            return
        raise TrainingError(
            f"{said}\nThis was the {IN_A_ROW}rd step in a row whose loss or gradient is not finite, so training stops. "
            "The parameters are those of the last good step. A lower learning_rate, a max_grad_norm, or data without "
            "these rows may help"
        )

    def mean(self, loss: float, steps: int) -> float:
        """The mean of a log over the steps that have a loss; begins to count anew.

        Args:
            loss: the sum over ``steps`` steps, those without a loss counted as zero, divided by ``steps``.
            steps: since the last log.
        """
        counted = steps - self.lost
        self.skipped = self.lost = 0
        return loss if counted == steps else loss * steps / counted if counted else math.nan


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Start a copy; returns it with the event after which it is there, or with None."""
    if not values.is_cuda:
        return values, None
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
