"""Einstein sums that are matrix products, written as such: attention by ``einsum`` is the same formula as by ``@``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def as_product(equation: str, operands: Sequence[Tensor], *, path: Any = None) -> Any:
    """``einsum`` of two tensors that share one summed index and have one of their own each, as permute and matmul.

    Torch computes it so as well. Every other sum stays what it is: ellipses, diagonals, outer products, several summed
    indices, sizes that are broadcast.

    Args:
        equation: as ``torch.einsum`` takes it.
        operands: the tensors.
        path: the order of contractions, which two tensors have only one of.

    Returns:
        The result, or NotImplemented.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != 2 or len(operands) != 2 or not (inputs.replace(",", "") + output).isalpha():
        return NotImplemented
    left, right = letters
    if any(len(set(word)) != len(word) for word in (left, right, output)) or set(output) - set(left + right):
        return NotImplemented
    shared = [x for x in left if x in right]
    batch, summed = [x for x in shared if x in output], [x for x in shared if x not in output]
    rows, columns = [x for x in left if x not in right], [x for x in right if x not in left]
    if any(len(one) != 1 for one in (summed, rows, columns)) or set(output) != {*batch, *rows, *columns}:
        return NotImplemented
    a, b = operands
    if output.index(columns[0]) < output.index(rows[0]):  # the transposed product, laid out as torch lays it out
        left, right, a, b, rows, columns = right, left, b, a, columns, rows
    if not all(statically_known_true(a.shape[left.index(x)] == b.shape[right.index(x)]) for x in shared):
        return NotImplemented
    product = _ordered(a, left, [*batch, *rows, *summed]) @ _ordered(b, right, [*batch, *summed, *columns])
    return _ordered(product, [*batch, *rows, *columns], output)


def _ordered(tensor: Tensor, have: Sequence[str], want: Sequence[str]) -> Tensor:
    order = [have.index(x) for x in want]
    swapped = [i for i, j in enumerate(order) if i != j]
    if not swapped:
        return tensor
    if len(swapped) == 2:  # the field's spelling: q @ k.transpose(-1, -2)
        return tensor.transpose(*swapped)
    return tensor.permute(order)
