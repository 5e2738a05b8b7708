"""Whether a model decodes from pages: asked of its configuration, and then of the model itself.

A configuration cannot say everything, so the engine decodes a few tokens and compares their logits with those of the
model's own forward. What is not the same is left to ``generate``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.paged_attention import paged_attention
from ...models.parts import unwrapped
from .cache import NewTokens, cache_argument, decoding
from .images import Beside, shift_of, together
from .pages import PAGE, TRASH, Pools, Shape, pages_for

_KINDS = {"full_attention", "sliding_attention"}
_PROMPT, _DECODED = 3, 2
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest relative difference of logits, in the norm; of two roundings in different orders it is a tenth of that."""


@dataclass(frozen=True)
class Layout:
    """What the engine knows of a model.

    Attributes:
        shapes: of each layer's keys and values.
        cache: name of the forward's argument.
        capped: whether scores are capped where attention is told to.
    """

    shapes: dict[int, Shape]
    cache: str
    capped: bool


class Unsupported(Exception):
    """Why a model or a request is left to ``generate``."""


def base_of(model: nn.Module) -> Any:
    """The model with its adapters in it, without PEFT's wrapper.

    Raises:
        Unsupported: for adapters that are more than layers, and for what is no model of transformers.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and (config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None)):
        raise Unsupported(f"its adapters are {config.peft_type.value}, which do more than change layers")
    base = unwrapped(model)
    if not hasattr(base, "generate") or not hasattr(base, "config"):
        raise Unsupported(f"{type(base).__name__} is no transformers model that generates")
    return base


def configured(model: Any) -> None:
    """Refuse what a configuration says.

    Raises:
        Unsupported: for a model whose tokens know of each other by more than keys and values.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported("it has an encoder")
    text = config.get_text_config(decoder=True)
    if others := set(getattr(text, "layer_types", None) or ()) - _KINDS:
        raise Unsupported(f"it has layers of {', '.join(sorted(others))}, whose state is not keys and values")
    if getattr(model, "_is_stateful", False):
        raise Unsupported("it keeps a recurrent state")
    if getattr(text, "num_kv_shared_layers", None):
        raise Unsupported("its layers share their keys and values")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for part in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        if (kind := part.get("rope_type", part.get("type"))) in ("dynamic", "longrope"):
            raise Unsupported(f"its rotary positions are {kind}: they change with the length of the batch")
    if not getattr(model, "_supports_attention_backend", True):
        raise Unsupported("its attention is not chosen by name")


def examine(model: Any) -> Layout:
    """Decode a few tokens with the model, at rest.

    Raises:
        Unsupported: saying what is not as the engine needs it.
    """
    configured(model)
    name = cache_argument(model)
    if name is None:
        raise Unsupported("its forward takes no cache")
    embedding = model.get_input_embeddings()
    device, vocabulary = embedding.weight.device, embedding.weight.shape[0]
    ids = (torch.arange(2 * (_PROMPT + _DECODED), device=device).view(2, -1) * 7 + 11) % vocabulary
    capped = model.config.get_text_config(decoder=True)._attn_implementation != "sdpa"
    try:
        noted = NewTokens()
        model(input_ids=ids[:, :_PROMPT], use_cache=True, **{name: noted})
        layout = Layout(noted.shapes(), name, capped)
        if not layout.shapes:
            raise Unsupported("it puts no keys and values into its cache")
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(f"decoding from pages raises {type(error).__name__}: {str(error)[:200]}") from error
    compare(model, layout, ids, Beside())
    return layout


def compare(model: Any, layout: Layout, ids: Tensor, beside: Beside) -> None:
    """Decode the last tokens of rows [rows, length], at rest, and compare logits with those of the model's forward.

    Args:
        beside: what stands beside the tokens, of which the last ones are none of an image's; one row then.

    Raises:
        Unsupported: when they differ, or the model cannot be run so.
    """
    try:
        expected = model(input_ids=ids, use_cache=False, **beside.media).logits[:, -_DECODED:]
        found = _decoded(model, layout, ids, beside)
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(f"decoding from pages raises {type(error).__name__}: {str(error)[:200]}") from error
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    if not error <= TOLERANCE.get(next(iter(layout.shapes.values())).dtype, 8e-2):
        raise Unsupported(f"decoding from pages gives other logits than its forward, by {error:.1e} of their norm")


def _decoded(model: Any, layout: Layout, ids: Tensor, beside: Beside) -> Tensor:
    """Logits [rows, decoded, vocabulary] of the last tokens, one at a time."""
    (rows, length), device = ids.shape, ids.device
    prompt, pages = length - _DECODED, pages_for(length)
    cache = NewTokens(Pools(layout.shapes, TRASH + 1 + rows * pages, device), capped=layout.capped, watching=True)
    assert cache.pools is not None
    tables = torch.arange(TRASH + 1, TRASH + 1 + rows * pages, device=device).view(rows, pages)
    place = torch.arange(prompt, device=device)
    cache.slots = tables[:, place // PAGE].flatten(), (place % PAGE).repeat(rows)
    positions = beside.positions(model, ids[:, :prompt])
    model(
        input_ids=ids[:, :prompt],
        use_cache=True,
        **{layout.cache: cache},
        **together([(ids[:, :prompt], beside)], [positions]),
    )
    cache.slots = None
    cache.tables = tables.int()
    logits = []
    with decoding(model, cache):
        for position in range(prompt, length):
            cache.lengths = torch.full((rows,), position, dtype=torch.int32, device=device)
            cache.fresh = {}
            output = model(
                input_ids=ids[:, position, None],
                position_ids=torch.full((rows, 1), position + shift_of(positions), device=device),
                use_cache=True,
                **{layout.cache: cache},
            )
            cache.pools.write_all(cache.fresh, tables[:, position // PAGE], cache.lengths.long() % PAGE)
            logits.append(output.logits[:, -1])
    _check_told(model, layout, cache)
    return torch.stack(logits, dim=1)


def _check_told(model: Any, layout: Layout, cache: NewTokens) -> None:
    """What attention was told, of which a few tokens show nothing."""
    if cache.unlike is not None:
        raise Unsupported(cache.unlike)
    if set(cache.windows) != set(layout.shapes):
        raise Unsupported("its attention is not chosen by name in every layer")
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    for layer, window in cache.windows.items():
        slides = kinds is not None and layer < len(kinds) and kinds[layer] == "sliding_attention"
        if slides and window is None:
            raise Unsupported("its attention is not told of its window")
    if paged_attention.disabled is not None:
        raise Unsupported(f"the paged_attention kernel failed: {paged_attention.disabled}")
