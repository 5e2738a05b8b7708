"""Operators at the shapes of real models, with random arguments; beside each, what it replaces and what bounds it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsloth.kernels.attention import attention
from unsloth.kernels.glu import geglu, swiglu
from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth.kernels.lora_linear import lora_linear
from unsloth.kernels.nf4 import nf4_dequantize
from unsloth.kernels.operator import Operator
from unsloth.kernels.rms_norm import rms_norm
from unsloth.kernels.rope import rope

Args = tuple[Any, ...]
Peer = Callable[..., Any]
Pairs = list[tuple[Tensor, Tensor]]

RANK = 16
BLOCK, NESTED_BLOCK = 64, 256
"""Weights per scale, and scales per nested scale, of NF4 as bitsandbytes makes it by default."""


@dataclass(frozen=True)
class Size:
    """Widths of a model. ``sequences`` are (batch, length); norms and linear layers see the tokens of the last."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int = 128_256
    sequences: tuple[tuple[int, int], ...] = ((2, 2048), (1, 8192))
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        return math.prod(self.sequences[-1])

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random bfloat16 of a standard deviation."""
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device).mul_(scale)

    def randint(self, bound: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """``count`` random numbers below ``bound``."""
        return torch.randint(bound, (count,), dtype=dtype, device=self.device)

    def heads_of(self, number: int, batch: int, length: int) -> Tensor:
        """[batch, number, length, width] as a projection leaves it in memory: length before heads."""
        return self.randn(batch, length, number, self.width).transpose(1, 2)


SIZES = {
    "1b": Size(2048, 8192, 32, 8, 64),
    "8b": Size(4096, 14_336, 32, 8, 128),
    "70b": Size(8192, 28_672, 64, 8, 128),
}


def _no_products(*_: Any) -> Pairs:
    return []


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    ``arguments()`` are random ones of the operator's schema. Peers take the same, and return the outputs that have a
    gradient. ``wanted`` names the inputs that get one. ``products(direction, *arguments)`` are the pairs of matrices
    whose products are the ceiling; without any it is a copy or, for an operator of ``arithmetic``, one square product.
    """

    op: Operator
    shape: str
    arguments: Callable[[], Args]
    wanted: tuple[str, ...] = ()
    peers: Mapping[str, Peer] = field(default_factory=dict)
    products: Callable[..., Pairs] = _no_products
    arithmetic: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        return self.op.name + self.variant


def _liger(module: str, function: str, count: int, *order: int) -> dict[str, Peer]:
    """Liger's autograd function as a peer, given the operator's first ``count`` arguments; none if not installed.

    ``order`` picks others than the first, by position.
    """
    try:
        apply = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply
    except (ImportError, AttributeError):
        return {}
    return {"liger": lambda *args: apply(*(args[i] for i in order or range(count)))}


def _rms_norm(size: Size) -> Iterator[Case]:
    def arguments() -> Args:
        return size.randn(size.tokens, size.hidden), size.randn(size.hidden), 1e-5, 0.0, True

    def eager(x: Tensor, weight: Tensor, eps: float, *_: Any) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    peers = {"eager": eager, **_liger("rms_norm", "LigerRMSNormFunction", 3)}
    yield Case(rms_norm, f"{size.tokens}×{size.hidden}", arguments, ("x",), peers)


def _rope(size: Size) -> Iterator[Case]:
    batch, length = size.sequences[0]

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> Args:
        return peer["liger"](q, k, cos[:, 0], sin[:, 0])

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *_: Any) -> Args:
        half = size.width // 2

        def turned(x: Tensor) -> Tensor:
            if interleaved:
                return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return torch.cat((-x[..., half:], x[..., :half]), -1)

        return tuple(x * cos + turned(x) * sin for x in (q, k))

    shape = f"{batch}×{length}, {size.heads}+{size.kv_heads} heads of {size.width}"
    peer = _liger("rope", "LigerRopeFunction", 4)
    for interleaved in (False, True):

        def arguments(interleaved: bool = interleaved) -> Args:
            q, k = (size.heads_of(number, batch, length) for number in (size.heads, size.kv_heads))
            angles = size.randn(1, 1, length, size.width // 2)
            angles = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 1, 2)
            return q, k, angles.cos(), angles.sin(), interleaved, interleaved, False

        peers: dict[str, Peer] = {"eager": eager, **({"liger": liger} if peer and not interleaved else {})}
        yield Case(rope, shape, arguments, ("q", "k"), peers, variant=", interleaved" if interleaved else "")


def _swiglu(size: Size) -> Iterator[Case]:
    return _glu(size, swiglu, F.silu, "LigerSiLUMulFunction")


def _geglu(size: Size) -> Iterator[Case]:
    return _glu(size, geglu, lambda gate: F.gelu(gate, approximate="tanh"), "LigerGELUMulFunction", True)


