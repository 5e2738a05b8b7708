"""The sequences of one call: who decodes, who waits, and when somebody is done.

A distinct prompt is read once, and its pages are shared by all sequences that continue it; the last of them, which is
filled in part, is copied for each. As many sequences as there is room for decode together, and when one is done the
next takes its place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..prompts import context_of, refuse_too_long
from .cache import NewTokens, decoding, keeps_one, versions
from .decode import Decoder, Row
from .images import Beside, shift_of, together
from .pages import PAGE, TRASH, Book, Pools, affordable, free_bytes, pages_for
from .sampling import Sampling
from .support import Layout

logger = logging.getLogger(__name__)

STEPS_BETWEEN_LOOKS = 8
"""On a GPU: the host stops the device to look at tokens; what is decoded past a sequence's end is thrown away."""
PROMPT_TOKENS = 16384
"""That are read in one forward pass."""
_STOP_TOKENS = 64
"""Of a completion's end in which a stop string is looked for."""


class StaleError(RuntimeError):
    """Weights were written while completions were being made with them."""


@dataclass
class Completion:
    """What was made of a prompt.

    Attributes:
        ids: its tokens; the one that ended it is the last.
        log_p: of each token, in nats, at the temperature at which it was drawn.
        reason: "stop", or "length" where it was cut.
    """

    ids: list[int] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)
    reason: str = "length"


@dataclass(eq=False)
class _Prompt:
    """A distinct prompt: all but its last token are in pages, which each sequence decodes for itself."""

    ids: list[int]
    beside: Beside = field(default_factory=Beside)
    waiting: int = 0
    full: list[int] = field(default_factory=list)
    partial: int | None = None
    read: bool = False
    shift: int = 0  # of the positions behind its images

    @property
    def stored(self) -> int:
        return len(self.ids) - 1


