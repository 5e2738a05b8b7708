"""The loss of every single token and the entropy of its prediction, without the logits ever existing whole.

    logits     = softcap(scale · (hidden Wᵀ + bias)),   softcap(x) = c · tanh(x / c), or x where c is 0
    losses[i]  = logsumexp(logits[i]) - logits[i, label[i]],   which is -log p(label[i])
    entropy[i] = -Σ p log p   of p = softmax(logits[i])

It is what policies are trained with (PPO, Schulman et al. 2017, arXiv:1707.06347; GRPO, Shao et al. 2024,
arXiv:2402.03300): log-probabilities of the tokens that were chosen, each with a gradient of its own. A temperature T,
logits / T, is scale / T and softcap / T: (c / T) tanh((s / T) x / (c / T)) = c tanh(s x / c) / T.

How much each token counts is only known in backward. But with a frozen head the gradient of a row of hidden is that
number times (p - onehot) W, which can be had while the row's logits are there: forward makes these *slopes*, keeps them
in hidden's place, and backward multiplies them. Two products, and none is ever repeated. A trained head, or an entropy
that has a gradient, wants the numbers first: forward makes one product, and backward repeats it, chunk by chunk, before
it makes the one or two for the gradients. Chunks and kernel are those of ``linear_cross_entropy``, which see.

Floors on an H100 at 20480 x 4096 x 128256 in bf16: 31 ms for each product at 690 TFLOP/s and 5.3 ms for the two sweeps
over each chunk of logits: 68 ms with a frozen head, 130 ms with a trained one. The workspace is CHUNK_BYTES, and 4
bytes per weight of a trained head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .logit_chunks import KERNEL, REFERENCE, Implementation, check_wanted, logits_in_chunks, supports
from .operator import operator

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _slopes_in_forward(trained_entropy: bool, wants: list[bool]) -> bool:
    """Whether hidden's gradient is a number per row times what forward can already make."""
    return list(wants) == [True, False, False] and not trained_entropy


def _forward(
    implementation: Implementation,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    statistics: bool,
    trained_entropy: bool,
    wants: list[bool],
) -> Outputs:
    outputs = _empty(hidden, weight, bias, labels, ignore_index, scale, softcap, statistics, trained_entropy, wants)
    losses, entropy, entropy_term, slopes = outputs
    rows, width = labels.numel(), hidden.shape[-1]
    hidden, labels = hidden.reshape(-1, width), labels.reshape(-1).contiguous()
    if hidden.shape[0] != rows:
        raise ValueError(f"token_cross_entropy: {rows} labels for {hidden.shape[0]} rows")
    wanted = entropy_term if trained_entropy else entropy if statistics else None
    top1 = hidden.new_empty(rows, dtype=torch.int64) if wanted is not None else None
    unit = hidden.new_ones((), dtype=torch.float32) if slopes.numel() else None
    for chunk, logits in logits_in_chunks(hidden, weight, bias):
        found = (None, None) if wanted is None or top1 is None else (wanted.view(-1)[chunk], top1[chunk])
        settings = (unit, None, ignore_index, scale, softcap)
        implementation.reduce(logits, labels[chunk], losses.view(-1)[chunk], *found, *settings)
        if unit is not None:
            torch.mm(logits, weight, out=slopes.view(rows, width)[chunk])
    return outputs


def _empty(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    statistics: bool,
    trained_entropy: bool,
    wants: list[bool],
) -> Outputs:
    """All outputs, uninitialised; empty where they were not asked for."""
    of_rows = hidden.shape[:-1]
    return (
        hidden.new_empty(labels.shape, dtype=torch.float32),
        hidden.new_empty(of_rows if statistics and not trained_entropy else (0,), dtype=torch.float32),
        hidden.new_empty(of_rows if trained_entropy else (0,), dtype=torch.float32),
        hidden.new_empty(hidden.shape if _slopes_in_forward(trained_entropy, wants) else (0,)),
    )


