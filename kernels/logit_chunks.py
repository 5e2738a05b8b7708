"""A head's logits, a chunk of rows at a time: what the losses that never hold all of them share.

    logits = softcap(scale · (hidden Wᵀ + bias)),   softcap(x) = c · tanh(x / c), or x where c is 0

A chunk is multiplied, reduced to a loss and an entropy per row, and *overwritten by its own gradient*, from which the
gradients of hidden and W follow before the next chunk takes its place (chunks after Cut Your Losses, Wijmans et al.
2024, arXiv:2411.09009, and Liger Kernel, Hsu et al. 2024, arXiv:2410.10989; the cap is Gemma 2's, arXiv:2408.00118).

With logits x, p = softmax(x), log p = x - logsumexp(x) and H = -Σ p log p, per row:

    ∂(-log p[label]) / ∂x = p - onehot(label)          ∂H / ∂x = -p (log p + H)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .cross_entropy_triton import BLOCK, WARPS, cross_entropy_kernel
from .reasons import dtype_is

CHUNK_BYTES = 256 << 20
"""Of logits at a time: 1024 rows of 128256 in bf16, enough for a matrix product to run at full speed."""
MIN_ROWS = 128
"""Fewer rows at a time read all of W from memory for too little arithmetic."""
ALIGNMENT = 64
"""Rows of a chunk start at multiples of so many elements: fast loads, whatever the vocabulary."""


class Implementation(NamedTuple):
    """How a device computes on a chunk.

    Attributes:
        reduce: called as :func:`reduce_reference` is.
        add_product: ``(total, a, b)``: adds a @ b to a float32 matrix, with products of rounded numbers summed in
            float32.
    """

    reduce: Callable[..., None]
    add_product: Callable[[Tensor, Tensor, Tensor], None]


def chunk_rows(rows: int, vocabulary: int, itemsize: int, summed: int = 0) -> int:
    """Rows per chunk: equal chunks within CHUNK_BYTES, two at least, so that the logits are never whole.

    Args:
        summed: columns of the head's weight, where its gradient is summed in float32 chunk by chunk. Each chunk reads
            and writes that sum, so a chunk has as many rows: the logits then take half of what the sum takes, or less.
    """
    limit = max(MIN_ROWS, CHUNK_BYTES // (vocabulary * itemsize), summed)
    return math.ceil(rows / max(2, math.ceil(rows / limit)))


def padded_width(vocabulary: int) -> int:
    """Elements from one row of a chunk to the next."""
    return ALIGNMENT * math.ceil(vocabulary / ALIGNMENT)


def logits_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, summed: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """hidden Wᵀ + bias in chunks of rows, each in the memory of the one before it.

    Args:
        hidden: [rows, width].
        weight, bias: [vocabulary, width] and [vocabulary] or None.
        summed: whether each chunk adds to a float32 gradient of weight.

    Yields:
        the rows, and their logits [chunk, vocabulary] in hidden's dtype, whose rows start at multiples of ALIGNMENT.
    """
    (rows, _), vocabulary = hidden.shape, weight.shape[0]
    step = chunk_rows(rows, vocabulary, hidden.element_size(), weight.shape[1] if summed else 0)
    # Zeros, because oneDNN multiplies what lies between the rows of a bfloat16 matrix by zero, and NaN stays NaN.
    buffer = hidden.new_zeros(step, padded_width(vocabulary))[:, :vocabulary]
    for start in range(0, rows, max(step, 1)):
        chunk = slice(start, min(start + step, rows))
        logits = buffer[: chunk.stop - start]
        if bias is None:
            torch.mm(hidden[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[chunk], weight.t(), out=logits)
        yield chunk, logits


# -- plain torch -------------------------------------------------------------------------------------------------------


def reduce_reference(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    entropies: Tensor | None,
    top1s: Tensor | None,
    loss_unit: Tensor | None,
    entropy_unit: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    """Losses and statistics of a chunk, which is overwritten by its gradient where ``loss_unit`` is given.

    Args:
        logits: [rows, vocabulary], neither scaled nor capped.
        labels: int64 [rows].
        losses: float32 [rows], written: -log p[label], 0 where the label is ``ignore_index``.
        entropies, top1s: float32 and int64 [rows], written, of every row; or None, both.
        loss_unit, entropy_unit: float32, one for all rows or [rows]: the gradient is that of
            Σ loss_unit · losses + entropy_unit · entropies. ``entropy_unit`` may be None, and asks for ``entropies``.
    """
    x = logits.float() * scale
    tanh = torch.tanh(x / softcap) if softcap else None
    if tanh is not None:
        x = softcap * tanh
    log_p = torch.log_softmax(x, dim=-1)
    valid = labels != ignore_index
    label = labels.masked_fill(~valid, 0).unsqueeze(-1)
    losses.copy_(torch.where(valid, -log_p.gather(-1, label).squeeze(-1), 0.0))
    p = log_p.exp()
    entropy = torch.special.entr(p).sum(-1)
    if entropies is not None and top1s is not None:
        entropies.copy_(entropy)
        top1s.copy_(x.argmax(-1))
    if loss_unit is None:
        return
    slope = p.scatter_add(-1, label, torch.full_like(label, -1.0, dtype=p.dtype))
    slope = torch.where(valid.unsqueeze(-1), slope * loss_unit.reshape(-1, 1), 0.0)
    if entropy_unit is not None:
        # entr(p) is -p log p, and 0 where p is: log p may be infinite there
        slope += (torch.special.entr(p) - p * entropy.unsqueeze(-1)) * entropy_unit.reshape(-1, 1)
    if tanh is not None:
        slope *= 1 - tanh * tanh
    logits.copy_(slope * scale)


def add_product_reference(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a.to(total.dtype), b.to(total.dtype))


REFERENCE = Implementation(reduce_reference, add_product_reference)


# -- CUDA --------------------------------------------------------------------------------------------------------------


def _reduce(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    entropies: Tensor | None,
    top1s: Tensor | None,
    loss_unit: Tensor | None,
    entropy_unit: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    launch: Any = cross_entropy_kernel[(logits.shape[0],)]
    launch(
        logits,
        labels,
        losses,
        entropies,
        top1s,
        loss_unit,
        entropy_unit,
        logits.shape[1],
        logits.stride(0),
        ignore_index,
        scale,
        softcap,
        CAPPED=softcap > 0,
        STATISTICS=entropies is not None,
        GRADIENT=loss_unit is not None,
        UNIT_PER_ROW=loss_unit is not None and loss_unit.dim() > 0,
        ENTROPY_GRADIENT=entropy_unit is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype != total.dtype and a.is_cuda:  # only there are products of rounded numbers added to float32 in place
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        add_product_reference(total, a, b)


KERNEL = Implementation(_reduce, _add_product)


# -- the contract ------------------------------------------------------------------------------------------------------


def supports(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *_: Any) -> str | None:
    """None, or why a head and its loss cannot be computed in chunks."""
    if reason := dtype_is(hidden, torch.bfloat16, torch.float16, torch.float32):
        return reason
    if hidden.dim() == 0 or weight.dim() != 2 or not statically_known_true(hidden.shape[-1] == weight.shape[1]):
        return f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not known to fit"
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            return f"hidden is {hidden.dtype} and {name} is {x.dtype}"
    return dtype_is(labels, torch.int64)


def check_wanted(name: str, wants: list[bool], needs: list[bool]) -> None:
    """Raise RuntimeError where backward is asked for a gradient that forward was told nobody wants."""
    for of, want, need in zip(("hidden", "weight", "bias"), wants, needs, strict=True):
        if need and not want:
            raise RuntimeError(f"{name}: the gradient of {of} is needed, but forward was told that it is not wanted")
