"""What a step of GRPO logs, and the weight of its entropy: TRL's metrics, on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Base
else:
    _Base = object


class PolicyMetrics(_Base):
    """Mixin before TRL's ``GRPOTrainer``: notes what a compiled step returns."""

    args: Any
    _last_world_entropy: Any

    def _everywhere(self, values: Tensor) -> Any:
        return self.accelerator.gather(values) if self.args.world_size > 1 else values

    def _summed(self, values: Tensor) -> Any:
        return self.accelerator.reduce(values, reduction="sum") if self.args.world_size > 1 else values

    def _note(self, metrics: Mapping[str, Tensor], per_completion: Mapping[str, Tensor], mode: str) -> None:
        """Note metrics as tensors: reading them here would make every step wait for the device."""
        sums = self._summed(torch.stack(list(metrics.values())))
        for name, (total, count) in zip(metrics, sums, strict=True):
            self._metrics[mode][name].append(total / count.clamp(min=1))
        for name, values in per_completion.items():
            known, least = self._everywhere(values), name.endswith("min")
            worst = torch.inf if least else -torch.inf
            found = torch.where(known.isnan(), worst, known)
            extreme = found.amin() if least else found.amax()
            self._metrics[mode][name].append(torch.where(extreme.isinf(), torch.nan, extreme))

    def _entropy_weight(self) -> float:
        """What the entropy counts in the loss: settled at the end of the step before."""
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _follow_entropy(self, sum_and_count: Tensor, mode: str) -> None:
        """Adapt the weight once a step, to the entropy of all tokens of all processes in it (TRL's controller)."""
        last = self.accelerator.sync_gradients
        if mode == "train" and self.use_adaptive_entropy:
            before = self._entropy_window_stats
            self._entropy_window_stats = sum_and_count if before is None else before + sum_and_count
            if last:
                total, count = self._summed(self._entropy_window_stats).tolist()
                self._entropy_window_stats, self._last_world_entropy = None, total / max(count, 1.0)
                low, change = self._last_world_entropy <= self.args.entropy_target, self.args.entropy_coef_delta
                moved = self.entropy_coef + (change if low else -change)
                self.entropy_coef = min(max(moved, self.args.entropy_coef_min), self.args.entropy_coef_max)
        if mode == "train" and last:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for metrics in self._metrics.values():
            for name, values in metrics.items():
                metrics[name] = [float(value) for value in values]
        super().log(logs, *args, **kwargs)
