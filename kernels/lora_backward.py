"""Backward of adapted layers in pieces, for where backward as a whole would read or make something twice.

The layers are those of lora_linear.py and lora_linears.py, yᵢ = x Wᵢᵀ + scaleᵢ · xaᵢ Bᵢᵀ with xa = x Aᵀ. Backward has
two halves, which only the thin dxa connects: ``lora_up_backward`` is that of Bᵢ, which reads the dyᵢ, and
``lora_down_backward`` that of Wᵢ and A. Between the two, ``glu_lora_backward`` takes in the activation of a gated MLP
(Shazeer 2020, arXiv:2002.05202), h = act(gate) · up, where gate and up are made by adapted layers and h is read by one:

    dy, xa_down --up--> dxa_down --down--> dh --glu_lora--> dgate, dup, dxa, dA_down, dB --down--> dx, dA

so that h is not made again, and none of the MLP's widest matrices is read but once. And where a norm made x, dA can be
had from what it normalised. The memory floor puts these in backward graphs; they have no gradient of their own.

dy: [..., out]; x: [..., in]; W: [out, in]; A: [ranks, in]; B: [out, rank]; xa, dxa: [..., ranks]; one dtype. Results
are rounded once, as in the operators that these are pieces of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import thin_products
from .glu import (
    GELU,
    GELU_TANH,
    SILU,
    _geglu_reference,
    _geglu_reference_backward,
    _swiglu_reference,
    _swiglu_reference_backward,
    geglu,
    swiglu,
)
from .lora_linear import _operations, _product, _rounded, _rows, _wide, a_gradient, of_each, up_gradients
from .lora_linears import _sum_of_products
from .operator import Operator, operator

# -- through B ---------------------------------------------------------------------------------------------------------


def _up_arguments(
    count: int, args: Sequence[Any]
) -> tuple[Sequence[Tensor], Tensor, Sequence[Tensor], Sequence[float]]:
    """dys, xa, Bs, scales."""
    return args[:count], args[count], args[count + 1 : 2 * count + 1], args[2 * count + 1 :]


def _up_reference(count: int, args: Sequence[Any]) -> tuple[Tensor, ...]:
    dys, xa, Bs, scales = _up_arguments(count, args)
    dxa = torch.cat([s * (_wide(dy) @ _wide(B)) for s, dy, B in zip(scales, dys, Bs, strict=True)], -1)
    dBs = [
        s * (_rows(_wide(dy)).T @ _rows(_wide(own)))
        for s, dy, own in zip(scales, dys, of_each(xa, Bs), strict=True)
    ]  # fmt: skip
    return _rounded(dxa, xa), *(_rounded(dB, xa) for dB in dBs)


def _up_fake(count: int, args: Sequence[Any]) -> tuple[Tensor, ...]:
    _, xa, Bs, _ = _up_arguments(count, args)
    return xa.new_empty(xa.shape), *(B.new_empty(B.shape) for B in Bs)


def _up(count: int, args: Sequence[Any]) -> tuple[Tensor, ...]:
    dys, xa, Bs, scales = _up_arguments(count, args)
    dxa, dBs = up_gradients([_rows(dy) for dy in dys], _rows(xa), Bs, scales)
    return dxa.view(xa.shape), *dBs


def _up_supports(count: int, args: Sequence[Any]) -> str | None:
    dys, _, Bs, _ = _up_arguments(count, args)
    return thin_products.unsupported(dys[0], *(B.shape[1] for B in Bs))


# -- through W and A ---------------------------------------------------------------------------------------------------


def _down_arguments(count: int, args: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[Any, ...]]:
    """dys, weights, and A, dxa, x, rstd, norm_weight, norm_offset."""
    return args[:count], args[count : 2 * count], tuple(args[2 * count :])


def _input(x: Tensor, rstd: Tensor | None, weight: Tensor | None, offset: float) -> Tensor:
    """The layers' input in float32 (float64 in float64), of what its norm was given."""
    if rstd is None:
        return _wide(x)
    return _wide(x) * _wide(rstd)[..., None] * (offset if weight is None else _wide(weight) + offset)


