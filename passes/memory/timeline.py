"""What a step holds on the device: all through it, and while each operator runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """What lies on the device all through the step, in bytes.

    Attributes:
        weights: of the model, those that are trained left out; the batch and the buffers are among them.
        trained: weights that are trained (all, or the adapters).
        optimiser: its state.
        library: workspace that libraries hold.
    """

    weights: int
    trained: int
    optimiser: int
    library: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.optimiser + self.library


@dataclass(frozen=True)
class Timeline:
    """Bytes alive while each operator runs, beside what stands there all the time.

    Attributes:
        standing: what is there all the time.
        names: the operators, forward's and then backward's.
        turn: how many of them are forward's.
        kept, gradients, working: per operator, bytes of values kept for backward, of finished gradients, and of all
            else: what operators read and write, and their workspace.
    """

    standing: Standing
    names: Sequence[str]
    turn: int
    kept: Sequence[int]
    gradients: Sequence[int]
    working: Sequence[int]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment, everything counted."""
        moments = zip(self.kept, self.gradients, self.working, strict=True)
        return self.standing.total + max(map(sum, moments), default=0)

    @property
    def worst(self) -> int:
        """The index of the worst moment."""
        moments = list(map(sum, zip(self.kept, self.gradients, self.working, strict=True)))
        return moments.index(max(moments)) if moments else 0

    @property
    def parts(self) -> dict[str, int]:
        """The peak by category."""
        there, i = self.standing, self.worst
        moment = (self.kept[i], self.gradients[i], self.working[i]) if self.names else (0, 0, 0)
        return {
            "weights": there.weights,
            "adapters" if there.trained < there.weights else "trained weights": there.trained,
            "optimiser": there.optimiser,
            "gradients": moment[1],
            "kept for backward": moment[0],
            "working": moment[2] + there.library,
        }
