"""Scaled dot-product attention, out = softmax(q kT * scale [+ causal mask]) v, by the fastest library there is.

Vaswani et al. 2017, arXiv:1706.03762; never storing the scores: Dao 2023, arXiv:2307.08691; grouped keys and values:
Ainslie et al. 2023, arXiv:2305.13245. q: [batch, heads, queries, width]; k, v: [batch, kv_heads, keys, width], where
query head h reads kv head h // (heads / kv_heads); causal: query i sees keys j <= i; window: it sees keys j > i -
window, with causal the last `window` of them, its own included (Beltagy et al. 2020, arXiv:2004.05150; counted as in
Mistral), and None: from the first. Returns out, like q, and lse, the logarithm of the softmax's denominator: [batch,
heads, queries], natural, of the scaled scores, float32 (float64 in float64).

This is no kernel of ours: `choose_backend` picks a library's, by measurement. One H100, bf16, causal, width 128, 32/8
heads, 2 x 2048, forward and backward of 32 layers: cuDNN 20.9 ms, FlashAttention-2 (PyTorch's default) 37.7 ms. The
floor is 14 * batch * heads * queries * keys * width operations, half of them when causal, at about 800 TFLOP/s. A
window goes to FlashAttention-2, which skips the blocks outside it; cuDNN's operator in PyTorch has no argument for one.

v's heads may be of another size than those of q and k (DeepSeek-V2, arXiv:2405.04434); out's are v's. The calls
themselves and their layouts: :mod:`attention_libraries`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import attention_libraries as libraries
from .attention_libraries import choose_backend, hiding, length_major_copy
from .operator import operator
from .reasons import dtype_is

# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """k or v with one head per query head."""
    return _wide(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def sum_groups(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of :func:`per_query_head`."""
    return grad.unflatten(1, (x.shape[1], grad.shape[1] // x.shape[1])).sum(2)


def visible_keys(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """[queries, keys]: which keys a query sees; None where it sees all."""
    if not causal and window is None:
        return None
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    visible = visible.tril() if causal else visible
    return visible if window is None else visible.triu(1 - window)


def _scores(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    scores = _wide(q) @ per_query_head(k, q).transpose(-1, -2) * scale
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    return length_major_copy(x.to(like.dtype))


def formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse written out, for keys that are visible by a mask that broadcasts to [batch, heads, queries, keys]."""
    scores = _scores(q, k, visible, scale)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.softmax(scores, dim=-1) @ per_query_head(v, q)
    return _rounded(out, q), lse.clone(memory_format=torch.contiguous_format)


def formula_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible: Tensor | None,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v written out; see :func:`formula`."""
    probabilities = torch.exp(_scores(q, k, visible, scale) - lse.unsqueeze(-1))
    return gradients(grad, q, k, v, out, probabilities, scale, needs)[:3]


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    probabilities: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The gradients of q, k and v, and of what is added to the scaled scores, from the probabilities."""
    grad_, out_ = _wide(grad), _wide(out)
    grad_probabilities = grad_ @ per_query_head(v, q).transpose(-1, -2)
    # The softmax's gradient needs sum_j p_ij dp_ij, which is the product of out and its gradient: no second pass.
    of_scores = probabilities * (grad_probabilities - (grad_ * out_).sum(-1, keepdim=True))
    of_products = of_scores * scale
    return (
        _rounded(of_products @ per_query_head(k, q), q) if needs[0] else None,
        _rounded(sum_groups(of_products.transpose(-1, -2) @ _wide(q), k), k) if needs[1] else None,
        _rounded(sum_groups(probabilities.transpose(-1, -2) @ grad_, v), v) if needs[2] else None,
        of_scores,
    )


def shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """out and lse of :func:`formula`, empty. Arithmetic asks whether there are scores: a guard on symbolic sizes."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _length_major_empty(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


def gradient_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """What :func:`gradients` makes of q, k and v, empty; ``rest`` ends in whether each is needed."""
    wanted = zip((q, k, v), rest[-1][:3], strict=True)
    return tuple(_length_major_empty(x, x.shape[3]) if needed else None for x, needed in wanted)


def _length_major_empty(x: Tensor, width: int | torch.SymInt) -> Tensor:
    """As :func:`length_major_copy` lays x out, in one step: a transposed one would be asked for its memory format."""
    batch, heads, length = x.shape[:3]
    strides = (length * heads * width, width, heads * width, 1)
    return torch.empty_strided((batch, heads, length, width), strides, dtype=x.dtype, device=x.device)


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """The operator in plain torch."""
    return formula(q, k, v, visible_keys(q, k, causal, window), scale)


def reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The operator's backward in plain torch."""
    return formula_backward(grad, q, k, v, out, lse, visible_keys(q, k, causal, window), scale, needs)


# -- by a library ------------------------------------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """The operator by the library that :func:`~.attention_libraries.choose_backend` picks."""
    backend, window = choose_backend(q, k, v, causal, window), hiding(window, q)
    if backend == "explicit":
        return reference(q, k, v, causal, scale, window)
    return libraries.forward(backend, q, k, v, causal, scale, window, _mask(backend, q, k, window))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The operator's backward by the same library."""
    backend, window = choose_backend(q, k, v, causal, window), hiding(window, q)
    if backend == "explicit":
        return reference_backward(grad, q, k, v, out, lse, causal, scale, window, needs)
    mask = _mask(backend, q, k, window)
    return libraries.backward(backend, grad, q, k, v, out, lse, causal, scale, window, mask, needs)


def _mask(backend: libraries.Backend, q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """The window as a tensor, for the library that takes no number."""
    if backend != "cpu" or window is None:
        return None
    visible = visible_keys(q, k, True, window)
    assert visible is not None
    return libraries.additive(visible, q)


# -- the operator ------------------------------------------------------------------------------------------------------


def supports(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> str | None:
    """None, or why no library takes this attention."""
    if any(x.dim() != 4 for x in (q, k, v)):
        return "q, k and v have to be [batch, heads, length, width]"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    return shape_problem(q, k, v, causal) or _window_problem(q, causal, window) or library_problem(q, v)


def _window_problem(q: Tensor, causal: bool, window: int | None) -> str | None:
    if window is None:
        return None
    if not causal:
        return f"window {window} without causal: no kernel"
    if window < 1:
        return f"window {window} hides every key"
    if q.device.type == "cuda" and not libraries.flash_takes_windows():
        return f"window {window}: FlashAttention-2 of this PyTorch takes none"
    return None


def shape_problem(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
    if not all(statically_known_true(x.shape[0] == q.shape[0]) for x in (k, v)):
        return "q, k and v are not known to have one batch size"
    if not statically_known_true(k.shape[3] == q.shape[3]):
        return f"head sizes differ: q {q.shape[3]}, k {k.shape[3]}"
    if not all(statically_known_true(v.shape[i] == k.shape[i]) for i in (1, 2)):
        return f"k {tuple(k.shape)} and v {tuple(v.shape)} differ"
    if not statically_known_true(q.shape[1] % k.shape[1] == 0):
        return f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads"
    if causal and not statically_known_true(q.shape[2] == k.shape[2]):
        return f"causal with {q.shape[2]} queries and {k.shape[2]} keys: the libraries align the diagonal differently"
    return None


def library_problem(q: Tensor, v: Tensor) -> str | None:
    if not statically_known_true(v.shape[3] == q.shape[3]) and not all(isinstance(x.shape[3], int) for x in (q, v)):
        return f"head sizes differ, and are symbolic: q {q.shape[3]}, v {v.shape[3]}"
    if q.device.type == "cuda":
        return libraries.dtype_or_width_problem(q, v) or libraries.device_problem(q, v)
    if q.device.type == "cpu":
        return dtype_is(q, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return f"no library of ours runs on {q.device.type}"


def operations(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Any:
    """Operations of forward's two products with the matrix of scores; those that the mask hides are not computed."""
    return _doubled_scores(q, k, causal, window) * (q.shape[3] + v.shape[3])


def backward_operations(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Any:
    """Of backward's five: it repeats the scores, and makes the gradients of p, v, q and k."""
    return _doubled_scores(q, k, causal, window) * (3 * q.shape[3] + 2 * v.shape[3])


def _doubled_scores(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Any:
    batch, heads, queries, _ = q.shape
    # Twice the visible scores: causal hides one triangle above the diagonal, a window another one, out of its reach.
    doubled = queries * k.shape[2] * (1 if causal else 2)
    if window is not None:
        out_of_reach = queries - torch.sym_min(window, queries)
        doubled -= out_of_reach * out_of_reach
    return batch * heads * doubled


attention = operator(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, int? window) -> (Tensor out, Tensor lse)",
    reference=reference,
    reference_backward=reference_backward,
    fake=shapes,
    fake_backward=gradient_shapes,
    forward=forward,
    backward=backward,
    saves="q k v out lse",
    differentiable="q k v",
    gradients_of="out",
    supports=supports,
    flops=lambda q, k, v, causal, scale, window: operations(q, k, v, causal, window),
    backward_flops=lambda q, k, v, causal, scale, window: backward_operations(q, k, v, causal, window),
    devices=("cuda", "cpu"),
)
