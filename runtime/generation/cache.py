"""transformers' two seams: a ``Cache`` that takes the keys and values of new tokens, and an attention that reads pages.

The model's own forward runs in either case. Prompts go through its own attention, and the cache writes their keys and
values into pages as it is handed them. To decode, the model's attention is ``unsloth_paged`` for the time being: the
cache only notes the new token's keys and values, and attention reads pages and them. Neither changes the model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...kernels import paged_attention as _operators  # registers the operator
from .pages import Pools, Shape

ATTENTION = "unsloth_paged"
_UNDERSTOOD = {"dropout", "is_causal", "output_attentions", "use_cache", "position_ids", "cache_position"}
_UNDERSTOOD |= {"output_router_logits", "output_hidden_states", "return_dict", "layer_idx", "num_items_in_batch"}


class NewTokens(Cache):
    """A cache without a past, as far as the model knows: takes the keys and values of the tokens of this call.

    Attributes:
        pools: pages; None while their shape is still to be learnt.
        tables, lengths: of the rows, as :mod:`~unsloth.kernels.paged_attention` takes them, for decoding.
        slots: page and offset of each token, to write them at once; None to note them in ``fresh``.
        fresh: keys and values by layer.
        layer: whose attention comes next.
        capped: whether the model's attention caps scores where it is told to.
        watching: note what attention is told: ``windows`` by layer, and ``unlike``, what it does not understand.
    """

    def __init__(self, pools: Pools | None = None, *, capped: bool = True, watching: bool = False) -> None:
        super().__init__(layers=[])
        self.pools, self.capped, self.watching = pools, capped, watching
        self.tables: Tensor | None = None
        self.lengths: Tensor | None = None
        self.slots: tuple[Tensor, Tensor] | None = None
        self.fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self.layer = 0
        self.unlike: str | None = None
        self.windows: dict[int, int | None] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.layer = layer_idx
        if self.slots is not None and self.pools is not None:
            self.pools.write(layer_idx, key_states, value_states, *self.slots)
        else:
            self.fresh[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def shapes(self) -> dict[int, Shape]:
        """Of the keys and values that were noted."""
        return {n: Shape(k.shape[1], k.shape[3], v.shape[3], v.dtype) for n, (k, v) in sorted(self.fresh.items())}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def __len__(self) -> int:
        return max(len(self.fresh), 1)


class _Step:
    """Whose turn it is: attention modules hand on what they know of, and that is not this."""

    cache: NewTokens | None = None


STEP = _Step()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row, as transformers calls it; returns [batch, 1, heads, channels]."""
    cache = STEP.cache
    assert cache is not None and cache.pools is not None and cache.tables is not None and cache.lengths is not None
    if cache.watching:
        cache.windows[cache.layer] = sliding_window
        if attention_mask is not None:
            cache.unlike = "it gives its attention a mask of its own"
        if strange := [n for n, x in others.items() if isinstance(x, Tensor) and n not in _UNDERSTOOD]:
            cache.unlike = f"it gives its attention {', '.join(strange)}"
    keys, values = cache.pools.of(cache.layer)
    if cache.watching and (key.shape[1::2], value.shape[1::2]) != (keys.shape[1::2], values.shape[1::2]):
        raise RuntimeError("its attention gets other keys than its cache")
    out, lse = torch.ops.unsloth.paged_attention(
        query.to(keys.dtype),
        key.to(keys.dtype),
        value.to(values.dtype),
        keys,
        values,
        cache.tables,
        cache.lengths,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        softcap if cache.capped else None,
    )
    if s_aux is not None:  # one more score a head, that has no value: kernels/sink_attention.py
        sink = s_aux.to(lse.dtype)[:, None]
        out = (out.to(lse.dtype) * torch.sigmoid(lse - sink).unsqueeze(-1)).to(out.dtype)
    return out.transpose(1, 2), None


assert _operators is not None
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


@contextlib.contextmanager
def attending(model: nn.Module, name: str) -> Iterator[None]:
    """The model's attention is the one that is registered under a name, in all its parts."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, former in before:  # outer ones first: they set those within them
            config._attn_implementation = former


@contextlib.contextmanager
def decoding(model: nn.Module, cache: NewTokens) -> Iterator[None]:
    """The model's attention reads the pages of this cache."""
    outer, STEP.cache = STEP.cache, cache
    try:
        with attending(model, ATTENTION):
            yield
    finally:
        STEP.cache = outer


def cache_argument(model: nn.Module) -> str | None:
    """By which name a model's forward takes its cache, or None."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def keeps_one(model: nn.Module) -> dict[str, int]:
    """Arguments with which the model computes the logits of the last token only."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Dropout off, no gradients, and modules that were compiled in place as they were written."""
    training = {m for m in model.modules() if m.training}
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    device = next(model.parameters()).device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device):  # casts that a captured step finds in a cache are not captured
            dtype = torch.get_autocast_dtype(device)
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        try:
            for module in compiled:
                module._compiled_call_impl = None
            model.eval()
            yield
        finally:
            for module, call in compiled.items():
                module._compiled_call_impl = call
            for module in model.modules():
                module.training = module in training


def versions(model: nn.Module) -> int:
    """A number that changes whenever a weight is written."""
    return sum(p._version for p in model.parameters())
