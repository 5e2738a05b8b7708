"""One step of decoding for all rows, on tensors that stay where they are, so that a CUDA graph can repeat it.

The step runs the model on each row's last token, puts the new keys and values into their pages, chooses the next token
and moves on. Nothing in it asks the device for a number: the host looks at the tokens every few steps.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cache import STEP, NewTokens
from .pages import PAGE, TRASH, Pools
from .sampling import Sampling

logger = logging.getLogger(__name__)

LEAST_ROWS = 4
"""Of a graph: with fewer, rows that stand for nothing are decoded too."""


class Row(NamedTuple):
    """What a sequence needs on the device.

    Attributes:
        token: its last one, whose keys and values are not in a page yet.
        position: of that token, which is how many are in pages.
        last: the last position that it can need.
        pages: that it holds, in order.
        history: all its tokens, where a penalty reads them.
        shift: by how much the model's positions differ from ``position``, behind images.
    """

    token: int
    position: int
    last: int
    pages: Sequence[int]
    history: Sequence[int]
    shift: int = 0


def logits_of(
    model: nn.Module, name: str, ids: Tensor, positions: Tensor, cache: NewTokens
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """The function that is compiled: logits [rows, vocabulary], and the new keys and values by layer."""
    output = model(input_ids=ids, position_ids=positions, use_cache=True, **{name: cache})
    return output.logits[:, -1], cache.fresh


class Decoder:
    """Rows that decode together."""

    def __init__(
        self,
        model: nn.Module,
        cache_name: str,
        pools: Pools,
        sampling: Sampling,
        *,
        rows: int,
        longest: int,
        every: int,
        capped: bool,
        run: Callable[..., Any] = logits_of,
    ) -> None:
        """Allocate what a step reads and writes.

        Args:
            rows: at most.
            longest: tokens of the longest sequence, for its table of pages.
            every: steps between two looks at the tokens.
            run: :func:`logits_of`, compiled or not.
        """
        self.model, self.name, self.pools, self.run_model, self.every = model, cache_name, pools, run, every
        self.device = pools.groups[0].keys.device
        self.compiles = run is not logits_of
        self.rows = _bucket(rows)
        if self.compiles:  # one graph for every number of pages, and of rows
            for group in pools.groups:
                _mark_dynamic(group.keys, 1)
                _mark_dynamic(group.values, 1)

        def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=self.device)

        self.tokens, self.lengths, self.last, self.shifts = (zeros(self.rows) for _ in range(4))
        self.tables = zeros(self.rows, -(-longest // PAGE), dtype=torch.int32)
        self.history = zeros(self.rows, longest) if sampling.needs_history else None
        self.noise = zeros(every, self.rows, dtype=torch.float64)
        self.chosen, self.log_p = zeros(every, self.rows), zeros(every, self.rows, dtype=torch.float32)
        self.turn = zeros(1)
        self.choose = sampling.chooser()
        self.cache = NewTokens(pools, capped=capped)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None
        self._graphs_fail = False

    def place(self, rows: Sequence[Row]) -> None:
        """Say which sequences decode from now on."""
        count = len(rows)
        width = self.tables.shape[1]
        table = [[*row.pages, *[TRASH] * (width - len(row.pages))] for row in rows]
        # Rows that stand for nothing write into the page that nobody reads.
        idle = self.rows - count
        self._upload(self.tokens, [row.token for row in rows] + [0] * idle)
        self._upload(self.lengths, [row.position for row in rows] + [0] * idle)
        self._upload(self.last, [row.last for row in rows] + [0] * idle)
        self._upload(self.shifts, [row.shift for row in rows] + [0] * idle)
        self._upload(self.tables, table + [[TRASH] * width] * idle)
        if self.history is not None:
            # Behind the end stands the first token again, which is among those before in any case.
            size = self.history.shape[1]
            full = [[*row.history, *[row.history[0]] * (size - len(row.history))] for row in rows]
            self._upload(self.history, full + [[0] * size] * idle)

    def steps(self, count: int, rows: int, noise: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """Decode.

        Args:
            count: steps, at most ``every``.
            rows: how many stand for a sequence.
            noise: float64 [count, rows].

        Returns:
            tokens and log-probabilities, [rows][count].
        """
        self.noise[:count, :rows].copy_(noise)
        self.turn.zero_()
        bucket = min(_bucket(rows), self.rows)
        step = self._stepper(bucket, rows)
        for _ in range(count):
            step()
        return self.chosen[:count, :rows].T.tolist(), self.log_p[:count, :rows].T.tolist()

    def close(self) -> None:
        """Give back what graphs hold."""
        self.graphs.clear()
        self._memory = None

    def _upload(self, target: Tensor, values: list[Any]) -> None:
        target.copy_(torch.tensor(values, dtype=target.dtype))

    def _step(self, rows: int) -> None:
        """One token for each of the first rows."""
        tokens, lengths, tables = self.tokens[:rows], self.lengths[:rows], self.tables[:rows]
        cache, ids, positions = self.cache, tokens.unsqueeze(1), (lengths + self.shifts[:rows]).unsqueeze(1)
        cache.tables, cache.lengths, cache.fresh = tables, lengths.int(), {}
        if self.compiles:
            for x in (ids, positions, cache.tables, cache.lengths):
                _mark_dynamic(x, 0)
            _mark_dynamic(cache.tables, 1)
        outer, STEP.cache = STEP.cache, cache
        try:
            logits, fresh = self.run_model(self.model, self.name, ids, positions, cache)
        finally:
            STEP.cache = outer
        page = tables.gather(1, (lengths // PAGE).unsqueeze(1)).squeeze(1).long()
        self.pools.write_all(fresh, page, lengths % PAGE)
        cache.fresh = {}
        history = None if self.history is None else self.history[:rows]
        noise = self.noise.index_select(0, self.turn)[0, :rows]
        chosen, log_p = self.choose(logits, history, noise)
        self.chosen[:, :rows].index_copy_(0, self.turn, chosen.unsqueeze(0))
        self.log_p[:, :rows].index_copy_(0, self.turn, log_p.unsqueeze(0))
        # Whoever is past its end decodes its last position again, until the host sees it.
        lengths.copy_(torch.minimum(lengths + 1, self.last[:rows]))
        if history is not None:
            history.scatter_(1, lengths.unsqueeze(1), chosen.unsqueeze(1))
        tokens.copy_(chosen)
        self.turn.add_(1)

    def _stepper(self, bucket: int, rows: int) -> Callable[[], Any]:
        """A step of so many rows: a graph on CUDA, where the model allows it."""
        if self.device.type != "cuda":
            return functools.partial(self._step, bucket if self.compiles else rows)
        if self._graphs_fail:
            return functools.partial(self._step, bucket)
        if bucket not in self.graphs:
            try:
                self.graphs[bucket] = self._captured(bucket)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a model that asks the device for a number, as some mixtures of experts
                logger.warning("decoding goes on without CUDA graphs: %s", str(error).split("\n")[0][:300])
                self._graphs_fail = True
                return self._stepper(bucket, rows)
        return self.graphs[bucket].replay

    def _captured(self, rows: int) -> torch.cuda.CUDAGraph:
        """A graph of one step. Kernels are compiled and chosen before, by steps whose results are then forgotten."""
        state = [x for x in (self.tokens, self.lengths, self.turn, self.history) if x is not None]
        before = [x.clone() for x in state]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(rows)
                self._restore(state, before)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._step(rows)
        finally:
            self._restore(state, before)
        self._memory = graph.pool()
        return graph

    @staticmethod
    def _restore(state: list[Tensor], before: list[Tensor]) -> None:
        for x, value in zip(state, before, strict=True):
            x.copy_(value)


def _bucket(rows: int) -> int:
    """How many rows a graph has that decodes so many: powers of two, to capture few."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())


def _mark_dynamic(x: Tensor, dim: int) -> None:
    with contextlib.suppress(AttributeError):
        torch._dynamo.maybe_mark_dynamic(x, dim)