def _down_reference(count: int, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    dys, weights, (A, dxa, x, rstd, weight, offset) = _down_arguments(count, args)
    dx = _wide(dxa) @ _wide(A)
    for dy, W in zip(dys, weights, strict=True):
        dx = dx + _wide(dy) @ _wide(W)
    if x is None:
        return _rounded(dx, A), A.new_empty(0)
    return _rounded(dx, A), _rounded(_rows(_wide(dxa)).T @ _rows(_input(x, rstd, weight, offset)), A)


def _down_fake(count: int, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    dys, _, (A, _, x, *_) = _down_arguments(count, args)
    return A.new_empty((*dys[0].shape[:-1], A.shape[1])), A.new_empty(0 if x is None else A.shape)


def _down(count: int, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    dys, weights, (A, dxa, x, rstd, weight, offset) = _down_arguments(count, args)
    thin = _rows(dxa)
    dx = _sum_of_products([_rows(dy) for dy in dys], weights, thin, A).view(*dys[0].shape[:-1], A.shape[1])
    if x is None:
        return dx, A.new_empty(0)
    if rstd is None:
        return dx, a_gradient(thin, _rows(x))
    if thin_products.unsupported(x) is None and thin.shape[0]:
        return dx, thin_products.down_product(thin, _rows(x), rstd.reshape(-1), weight, offset)
    return dx, _product(thin.T, _rounded(_rows(_input(x, rstd, weight, offset)), A))


# -- through the activation --------------------------------------------------------------------------------------------


def _glu_reference_all(
    dh: Tensor, gate: Tensor, up: Tensor, dxa_down: Tensor, xa: Tensor, B1: Tensor, B2: Tensor,
    scale1: float, scale2: float, act: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    both = [True, True]
    if act == SILU.value:
        h, (dgate, dup) = _swiglu_reference(gate, up), _swiglu_reference_backward(dh, gate, up, both)
    else:
        tanh = act == GELU_TANH.value
        h, (dgate, dup) = _geglu_reference(gate, up, tanh), _geglu_reference_backward(dh, gate, up, tanh, both)
    dA = _rounded(_rows(_wide(dxa_down)).T @ _rows(_wide(h)), gate)
    assert dgate is not None and dup is not None
    return dgate, dup, dA, *_up_reference(2, (dgate, dup, xa, B1, B2, scale1, scale2))


def _glu_fake(
    dh: Tensor, gate: Tensor, up: Tensor, dxa_down: Tensor, xa: Tensor, B1: Tensor, B2: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    shapes = (gate.shape, up.shape, (dxa_down.shape[-1], gate.shape[-1]), xa.shape, B1.shape, B2.shape)
    return tuple(gate.new_empty(shape) for shape in shapes)


def _glu(
    dh: Tensor, gate: Tensor, up: Tensor, dxa_down: Tensor, xa: Tensor, B1: Tensor, B2: Tensor,
    scale1: float, scale2: float, act: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = _rows(dh), _rows(gate), _rows(up)
    thin, thin_down, Bs, scales = _rows(xa), _rows(dxa_down), (B1, B2), (scale1, scale2)
    if _glu_supports(*wide, thin_down, thin, B1, B2) is None and thin.shape[0]:
        dgate, dup, dxa, dBs, dA = thin_products.glu_products(*wide, act, thin_down, thin, Bs, scales)
    else:
        kind, others = (swiglu, ()) if act == SILU.value else (geglu, (act == GELU_TANH.value,))
        dgate, dup = kind.overload_backward(*wide, *others, [True, True])
        dA = _product(thin_down.T, kind(*wide[1:], *others))
        dxa, dBs = up_gradients([dgate, dup], thin, Bs, scales)
    return dgate.view(gate.shape), dup.view(up.shape), dA, dxa.view(xa.shape), *dBs


def _glu_supports(dh: Tensor, gate: Tensor, up: Tensor, dxa_down: Tensor, xa: Tensor, *Bs: Any) -> str | None:
    return thin_products.unsupported(gate, dxa_down.shape[-1], *(B.shape[1] for B in Bs[:2]))


# -- the operators -----------------------------------------------------------------------------------------------------


def _declare(count: int) -> tuple[Operator, Operator]:
    def named(kind: str, name: str) -> str:
        return ", ".join(f"{kind} {name}{i}" for i in range(1, count + 1))

    up = operator(
        f"lora_up_backward_{count}({named('Tensor', 'dy')}, Tensor xa, {named('Tensor', 'B')},"
        f" {named('float', 'scale')}) -> (Tensor dxa, {named('Tensor', 'dB')})",
        reference=lambda *args: _up_reference(count, args),
        forward=lambda *args: _up(count, args),
        fake=lambda *args: _up_fake(count, args),
        rows=f"{' '.join(f'dy{i}' for i in range(1, count + 1))} xa dxa",
        supports=lambda *args: _up_supports(count, args),
        flops=lambda *args: (
            2 * sum(_operations(dy, B) for dy, B in zip(args[:count], args[count + 1 : 2 * count + 1], strict=True))
        ),
    )
    down = operator(
        f"lora_down_backward_{count}({named('Tensor', 'dy')}, {named('Tensor', 'weight')}, Tensor A, Tensor dxa,"
        " Tensor? x, Tensor? rstd, Tensor? norm_weight, float norm_offset) -> (Tensor dx, Tensor dA)",
        reference=lambda *args: _down_reference(count, args),
        forward=lambda *args: _down(count, args),
        fake=lambda *args: _down_fake(count, args),
        rows=f"{' '.join(f'dy{i}' for i in range(1, count + 1))} dxa x rstd dx",
        supports=lambda *args: None,
        flops=lambda *args: _operations(args[0], *args[count : 2 * count], args[2 * count], args[2 * count]),
    )
    return up, down


LORA_UP_BACKWARD: dict[int, Operator] = {}
LORA_DOWN_BACKWARD: dict[int, Operator] = {}
"""By the number of layers that share the input."""
for _count in (1, 2, 3):
    LORA_UP_BACKWARD[_count], LORA_DOWN_BACKWARD[_count] = _declare(_count)

glu_lora_backward = operator(
    "glu_lora_backward(Tensor dh, Tensor gate, Tensor up, Tensor dxa_down, Tensor xa, Tensor B1, Tensor B2,"
    " float scale1, float scale2, int act) -> (Tensor dgate, Tensor dup, Tensor dA_down, Tensor dxa, Tensor dB1,"
    " Tensor dB2)",
    reference=_glu_reference_all,
    forward=_glu,
    fake=_glu_fake,
    rows="dh gate up dxa_down xa dgate dup dxa",
    supports=_glu_supports,
    flops=lambda dh, gate, up, dxa_down, xa, B1, B2, *_: (
        18 * gate.numel() + _operations(xa, B1, B1, B2, B2) + 2 * math.prod(dxa_down.shape) * gate.shape[-1]
    ),
)
"""``act`` numbers the activation: 0 silu, 1 gelu by erf, 2 gelu by tanh."""
ACTIVATIONS = {
    (swiglu.name, ()): SILU.value,
    (geglu.name, (False,)): GELU.value,
    (geglu.name, (True,)): GELU_TANH.value,
}
