"""A frozen linear layer with a low-rank adapter: y = x Wᵀ + bias + scale · xa Bᵀ with xa = z Aᵀ.

LoRA: Hu et al. 2021, arXiv:2106.09685, scale = alpha / rank; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732,
scale = alpha / √rank. x: [..., in]; weight W: [out, in], frozen: it gets no gradient; bias: [out] or None; A: [rank,
in]; B: [out, rank]; one dtype. z is adapter_input, x after dropout, or x itself where that is None. Returns y: [...,
out] and xa: [..., rank], which backward reads.

An update smaller than half a unit in the last place of the base product is rounded away by eager PEFT. Here it is added
in float32 and the sum is rounded once: in half precision on a GPU by a product of our own (low_rank_product.py), since
cuBLAS keeps only a third of such an update even where it is the C of its epilogue; elsewhere as that C, D = x Wᵀ + C.
The gradient of x is made likewise.

The floor is that of the base products, 2 · tokens · in · out operations each for y and the gradient of x. On top comes
traffic: z is read for xa and for the gradient of A, dy for the gradient of B and of xa.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import thin_products
from .low_rank_product import low_rank_product
from .operator import operator
from .reasons import dtype_is

# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).contiguous()


def _rows(x: Tensor) -> Tensor:
    """One row per token: [tokens, features]."""
    return x.reshape(-1, x.shape[-1])


def _saved_input(x: Tensor | None, adapter_input: Tensor | None) -> Tensor:
    """z, for which backward is given the one or the other."""
    z = x if adapter_input is None else adapter_input
    assert z is not None
    return z


def _reference(
    x: Tensor, adapter_input: Tensor | None, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    z = x if adapter_input is None else adapter_input
    xa = _rounded(_wide(z) @ _wide(A).T, x)
    y = _wide(x) @ _wide(weight).T + scale * (_wide(xa) @ _wide(B).T)
    if bias is not None:
        y = y + _wide(bias)
    return _rounded(y, x), xa


def _reference_backward(
    grad: Tensor,
    x: Tensor | None,
    adapter_input: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    xa: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    dy, z = _wide(grad), _wide(_saved_input(x, adapter_input))
    dxa = scale * (dy @ _wide(B))
    update = dxa @ _wide(A) if adapter_input is None else 0
    return (
        _rounded(dy @ _wide(weight) + update, grad) if needs[0] else None,
        _rounded(dxa @ _wide(A), grad) if needs[1] else None,
        _rounded(_rows(dy).sum(0), grad) if needs[2] else None,
        _rounded(_rows(dxa).T @ _rows(z), grad) if needs[3] else None,
        _rounded(scale * (_rows(dy).T @ _rows(_wide(xa))), grad) if needs[4] else None,
    )


# -- shapes: a model has hundreds of these, and tracing the products themselves takes seconds --------------------------


def _fake(x: Tensor, adapter_input: Tensor | None, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty((*x.shape[:-1], matrix.shape[0])) for matrix in (weight, A))


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    adapter_input: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    xa: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    inputs = (*grad.shape[:-1], weight.shape[1])
    shapes = (inputs, inputs, weight.shape[:1], A.shape, B.shape)
    return tuple(grad.new_empty(shape) if need else None for shape, need in zip(shapes, needs, strict=True))


# -- matrix products ---------------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale · a b. With beta = 0 nothing of the new tensor is read; the epilogue scales before it rounds."""
    if scale == 1:
        return torch.mm(a, b)
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def _product_plus(a: Tensor, b: Tensor, p: Tensor, q: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """a b + scale · p q + bias, rounded once."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and a.shape[1] and p.shape[1]:
        return low_rank_product(a, b, p if scale == 1 else p * scale, q, bias)
    y = _product(p, q, scale).addmm_(a, b)
    if bias is not None:
        # Not in the first product, where it would cost nothing: beside a large bias (keys of Qwen 2) the update would
        # be rounded away for every token alike. Beside x Wᵀ, which differs by token, its mean survives the rounding.
        y += bias
    return y


def of_each(thin: Tensor, Bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of xa or dxa that belong to each layer of several that share an input."""
    return thin.split_with_sizes([B.shape[1] for B in Bs], -1)


def up_gradients(
    dys: Sequence[Tensor], xa: Tensor, Bs: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """dxa, [M, ranks], and the dBᵢ of gradients [M, outᵢ]: by one reading of each where that is supported."""
    dy = dys[0]
    if dy.is_cuda and dy.shape[0] and thin_products.unsupported(dy, *(B.shape[1] for B in Bs)) is None:
        return thin_products.up_products(dys, xa, Bs, scales)
    dxa = xa.new_empty(xa.shape)
    for dy, B, scale, own in zip(dys, Bs, scales, of_each(dxa, Bs), strict=True):
        own.addmm_(dy, B, beta=0, alpha=scale)
    return dxa, [_product(dy.T, own, s) for dy, own, s in zip(dys, of_each(xa, Bs), scales, strict=True)]


def a_gradient(dxa: Tensor, x: Tensor) -> Tensor:
    """dA = dxaᵀ x of [M, ranks] and [M, in]: a library's product is slow where the ranks are many, ours elsewhere."""
    if dxa.shape[1] > thin_products.WIDEST and x.is_cuda and x.shape[0] and thin_products.unsupported(x) is None:
        return thin_products.down_product(dxa, x)
    return _product(dxa.T, x)


def _forward(
    x: Tensor, adapter_input: Tensor | None, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    z = x if adapter_input is None else adapter_input
    xa = _product(_rows(z), A.T)
    y = _product_plus(_rows(x), weight.T, xa, B.T, scale, bias)
    return y.view(*x.shape[:-1], weight.shape[0]), xa.view(*x.shape[:-1], A.shape[0])


def _backward(
    grad: Tensor,
    x: Tensor | None,
    adapter_input: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    xa: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_z, need_bias, need_a, need_b = needs
    dy, z, shared = _rows(grad), _saved_input(x, adapter_input), adapter_input is None
    dx = dz = da = db = None
    if need_a or need_z or (need_x and shared):
        if need_b:
            dxa, (db,) = up_gradients([dy], _rows(xa), [B], [scale])
        else:
            dxa = _product(dy, B, scale)
        if need_a:
            da = a_gradient(dxa, _rows(z))
        if need_z:
            dz = _product(dxa, A).view(z.shape)
        if need_x and shared:
            dx = _product_plus(dy, weight, dxa, A).view(z.shape)
    if need_x and not shared:
        dx = _product(dy, weight).view(z.shape)
    if need_b and db is None:
        db = _product(dy.T, _rows(xa), scale)
    return dx, dz, dy.sum(0) if need_bias else None, da, db


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(
    x: Tensor, adapter_input: Tensor | None, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> str | None:
    if reason := dtype_is(x, torch.bfloat16, torch.float16, torch.float32):
        return reason
    others = {"the adapter's input": adapter_input, "the weight": weight, "the bias": bias, "A": A, "B": B}
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            return f"{name} is {other.dtype} and x is {x.dtype}"
    if bias is not None and bias.dim() != 1:
        return f"the bias has {bias.dim()} dimensions"
    if adapter_input is not None and not _same_shape(adapter_input, x):
        return (
            f"x {tuple(x.shape)} and the adapter's input {tuple(adapter_input.shape)} are not known to be of one shape"
        )
    return None


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def _operations(x: Tensor, *matrices: Tensor) -> Any:
    """Of the products of x's tokens with each of the matrices."""
    return 2 * math.prod(x.shape[:-1]) * sum(m.numel() for m in matrices)


lora_linear = operator(
    "lora_linear(Tensor x, Tensor? adapter_input, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scale)"
    " -> (Tensor y, Tensor xa)",
    reference=_reference,
    reference_backward=_reference_backward,
    forward=_forward,
    backward=_backward,
    saves="x adapter_input weight A B xa",
    saves_instead={"adapter_input": "x"},
    differentiable="x adapter_input bias A B",
    gradients_of="y",
    rows="x adapter_input y xa",
    supports=_supports,
    flops=lambda x, z, weight, bias, A, B, scale: _operations(x, weight, A, B),
    # A and B have two products each: one for what they read, one for themselves.
    backward_flops=lambda x, z, weight, bias, A, B, scale: _operations(_saved_input(x, z), weight, A, A, B, B),
    fake=_fake,
    fake_backward=_fake_backward,
    devices=("cuda", "cpu"),
)
