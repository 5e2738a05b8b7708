"""The floor of a step by its tokens: what the smallest plan needs, from plans of two sizes of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .host import that_fit
from .repeated import Deep
from .slices import ROWS


@dataclass(frozen=True)
class Line:
    """What the smallest plan of one kind needs by the tokens of a step: straight lines in them.

    Attributes:
        alone: bytes without host memory: at no tokens, and per token.
        away: the same with the residuals of all layers but the last in host memory.
        residuals: bytes per token of those.
    """

    alone: tuple[float, float]
    away: tuple[float, float]
    residuals: list[float]

    @classmethod
    def through(cls, tokens: tuple[int, int], plans: Sequence[Deep]) -> Line:
        """The lines through two points.

        Args:
            tokens: two different numbers of tokens.
            plans: of steps of so many.
        """

        def line(kinds: Sequence[Deep]) -> tuple[float, float]:
            first, second = (deep.smallest[0].peak_bytes for deep in kinds)
            slope = (second - first) / (tokens[1] - tokens[0])
            return first - slope * tokens[0], slope

        alone, away = line(plans), line([deep.offloading(1 << 62) or deep for deep in plans])
        return cls(alone, away, [size / tokens[0] for size in plans[0].residual_sizes()])

    def at(self, tokens: int, host: int) -> float:
        """Peak bytes of a step of so many tokens, with so many bytes of host memory."""
        there = self.room(tokens, host)
        alone, away = (fixed + slope * tokens for fixed, slope in (self.alone, self.away))
        return alone - max(0.0, alone - away) * there / max(1, len(self.residuals))

    def room(self, tokens: int, host: int) -> int:
        """How many of the residuals have room in host memory."""
        return len(that_fit((int(size * tokens) for size in self.residuals), host))


@dataclass(frozen=True)
class Floor:
    """What the smallest plan needs by the tokens of a step.

    Attributes:
        lines: with all tokens at once, and in slices; with residuals that span a layer, and two.
    """

    lines: list[Line]

    @classmethod
    def through(cls, tokens: tuple[int, int], plans: tuple[Deep, Deep], *, spans: bool) -> Floor:
        """The floor by two points.

        Args:
            tokens: two different numbers of tokens.
            plans: of steps of so many.
            spans: whether residuals may span two layers.
        """
        lines = []
        spanned = [deep.spanning(deep.pairs()) for deep in plans] if spans else []
        for kind in (plans, spanned):
            for rows in (0, *ROWS):
                there = [d.slicing(rows) if rows and d else d for d in kind]
                found = [d for d in there if d is not None]
                if len(found) == len(plans):
                    lines.append(Line.through(tokens, found))
        return cls(lines)

    def at(self, tokens: int, host: int) -> float:
        """Peak bytes of a step of so many tokens, with so many bytes of host memory."""
        return min(line.at(tokens, host) for line in self.lines)

    def tokens_within(self, budget: int, host: int) -> int:
        """The most tokens whose smallest plan is within so many bytes."""
        low, high = 0, 1
        while self.at(high, host) <= budget and high < 1 << 40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle, host) <= budget else (low, middle)
        return low