@dataclass(eq=False)
class _Sequence:
    """A completion in the making, of at most ``new`` tokens."""

    index: int
    prompt: _Prompt
    completion: Completion
    new: int
    pages: list[int] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Tokens whose keys it stores: the last new one is never decoded further."""
        return self.prompt.stored + self.new

    @property
    def done(self) -> bool:
        return self.completion.reason == "stop" or len(self.completion.ids) >= self.new

    def row(self) -> Row:
        ids = self.completion.ids
        return Row(
            token=ids[-1] if ids else self.prompt.ids[-1],
            position=self.prompt.stored + len(ids),
            last=self.capacity - 1,
            pages=self.pages,
            history=[*self.prompt.ids, *ids],
            shift=self.prompt.shift,
        )


class Batch:
    """The sequences of one call."""

    def __init__(
        self,
        model: Any,
        layout: Layout,
        prompts: Sequence[Sequence[int]],
        beside: Sequence[Beside],
        sampling: Sampling,
        tokenizer: Any,
        device: torch.device,
        rows: int,
        share: float,
        run: Any,
    ) -> None:
        self.model, self.layout, self.sampling, self.tokenizer, self.device = model, layout, sampling, tokenizer, device
        distinct: list[_Prompt] = []
        by_ids: dict[tuple[int, ...], list[_Prompt]] = {}  # which may be of different images
        seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**31, ()))
        self.sequences: list[_Sequence] = []
        context = context_of(model)
        for index, (ids, theirs) in enumerate(zip(prompts, beside, strict=True)):
            new = sampling.new_tokens
            if context is not None:  # what was made for fewer positions may have no more of them
                refuse_too_long(len(ids), context, f"prompt {index}")
                new = min(new, context - len(ids))
            alike = by_ids.setdefault(tuple(ids), [])
            prompt = next((p for p in alike if p.beside.equals(theirs)), None)
            if prompt is None:
                prompt = _Prompt(list(ids), theirs)
                alike.append(prompt)
                distinct.append(prompt)
            for _ in range(sampling.per_prompt):
                self.sequences.append(_Sequence(len(self.sequences), prompt, Completion(), new))
                prompt.waiting += 1
        self.noise = sampling.noise(seed, len(self.sequences)) if sampling.sample else None
        sizes = [pages_for(s.capacity) + 1 for s in self.sequences]
        available = free_bytes(device)
        pages = affordable(
            layout.shapes,
            sum(sizes),
            max(sizes),
            None if available is None else int(available * share),
            len(self.sequences),
        )
        self.book = Book(pages)
        self.pools = Pools(layout.shapes, pages, device)
        # Who continues the same prompt comes together: its pages are held until the last of them is admitted.
        order = {prompt: place for place, prompt in enumerate(distinct)}
        self.waiting = sorted(self.sequences, key=lambda s: (order[s.prompt], s.index), reverse=True)
        self.active: list[_Sequence] = []
        self.rows = min(rows, len(self.sequences))
        self.decoder = Decoder(
            model,
            layout.cache,
            self.pools,
            sampling,
            rows=self.rows,
            longest=max(s.capacity for s in self.sequences),
            every=STEPS_BETWEEN_LOOKS if device.type == "cuda" else 1,
            capped=layout.capped,
            run=run,
        )
        if len(self.sequences) > self.rows or sum(sizes) >= pages:
            logger.info("%d sequences, as many at a time as %d rows and %d pages hold", len(sizes), self.rows, pages)

    def close(self) -> None:
        """Give back pages and graphs, and the memory that they held, to whoever comes next."""
        self.decoder.close()
        self.pools.release()
        del self.decoder, self.pools
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self) -> list[Completion]:
        """Run until every sequence is done."""
        weights = versions(self.model)
        while self.waiting or self.active:
            if admitted := self._admit():
                self._read([s.prompt for s in admitted])
                self._give_pages(admitted)
                self.active += admitted
                self._place()
            left = max(s.new - len(s.completion.ids) for s in self.active)
            self._decode(min(self.decoder.every, left))
            if versions(self.model) != weights:
                done = sum(len(s.completion.ids) for s in self.sequences)
                raise StaleError(f"weights were written while completions were made: {done} tokens are of older ones")
        return [s.completion for s in self.sequences]

    # -- who decodes ---------------------------------------------------------------------------------------------------

    def _admit(self) -> list[_Sequence]:
        """Sequences for which there is a row, and pages for all that they may become; first come, first served."""
        admitted, promised = [], 0
        seen: set[_Prompt] = set()
        while self.waiting and len(self.active) + len(admitted) < self.rows:
            sequence = self.waiting[-1]
            prompt = sequence.prompt
            needs = pages_for(sequence.capacity) - prompt.stored // PAGE
            if not prompt.read and prompt not in seen:
                needs += pages_for(prompt.stored)
            if promised + needs > self.book.free:
                break
            seen.add(prompt)
            promised += needs
            admitted.append(self.waiting.pop())
        return admitted

    def _give_pages(self, admitted: list[_Sequence]) -> None:
        sources, targets = [], []
        for sequence in admitted:
            prompt = sequence.prompt
            prompt.waiting -= 1
            own = pages_for(sequence.capacity) - len(prompt.full)
            self.book.share(prompt.full)
            mine: list[int] = []
            if prompt.partial is not None and not prompt.waiting:  # the last one to come needs no copy
                mine, prompt.partial = [prompt.partial], None
            elif prompt.partial is not None:
                mine = self.book.take(1)
                sources.append(prompt.partial)
                targets.append(mine[0])
            sequence.pages = [*prompt.full, *mine, *self.book.take(own - len(mine))]
            if not prompt.waiting:
                self.book.release(prompt.full)
        self.pools.copy(sources, targets)

    def _place(self) -> None:
        self.decoder.place([s.row() for s in self.active])

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _read(self, prompts: Sequence[_Prompt]) -> None:
        """Put keys and values of prompts into pages, several in a forward pass, padded at the right."""
        fresh = sorted(dict.fromkeys(p for p in prompts if not p.read), key=lambda p: p.stored)
        for prompt in fresh:
            pages = self.book.take(pages_for(prompt.stored))
            whole = prompt.stored // PAGE
            prompt.full, prompt.read = pages[:whole], True
            prompt.partial = pages[whole] if len(pages) > whole else None
        batch: list[_Prompt] = []
        for prompt in (p for p in fresh if p.stored):
            if batch and (len(batch) + 1) * prompt.stored > PROMPT_TOKENS:
                self._forward(batch)
                batch = []
            batch.append(prompt)
        if batch:
            self._forward(batch)

    def _forward(self, prompts: list[_Prompt]) -> None:
        longest = max(p.stored for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        page, offset = torch.full_like(ids, TRASH), torch.zeros_like(ids)
        place = torch.arange(longest)
        for row, prompt in enumerate(prompts):
            ids[row, : prompt.stored] = torch.tensor(prompt.ids[:-1])
            pages = torch.tensor([*prompt.full, *([] if prompt.partial is None else [prompt.partial])])
            page[row, : prompt.stored] = pages[place[: prompt.stored] // PAGE]
            offset[row, : prompt.stored] = place[: prompt.stored] % PAGE
        cache = NewTokens(self.pools)
        cache.slots = page.flatten().to(self.device), offset.flatten().to(self.device)
        # No mask: what is padded at the right is seen by nobody to its left.
        ids = ids.to(self.device)
        parts = [(ids[row : row + 1, : prompt.stored], prompt.beside) for row, prompt in enumerate(prompts)]
        positions = [beside.positions(self.model, theirs) for theirs, beside in parts]
        for prompt, where in zip(prompts, positions, strict=True):
            prompt.shift = shift_of(where)
        self.model(
            input_ids=ids,
            use_cache=True,
            **{self.layout.cache: cache},
            **keeps_one(self.model),
            **together(parts, positions),
        )

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _decode(self, steps: int) -> None:
        rows = len(self.active)
        noise = torch.zeros(steps, rows, dtype=torch.float64)
        if self.noise is not None:
            which = torch.tensor([s.index for s in self.active])
            position = torch.tensor([len(s.completion.ids) for s in self.active]) + torch.arange(steps).unsqueeze(1)
            noise = self.noise[which, position.clamp(max=self.noise.shape[1] - 1)]
        with decoding(self.model, self.decoder.cache):
            tokens, log_p = self.decoder.steps(steps, rows, noise)
        for sequence, new, their_log_p in zip(self.active, tokens, log_p, strict=True):
            self._append(sequence, new, their_log_p)
        if any(s.done for s in self.active):
            for sequence in (s for s in self.active if s.done):
                self.book.release(sequence.pages)
            self.active = [s for s in self.active if not s.done]
            if self.active:
                self._place()

    def _append(self, sequence: _Sequence, tokens: list[int], log_p: list[float]) -> None:
        """What was decoded, as far as it belongs to the completion."""
        completion, count = sequence.completion, 0
        for token in tokens[: sequence.new - len(completion.ids)]:
            completion.ids.append(token)
            count += 1
            if token in self.sampling.ends or self._stops(completion.ids):
                completion.reason = "stop"
                break
        completion.log_p += log_p[:count]
        if not math.isfinite(sum(log_p[:count])):
            raise FloatingPointError(
                f"the model's predictions for sequence {sequence.index} are not finite, within {len(completion.ids)} "
                "tokens: its weights are not, or a half-precision value overflows"
            )

    def _stops(self, ids: list[int]) -> bool:
        if not self.sampling.stops:
            return False
        text = self.tokenizer.decode(ids[-_STOP_TOKENS:])
        return any(stop in text for stop in self.sampling.stops)