def _backward(
    implementation: Implementation,
    grad_losses: Tensor,
    grad_entropy_term: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    slopes: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    statistics: bool,
    trained_entropy: bool,
    wants: list[bool],
    needs: list[bool],
) -> Gradients:
    check_wanted("token_cross_entropy", wants, needs)
    if hidden is None:  # one wide multiplication, rounded once
        factors = grad_losses.reshape(slopes.shape[:-1]).unsqueeze(-1)
        return torch.mul(slopes, factors, out=torch.empty_like(slopes)) if needs[0] else None, None, None

    empty = _empty_gradients(hidden, weight, bias, needs)
    grad_hidden, grad_weight, grad_bias = empty
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
    rows = flat.shape[0]
    units = (grad_losses.reshape(-1), grad_entropy_term.reshape(-1) if trained_entropy else None)
    unit = _unit(*units)
    loss_unit, entropy_unit = (None if g is None else (g.float() / unit).contiguous() for g in units)

    def sums(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.new_zeros(gradient.shape, dtype=torch.float32)

    weight_sum, bias_sum = sums(grad_weight), sums(grad_bias)
    scratch = [flat.new_empty(rows, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.int64)]
    for chunk, logits in logits_in_chunks(flat, weight, bias):
        losses, *found = (x[chunk] for x in scratch)
        factors = tuple(None if g is None else g[chunk] for g in (loss_unit, entropy_unit))
        statistic = found if trained_entropy else (None, None)
        implementation.reduce(logits, labels[chunk], losses, *statistic, *factors, ignore_index, scale, softcap)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden.view(rows, -1)[chunk])
        if weight_sum is not None:
            implementation.add_product(weight_sum, logits.t(), flat[chunk])
        if bias_sum is not None:
            bias_sum += logits.sum(0, dtype=torch.float32)

    for gradient, total in ((grad_hidden, grad_hidden), (grad_weight, weight_sum), (grad_bias, bias_sum)):
        if gradient is not None and total is not None:
            torch.mul(total, unit.reshape(1), out=gradient)
    return empty


def _unit(*gradients: Tensor | None) -> Tensor:
    """A power of two near the largest number that a token counts: float16 could not hold the product with it.

    Multiplying by it afterwards is exact.
    """
    largest = torch.stack(
        [g.abs().amax().float() if g.numel() else g.new_zeros(()) for g in gradients if g is not None]
    )
    largest = largest.amax()
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, torch.exp2(torch.floor(torch.log2(largest))), 1.0)


def _empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> Gradients:
    return (
        hidden.new_empty(hidden.shape) if needs[0] else None,
        weight.new_empty(weight.shape) if needs[1] else None,
        bias.new_empty(bias.shape) if needs[2] and bias is not None else None,
    )


def _fake_backward(
    grad_losses: Tensor,
    grad_entropy_term: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    slopes: Tensor,
    *others: Any,
) -> Gradients:
    like = slopes if hidden is None else hidden
    return _empty_gradients(like, weight, bias, others[-1])


# -- the operator ------------------------------------------------------------------------------------------------------


def _flops(hidden: Tensor, weight: Tensor, *others: Any) -> Any:
    """One product for the logits, and one for the slopes."""
    trained_entropy, wants = others[-2:]
    return 2 * hidden.numel() * weight.shape[0] * (1 + _slopes_in_forward(trained_entropy, wants))


def _backward_flops(hidden: Tensor | None, weight: Tensor, bias: Tensor | None, labels: Tensor, *others: Any) -> Any:
    """A multiplication of the slopes; otherwise the logits again, and a product for each of the gradients."""
    wants = others[-1]
    if hidden is None or _slopes_in_forward(others[-2], wants):
        return labels.numel() * weight.shape[1]
    return 2 * hidden.numel() * weight.shape[0] * (1 + wants[0] + wants[1])


token_cross_entropy = operator(
    "token_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, float scale, "
    "float softcap, bool statistics, bool trained_entropy, bool[] wants) -> (Tensor losses, Tensor entropy, "
    "Tensor entropy_term, Tensor slopes)",
    reference=partial(_forward, REFERENCE),
    reference_backward=partial(_backward, REFERENCE),
    forward=partial(_forward, KERNEL),
    backward=partial(_backward, KERNEL),
    saves="hidden weight bias labels slopes",
    saves_instead={"slopes": "hidden"},
    differentiable="hidden weight bias",
    gradients_of="losses entropy_term",
    supports=supports,
    flops=_flops,
    backward_flops=_backward_flops,
    fake=_empty,
    fake_backward=_fake_backward,
    opaque_backward=True,
)
"""Cross-entropy of each token, from the logits that a head makes of hidden states.

Args (dtypes float32, bfloat16 or float16, one for all three of hidden, weight and bias):
    hidden: [..., width].
    weight, bias: of the head, [vocabulary, width] and [vocabulary] or None.
    labels: int64, one per row of hidden, in any shape; ``ignore_index`` marks rows whose loss is 0. Any other label
        outside of the vocabulary raises on the CPU and makes loss and gradients NaN on CUDA.
    scale, softcap: 1.0 and 0.0 for none.
    statistics: whether to return ``entropy``, of every row, those that are ignored included.
    trained_entropy: whether to return it as ``entropy_term`` instead, which has a gradient.
    wants: of which of hidden, weight and bias a gradient is wanted. Backward raises RuntimeError if another one is
        needed.

Returns:
    losses: float32, in the shape of labels, in nats.
    entropy, entropy_term: float32 [...], in nats; empty where not asked for. Only the latter has a gradient.
    slopes: what hidden's gradient is a multiple of, row by row; empty where forward cannot make it.
"""
