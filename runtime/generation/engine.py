"""Completions of many prompts, with the weights that a model has now.

What is kept of a model between two calls is its layout and the compiled step. Keys and values are gone when a call
returns: none outlives the weights that made it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.options import Options
from ...compiler.report import GraphReport
from ...compiler.run import compiled
from .batch import Batch, Completion
from .cache import at_rest
from .decode import logits_of
from .images import Beside
from .sampling import Sampling
from .support import Layout, Unsupported, base_of, compare, examine

logger = logging.getLogger(__name__)

MOST_ROWS = 256
"""That decode together."""
SHARE = 0.85
"""Of free memory that pages may take; the rest is for what a step holds."""


class Engine:
    """What is worth keeping of a model between two calls: its layout, and the compiled step; no key and no value."""

    def __init__(self, model: nn.Module) -> None:
        """Examine the model.

        Raises:
            Unsupported: saying why it does not decode from pages.
        """
        with at_rest(model):
            self.layout: Layout = examine(base_of(model))
        self.reports: list[GraphReport] = []
        self._compiled: Any = None
        self._broken = False
        self._sees: bool | str | None = None  # whether images are read as they should be, or why not

    def check_images(self, model: Any, ids: Sequence[int], beside: Beside) -> None:
        """See to it that what is decoded behind a prompt's images is what the model's forward says; asked once.

        Args:
            model: at rest, without PEFT's wrapper.

        Raises:
            Unsupported: saying why not.
        """
        if self._sees is None:
            try:
                row = torch.tensor(ids, device=model.get_input_embeddings().weight.device)[None]
                compare(model, self.layout, row, beside)
                self._sees = True
            except Unsupported as error:
                self._sees = str(error)
        if isinstance(self._sees, str):
            raise Unsupported(self._sees)

    def step(self, compile: bool, options: Options | None) -> Any:
        """The function that decodes, compiled by the backend where that is asked for and possible."""
        if not compile or self._broken:
            return logits_of
        options = options or Options()
        if self._compiled is None:
            self._compiled = compiled(logits_of, options, self.reports)

        def step(*args: Any) -> Any:
            try:
                return logits_of(*args) if self._broken else self._compiled(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
                if options.strict or capturing:
                    raise
                self._broken = True
                message = f"{type(error).__name__}: {str(error)[:300]}"
                logger.warning("decoding goes on uncompiled, because the compiled step raised %s", message)
                return logits_of(*args)

        return step


_engines: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Engine | str]] = weakref.WeakKeyDictionary()
"""By model: what it was when it was examined, and its engine, or why there is none."""


def engine_of(model: nn.Module) -> Engine:
    """The model's engine; a model is examined once, and again in another precision, or with another attention.

    Raises:
        Unsupported: saying why there is none.
    """
    base = base_of(model)
    weight = base.get_input_embeddings().weight
    kind = weight.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    state = base.config._attn_implementation, weight.dtype, weight.device, autocast
    before, known = _engines.get(base, (None, ""))
    if before != state:
        try:
            known = Engine(model)
        except Unsupported as error:  # whose traceback would keep the model alive
            known = str(error)
        _engines[base] = state, known
    if isinstance(known, str):
        raise Unsupported(known)
    return known


def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    media: Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: Any = None,
    rows: int = MOST_ROWS,
    share: float = SHARE,
    compile: bool | None = None,
    options: Options | None = None,
) -> list[Completion]:
    """Complete prompts with the weights that the model has now, adapters included.

    Args:
        prompts: tokens, without padding; equal ones are read once.
        sampling: how; ``per_prompt`` completions of each prompt stand one after the other in the result.
        media: what the model's forward takes beside the tokens of each prompt, with a batch of one: pixels, and
            ``mm_token_type_ids`` or ``token_type_ids`` [1, tokens]; empty where it has no image.
        tokenizer: needed for stop strings.
        rows: sequences that decode together, at most.
        share: of the device's free memory that keys and values may take.
        compile: the step by the backend; None is yes on CUDA.
        options: of the backend.

    Raises:
        Unsupported: when this model has to be left to ``generate``.
        NoSpaceError: when not even one sequence fits.
        StaleError: when somebody writes weights meanwhile.
        FloatingPointError: when predictions are NaN or infinite.
        ValueError: for a prompt without tokens, or one that fills the model's context, by its index. What leaves less
            room than ``new_tokens`` is completed to the context's end.
    """
    if empty := [i for i, ids in enumerate(prompts) if not len(ids)]:
        raise ValueError(f"prompt {empty[0]} has no tokens")
    if sampling.stops and tokenizer is None:
        raise ValueError("stop strings need the tokenizer")
    if not prompts:
        return []
    engine, base = engine_of(model), base_of(model)
    device = base.get_input_embeddings().weight.device
    run = engine.step(device.type == "cuda" if compile is None else compile, options)
    beside = [Beside(one) for one in media or [{}] * len(prompts)]
    with at_rest(model):
        with_images = next((index for index, one in enumerate(beside) if one.has_images), None)
        if with_images is not None:
            engine.check_images(base, prompts[with_images], beside[with_images])
        batch = Batch(base, engine.layout, prompts, beside, sampling, tokenizer, device, rows, share, run)
        try:
            return batch.finish()
        finally:
            batch.close()
