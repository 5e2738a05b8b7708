"""Cases beyond those of kernel_cases.py: attention that is not plainly causal, thin products, losses of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unsloth.kernels.capped_attention import capped_attention
from unsloth.kernels.glu import SILU
from unsloth.kernels.lora_backward import LORA_DOWN_BACKWARD, LORA_UP_BACKWARD, glu_lora_backward
from unsloth.kernels.masked_attention import masked_attention
from unsloth.kernels.packed_attention import cu_seqlens, extents, packed_attention
from unsloth.kernels.paged_attention import paged_attention
from unsloth.kernels.sink_attention import sink_attention
from unsloth.kernels.token_cross_entropy import token_cross_entropy

from . import kernel_cases
from .kernel_cases import RANK, Args, Case, Pairs, Size

CAP, WINDOW = 50.0, 4096
"""As Gemma 2 has them."""
DOCUMENTS = 4
"""Of a row."""
PAGE, CONTEXT = 32, 2048
"""Keys of a page, and of a sequence that is decoded."""


def _heads(size: Size, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (size.heads_of(n, batch, length) for n in (size.heads, size.kv_heads, size.kv_heads))
    return q, k, v


def _shape(size: Size, batch: int, length: int, more: str = "") -> str:
    return f"{batch}×{length}{more}, {size.heads}/{size.kv_heads} heads of {size.width}"


def _causal(q: Tensor, window: int | None = None) -> Tensor:
    place = torch.arange(q.shape[2], device=q.device)
    distance = place[:, None] - place
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale


def _weighted(scores: Tensor, v: Tensor, like: Tensor) -> Tensor:
    return torch.softmax(scores.float(), -1).to(like.dtype) @ v.repeat_interleave(like.shape[1] // v.shape[1], 1)


def _capped(size: Size) -> Iterator[Case]:
    """With Gemma 2's window in every other layer."""

    def eager(q: Tensor, k: Tensor, v: Tensor, _: None, scale: float, window: int | None, cap: float) -> Tensor:
        scores = torch.tanh(_scores(q, k, scale) / cap) * cap
        return _weighted(scores.masked_fill(~_causal(q, window), -math.inf), v, q)

    batch, length = size.sequences[0]
    for window in (None, min(WINDOW, length // 2)):

        def arguments(window: int | None = window) -> Args:
            return *_heads(size, batch, length), None, size.width**-0.5, window, CAP

        shape = _shape(size, batch, length, "" if window is None else f", window {window}")
        yield Case(capped_attention, shape, arguments, ("q", "k", "v"), {"eager": eager}, arithmetic=True)


def _masked(size: Size) -> Iterator[Case]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    batch, length = size.sequences[0]

    def arguments() -> Args:
        q, k, v = _heads(size, batch, length)
        padding = torch.rand(batch, 1, 1, length, device=size.device) < 0.9
        own = torch.eye(length, dtype=torch.bool, device=size.device)  # every query sees a key
        return q, k, v, _causal(q) & padding | own, size.width**-0.5

    yield Case(
        masked_attention, _shape(size, batch, length), arguments, ("q", "k", "v"), {"sdpa": sdpa}, arithmetic=True
    )


def _packed(size: Size) -> Iterator[Case]:
    batch, length = size.sequences[-1]

    def documents() -> Tensor:
        place = torch.arange(length, device=size.device)
        return (place * DOCUMENTS // length).repeat(batch, 1)

    def sdpa(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, counts: Tensor, causal: bool, scale: float, _: None
    ) -> Tensor:
        of = documents()
        mask = (of[:, None, :, None] == of[:, None, None, :]) & _causal(q)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    def arguments() -> Args:
        offsets = cu_seqlens(documents())
        return *_heads(size, batch, length), offsets, extents(offsets), True, size.width**-0.5, None

    shape = _shape(size, batch, length, f" of {DOCUMENTS}")
    yield Case(packed_attention, shape, arguments, ("q", "k", "v"), {"sdpa": sdpa}, arithmetic=True)


def _sinks(size: Size) -> Iterator[Case]:
    def eager(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, causal: bool, scale: float, _: None) -> Tensor:
        scores = _scores(q, k, scale).masked_fill(~_causal(q), -math.inf)
        with_sink = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
        return torch.softmax(with_sink.float(), -1)[..., :-1].to(q.dtype) @ v.repeat_interleave(
            q.shape[1] // v.shape[1], 1
        )

    batch, length = size.sequences[0]

    def arguments() -> Args:
        return *_heads(size, batch, length), size.randn(size.heads), True, size.width**-0.5, None

    wanted = ("q", "k", "v", "sinks")
    yield Case(sink_attention, _shape(size, batch, length), arguments, wanted, {"eager": eager}, arithmetic=True)


def _paged(size: Size) -> Iterator[Case]:
    """A token for each of 64 sequences; bound by reading their keys and values."""
    batch, pages = 64, CONTEXT // PAGE
    if size.device == "cpu":
        batch, pages = 2, 4

    def arguments() -> Args:
        q, k, v = _heads(size, batch, 1)
        keys, values = (size.randn(batch * pages, size.kv_heads, PAGE, size.width) for _ in range(2))
        tables = torch.randperm(batch * pages, device=size.device).int().view(batch, pages)
        lengths = torch.randint(pages * PAGE // 2, pages * PAGE, (batch,), device=size.device, dtype=torch.int32)
        return q, k, v, keys, values, tables, lengths, size.width**-0.5, None, None

    shape = f"{batch}, {pages * PAGE} keys, {size.heads}/{size.kv_heads} heads of {size.width}"
    yield Case(paged_attention, shape, arguments, peers={"eager": paged_attention.reference})


def _thin(size: Size) -> Iterator[Case]:
    """Gradients of B behind queries, keys and values, of A in front of the base product, and all of a gated MLP's."""
    tokens, hidden, inner = math.prod(size.sequences[0]), size.hidden, size.intermediate
    widths = [size.heads * size.width, *[size.kv_heads * size.width] * 2]

    def of_qkv() -> Args:
        dys, Bs = ([size.randn(rows, n) for n in columns] for rows, columns in ((tokens, widths), (RANK, widths)))
        return *dys, size.randn(tokens, 3 * RANK), *(B.T.contiguous() for B in Bs), 1.0, 1.0, 1.0

    yield Case(
        LORA_UP_BACKWARD[3],
        f"{tokens}×{'+'.join(map(str, widths))}, r={RANK}",
        of_qkv,
        peers={"eager": functools.partial(_up_by_product, 3)},
    )

    def of_output() -> Args:
        dy, weight = size.randn(tokens, hidden), size.randn(hidden, inner, scale=inner**-0.5)
        A, dxa = size.randn(RANK, inner, scale=inner**-0.5), size.randn(tokens, RANK)
        return dy, weight, A, dxa, size.randn(tokens, inner), None, None, 0.0

    def eager(dy: Tensor, weight: Tensor, A: Tensor, dxa: Tensor, x: Tensor, *_: Any) -> Args:
        return dy @ weight + dxa @ A, dxa.T @ x

    def products(direction: str, dy: Tensor, weight: Tensor, *_: Any) -> Pairs:
        return [(dy, weight)]

    shape = f"{tokens}×{hidden} → {inner}, r={RANK}"
    yield Case(LORA_DOWN_BACKWARD[1], shape, of_output, peers={"eager": eager}, products=products)

    def of_mlp() -> Args:
        wide = (size.randn(tokens, inner) for _ in range(3))
        Bs = (size.randn(inner, RANK, scale=RANK**-0.5) for _ in range(2))
        return *wide, size.randn(tokens, RANK), size.randn(tokens, 2 * RANK), *Bs, 1.0, 1.0, SILU.value

    def mlp_by_product(
        dh: Tensor, gate: Tensor, up: Tensor, dxa_down: Tensor, xa: Tensor, B1: Tensor, B2: Tensor, *_: Any
    ) -> Args:
        share = torch.sigmoid(gate.float())
        act = gate.float() * share
        dgate = (dh.float() * up * (share + act * (1 - share))).to(gate.dtype)
        dup, h = (dh.float() * act).to(gate.dtype), (act * up).to(gate.dtype)
        return dgate, dup, dxa_down.T @ h, *_up_by_product(2, dgate, dup, xa, B1, B2, 1.0, 1.0)

    yield Case(glu_lora_backward, f"{tokens}×{inner}, r={RANK}", of_mlp, peers={"eager": mlp_by_product})


def _up_by_product(count: int, *args: Any) -> Args:
    dys, xa, Bs = args[:count], args[count], args[count + 1 : 2 * count + 1]
    dxa = torch.cat([dy @ B for dy, B in zip(dys, Bs, strict=True)], -1)
    return dxa, *(dy.T @ own for dy, own in zip(dys, xa.chunk(count, -1), strict=True))


def _token_cross_entropy(size: Size) -> Iterator[Case]:
    tokens, hidden_size, vocabulary = math.prod(size.sequences[0]), size.hidden, size.vocabulary

    def eager(hidden: Tensor, weight: Tensor, _: None, labels: Tensor, *__: Any) -> Args:
        losses = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
        return losses, losses[:0]

    def arguments() -> Args:
        hidden, weight = size.randn(tokens, hidden_size), size.randn(vocabulary, hidden_size, scale=hidden_size**-0.5)
        settings = (-100, 1.0, 0.0, False, False, [True, False, False])
        return hidden, weight, None, size.randint(vocabulary, tokens), *settings

    def products(direction: str, hidden: Tensor, weight: Tensor, *_: Any) -> Pairs:
        # Forward makes the slopes too, which backward only multiplies.
        return [(hidden, weight.T), (size.randn(tokens, vocabulary), weight)] if direction == "forward" else []

    shape = f"{tokens}×{hidden_size}×{vocabulary}"
    yield Case(token_cross_entropy, shape, arguments, ("hidden",), {"eager": eager}, products)


CASES: dict[str, Callable[[Size], Iterator[Case]]] = {
    **kernel_cases.CASES,
    "capped_attention": _capped,
    "masked_attention": _masked,
    "packed_attention": _packed,
    "sink_attention": _sinks,
    "paged_attention": _paged,
    "thin_products": _thin,
    "token_cross_entropy": _token_cross_entropy,
}
"""By operator, or what several do together: all cases at a size."""