def _glu(size: Size, op: Operator, activation: Callable[[Tensor], Tensor], liger: str, *options: Any) -> Iterator[Case]:
    def arguments() -> Args:
        gate, up = (size.randn(size.tokens, size.intermediate) for _ in range(2))
        return gate, up, *options

    def eager(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
        return activation(gate) * up

    peers = {"eager": eager, **_liger(op.name, liger, 2)}
    yield Case(op, f"{size.tokens}×{size.intermediate}", arguments, ("gate", "up"), peers)


def _attention(size: Size) -> Iterator[Case]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)

    def cudnn(*args: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(*args)

    for batch, length in size.sequences:

        def arguments(batch: int = batch, length: int = length) -> Args:
            q, k, v = (size.heads_of(n, batch, length) for n in (size.heads, size.kv_heads, size.kv_heads))
            return q, k, v, True, size.width**-0.5, None

        shape = f"{batch}×{length}, {size.heads}/{size.kv_heads} heads of {size.width}"
        peers = {"sdpa": sdpa, "cudnn": cudnn}
        yield Case(attention, shape, arguments, ("q", "k", "v"), peers, arithmetic=True)


def _lora_linear(size: Size) -> Iterator[Case]:
    tokens, inner, outer = size.tokens, size.hidden, size.intermediate

    def arguments() -> Args:
        x, b = size.randn(tokens, inner), size.randn(outer, RANK, scale=RANK**-0.5)
        weight, a = (size.randn(rows, inner, scale=inner**-0.5) for rows in (outer, RANK))
        return x, None, weight, None, a, b, 1.0

    def eager(x: Tensor, _: None, weight: Tensor, __: None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return F.linear(x, weight) + scale * F.linear(F.linear(x, a), b)

    def products(direction: str, x: Tensor, _: None, weight: Tensor, *__: Any) -> Pairs:
        return [(x, weight.T) if direction == "forward" else (size.randn(tokens, outer), weight)]

    shape = f"{tokens}×{inner} → {outer}, r={RANK}"
    yield Case(lora_linear, shape, arguments, ("x", "A", "B"), {"eager": eager}, products)


def _nf4_dequantize(size: Size) -> Iterator[Case]:
    rows, columns = size.hidden, size.intermediate
    blocks = rows * columns // BLOCK

    def arguments() -> Args:
        packed, absmax = (size.randint(256, count, torch.uint8) for count in (rows * columns // 2, blocks))
        nested = [torch.rand(n, device=size.device) for n in (256, math.ceil(blocks / NESTED_BLOCK), 1)]
        return packed.view(-1, 1), absmax, *nested, rows, columns, BLOCK, NESTED_BLOCK, torch.bfloat16

    def bitsandbytes(packed: Tensor, absmax: Tensor, code: Tensor, nested: Tensor, offset: Tensor, *_: Any) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        inner = QuantState(nested, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        outer = {"blocksize": BLOCK, "quant_type": "nf4", "dtype": torch.bfloat16, "offset": offset, "state2": inner}
        return dequantize_4bit(packed, QuantState(absmax, torch.Size((rows, columns)), **outer))

    peers = {"eager": nf4_dequantize.reference, "bitsandbytes": bitsandbytes}
    yield Case(nf4_dequantize, f"{rows}×{columns}", arguments, peers=peers)


def _linear_cross_entropy(size: Size) -> Iterator[Case]:
    tokens, hidden_size, vocabulary = math.prod(size.sequences[0]), size.hidden, size.vocabulary

    def eager(hidden: Tensor, weight: Tensor, _: None, labels: Tensor, *__: Any) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    peers = {"eager": eager, **_liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", 3, 0, 1, 3)}
    for trained in (False, True):

        def arguments(trained: bool = trained) -> Args:
            hidden = size.randn(tokens, hidden_size)
            weight = size.randn(vocabulary, hidden_size, scale=hidden_size**-0.5)
            labels = size.randint(vocabulary, tokens)
            return hidden, weight, None, labels, -100, True, 1.0, 0.0, False, [True, trained, False]

        def products(direction: str, hidden: Tensor, weight: Tensor, *rest: Any) -> Pairs:
            if direction == "backward":  # which only rescales what forward has made
                return []
            logits, wants = size.randn(tokens, vocabulary), rest[-1]
            return [(hidden, weight.T), (logits, weight), (logits.T, hidden)][: 2 + wants[1]]

        wanted, variant = (("hidden", "weight"), ", trained head") if trained else (("hidden",), ", frozen head")
        shape = f"{tokens}×{hidden_size}×{vocabulary}"
        yield Case(linear_cross_entropy, shape, arguments, wanted, peers, products, variant=variant)


CASES: dict[str, Callable[[Size], Iterator[Case]]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "attention": _attention,
    "lora_linear": _lora_linear,
    "nf4_dequantize": _nf4_dequantize,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""By operator: its cases at a size."""
