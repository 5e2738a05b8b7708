"""The loss of a language model, straight from its last hidden state, without its logits ever existing whole.

    logits = softcap(scale · (hidden Wᵀ + bias)),   softcap(x) = c · tanh(x / c), or x where c is 0
    loss   = Σ (logsumexp(logits[i]) - logits[i, label[i]]) over the rows with a label, divided by their number or not

For 4096 tokens and a vocabulary of 128256 the logits are 1 GB in bf16, and eager PyTorch holds three to four copies of
them, two in float32. Here a chunk of rows is multiplied, reduced and *overwritten by its own gradient*, from which the
gradients of hidden and W follow before the next chunk (chunks after Cut Your Losses, Wijmans et al. 2024,
arXiv:2411.09009, and Liger Kernel, Hsu et al. 2024, arXiv:2410.10989; the running maximum and sum after Milakov &
Gimelshein 2018, arXiv:1805.02867; the cap is Gemma 2's, arXiv:2408.00118). So the gradients are made in *forward*,
which is told which of them are wanted, and backward only rescales them: a frozen head costs two products, a trained
one three, and none is ever repeated.

Floors on an H100 at 4096 x 4096 x 128256 in bf16: 6.2 ms for each product at the 690 TFLOP/s that it reaches, plus one
sweep that reads the logits and one that reads and writes them, 3.2 GB or 1.1 ms, less what the second finds in the L2
cache: 13.5 ms with a frozen head. The float32 sum of a trained head's gradient is read and written once per chunk, at
most 5.6 ms for four. The workspace is CHUNK_BYTES, and 4 bytes per weight of a trained head.

Logits are rounded to hidden's dtype, as a model's are, and so is their gradient; all between is float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .logit_chunks import KERNEL, REFERENCE, Implementation, check_wanted, logits_in_chunks, supports
from .operator import operator

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# -- chunks of rows ----------------------------------------------------------------------------------------------------


def _in_chunks(
    implementation: Implementation,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    scale: float,
    softcap: float,
    statistics: bool,
    wants: list[bool],
) -> Outputs:
    """The operator, on top of what turns a chunk of logits into losses and into its gradient."""
    outputs = _empty(hidden, weight, bias, statistics, wants)
    _, _, entropy, top1, grad_hidden, grad_weight, grad_bias = outputs
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
    (rows, _), vocabulary = hidden.shape, weight.shape[0]
    if labels.numel() != rows:
        raise ValueError(f"linear_cross_entropy: {labels.numel()} labels for {rows} rows")

    count = (labels != ignore_index).sum().float()
    unit, weight_unit = _units(count)
    gradient_unit = unit / count if any(wants) else None
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    weight_sum = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants[1] else None
    bias_sum = (
        torch.zeros(vocabulary, dtype=torch.float32, device=weight.device) if wants[2] and bias is not None else None
    )
    entropies, top1s = entropy.view(-1), top1.view(-1)

    for chunk, logits in logits_in_chunks(hidden, weight, bias, summed=weight_sum is not None):
        statistic = (entropies[chunk], top1s[chunk]) if statistics else (None, None)
        settings = (gradient_unit, None, ignore_index, scale, softcap)
        implementation.reduce(logits, labels[chunk], losses[chunk], *statistic, *settings)
        if wants[0]:
            torch.mm(logits, weight, out=grad_hidden.view(rows, -1)[chunk])
        if weight_sum is not None:
            implementation.add_product(weight_sum, logits.t(), hidden[chunk])
        if bias_sum is not None:
            bias_sum += logits.sum(0, dtype=torch.float32)

    if weight_sum is not None:
        torch.div(weight_sum, weight_unit, out=grad_weight)
    if bias_sum is not None:
        torch.div(bias_sum, weight_unit, out=grad_bias)
    total = losses.sum()
    scales = torch.stack((1 / unit, weight_unit / unit)) * (1.0 if mean else count)
    return (total / count if mean else total, scales, *outputs[2:])


def _units(count: Tensor) -> tuple[Tensor, Tensor]:
    """What the gradients are stored in multiples of: hidden's, and the others', of the *mean* loss.

    Float16 could hold neither gradient of the mean (too small) nor W's of the sum (too large). And these units are
    powers of two: rescaling in backward is exact whenever the upstream gradient is a power of two as well.
    """
    exponent = torch.floor(torch.log2(count.clamp(min=1)))
    return torch.exp2(exponent), torch.exp2(torch.floor(exponent / 2))


def _empty(hidden: Tensor, weight: Tensor, bias: Tensor | None, statistics: bool, wants: list[bool]) -> Outputs:
    """All outputs, uninitialised; empty where they were not asked for."""
    rows = hidden.shape[:-1] if statistics else (0,)
    vocabulary = weight.shape[0]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(2, dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(hidden.shape if wants[0] else (0,)),
        weight.new_empty(weight.shape if wants[1] else (0,)),
        weight.new_empty(vocabulary if wants[2] and bias is not None else 0),
    )


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Outputs:
    statistics, wants = others[-2:]
    return _empty(hidden, weight, bias, statistics, wants)


# -- reference ---------------------------------------------------------------------------------------------------------


def _reference_backward(
    grad: Tensor,
    scales: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    ignore_index: int,
    mean: bool,
    scale: float,
    softcap: float,
    statistics: bool,
    wants: list[bool],
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    check_wanted("linear_cross_entropy", wants, needs)
    return tuple(
        (stored.float() * (grad * scales[unit])).to(stored.dtype) if need else None
        for stored, unit, need in zip((grad_hidden, grad_weight, grad_bias), (0, 1, 1), needs, strict=True)
    )


# -- CUDA --------------------------------------------------------------------------------------------------------------


def _backward(
    grad: Tensor,
    scales: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    ignore_index: int,
    mean: bool,
    scale: float,
    softcap: float,
    statistics: bool,
    wants: list[bool],
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    check_wanted("linear_cross_entropy", wants, needs)
    # A factor with a dimension makes PyTorch multiply in float32 (a scalar would be rounded to the gradient's dtype
    # first), and `out` rounds in the same launch.
    factors = (grad * scales).split(1)
    return tuple(
        torch.mul(stored, factors[unit], out=torch.empty_like(stored)) if need else None
        for stored, unit, need in zip((grad_hidden, grad_weight, grad_bias), (0, 1, 1), needs, strict=True)
    )


# -- the operator ------------------------------------------------------------------------------------------------------


def _flops(hidden: Tensor, weight: Tensor, *others: Any) -> Any:
    """One product for the logits, one for each of hidden's and weight's gradient."""
    wants = others[-1]
    return 2 * hidden.numel() * weight.shape[0] * (1 + wants[0] + wants[1])


linear_cross_entropy = operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, bool mean, "
    "float scale, float softcap, bool statistics, bool[] wants) -> (Tensor loss, Tensor scales, Tensor entropy, "
    "Tensor top1, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    reference=partial(_in_chunks, REFERENCE),
    reference_backward=_reference_backward,
    forward=partial(_in_chunks, KERNEL),
    backward=_backward,
    saves="scales grad_hidden grad_weight grad_bias",
    differentiable="hidden weight bias",
    gradients_of="loss",
    supports=supports,
    flops=_flops,
    backward_flops=lambda hidden, weight, *_: hidden.numel() + weight.numel(),
    fake=_fake,
)
"""Cross-entropy of the logits that a head makes of hidden states.

Args (dtypes float32, bfloat16 or float16, one for all three of hidden, weight and bias):
    hidden: [..., width].
    weight, bias: of the head, [vocabulary, width] and [vocabulary] or None.
    labels: int64, one per row of hidden, in any shape; ``ignore_index`` marks rows that do not count. Any other label
        outside of the vocabulary raises on the CPU and makes loss and gradients NaN on CUDA.
    mean: divide by the number of rows that count. If there are none, the loss is NaN, as PyTorch's, with gradients 0.
    scale, softcap: 1.0 and 0.0 for none.
    statistics: whether to return ``entropy`` and ``top1``, of every row.
    wants: which gradients to make in forward: hidden's, weight's, bias's. Backward raises RuntimeError if another one
        is needed.

Returns:
    loss: float32 scalar.
    scales: float32 [2]; what backward multiplies the stored gradients with.
    entropy: float32 [...], in nats; top1: int64 [...], the first largest logit. Both empty without ``statistics``.
    grad_hidden, grad_weight, grad_bias: in units of their own, see ``scales``; empty where not wanted.
"""
