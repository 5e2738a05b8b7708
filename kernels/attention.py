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

What the libraries leave open is settled here, so that graphs, planner and backward see one contract: out and all
gradients lie in memory as [batch, length, heads, width], which makes the reshape around a projection free, and lse is
one tensor that either library's backward understands.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .operator import operator
from .reasons import dtype_is

aten = torch.ops.aten

Backend = Literal["cudnn", "flash", "cpu", "explicit"]

_forced: Backend | None = None


# -- reference ---------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """k or v with one head per query head."""
    return _wide(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _sum_groups(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `_per_query_head`."""
    return grad.unflatten(1, (x.shape[1], grad.shape[1] // x.shape[1])).sum(2)


def _visible(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor:
    """[queries, keys]: which keys a query sees."""
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    visible = visible.tril() if causal else visible
    return visible if window is None else visible.triu(1 - window)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    scores = _wide(q) @ _per_query_head(k, q).transpose(-1, -2) * scale
    if causal or window is not None:
        scores = scores.masked_fill(~_visible(q, k, causal, window), float("-inf"))
    return scores


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    return _length_major_copy(x.to(like.dtype))


def _reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scale, window)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.softmax(scores, dim=-1) @ _per_query_head(v, q)
    return _rounded(out, q), lse.clone(memory_format=torch.contiguous_format)


def _reference_backward(
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
    probabilities = torch.exp(_scores(q, k, causal, scale, window) - lse.unsqueeze(-1))
    grad_, out_ = _wide(grad), _wide(out)
    grad_probabilities = grad_ @ _per_query_head(v, q).transpose(-1, -2)
    # The softmax's gradient needs sum_j p_ij dp_ij, which is the product of out and its gradient: no second pass.
    grad_scores = probabilities * (grad_probabilities - (grad_ * out_).sum(-1, keepdim=True)) * scale
    return (
        _rounded(grad_scores @ _per_query_head(k, q), q) if needs[0] else None,
        _rounded(_sum_groups(grad_scores.transpose(-1, -2) @ _wide(q), k), k) if needs[1] else None,
        _rounded(_sum_groups(probabilities.transpose(-1, -2) @ grad_, v), v) if needs[2] else None,
    )


# -- which library -----------------------------------------------------------------------------------------------------


def choose_backend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None) -> Backend:
    """The implementation that forward and backward run for these (real) tensors.

    cuDNN where it is known to be right and fastest (Hopper and data-centre Blackwell), FlashAttention-2 on the other
    CUDA devices and for windows that hide something, PyTorch's flash kernel on the CPU, and the formula written out
    where none of them applies, which only a direct call of the operator meets: `supports` refuses those cases.
    """
    if _forced is not None:
        return _forced
    if q.numel() == 0 or k.numel() == 0 or q.shape[-1] != v.shape[-1] or (window is not None and not causal):
        return "explicit"
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or _device_problem(q) or _dtype_or_width_problem(q):
        return "explicit"
    if causal and q.shape[2] != k.shape[2]:
        return "explicit"  # FlashAttention-2 aligns the diagonal bottom right, cuDNN and PyTorch top left
    return "cudnn" if _hiding(window, q) is None and _cudnn_is_best(q, k) else "flash"


def _hiding(window: int | None, q: Tensor) -> int | None:
    """The window, or None where it reaches the first key from each of the (real) queries and so hides nothing."""
    return None if window is None or window >= q.shape[2] else window


@contextlib.contextmanager
def forced_backend(name: Backend | None) -> Iterator[None]:
    """Run one implementation in the whole process, autograd's threads included: for tests and measurements."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _cudnn_is_best(q: Tensor, k: Tensor) -> bool:
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    # Right for lengths that are no multiple of its tile only after 9.15 (pytorch#169849).
    tiled = queries % 128 == 0 and keys % 128 == 0
    return (
        _capability(q.device) in ((9, 0), (10, 0), (10, 3))
        and (_cudnn_version() > 91500 or (tiled and _cudnn_version() >= 90600))
        and width <= 128
        and queries > 1  # a single query or key is where its graphs are refused or were wrong
        and keys > 1
        and max(batch, heads) <= 65535
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()  # FlashAttention-2 has a deterministic backward
        # Experimental in PyTorch: stores lse in another layout than the one our contract states.
        and os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") != "1"
    )


def _dtype_or_width_problem(q: Tensor) -> str | None:
    """Why no CUDA library takes this dtype or head size, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA libraries compute in bfloat16 or float16, not in {str(q.dtype).removeprefix('torch.')}"
    width = q.shape[-1]
    if not isinstance(width, int):
        return "the head size is symbolic"
    if width % 8 or width > 256:
        return f"the head size is {width}, the CUDA libraries take multiples of 8 up to 256"
    return None


def _device_problem(q: Tensor) -> str | None:
    """Why no CUDA library of ours runs on this device, or None. Without a GPU (planning on fake tensors): None."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "only the NVIDIA libraries are known to meet the operator's contract"
    major, minor = _capability(q.device)
    if major < 8:
        return f"the device has compute capability {major}.{minor}, FlashAttention-2 needs 8.0"
    width = q.shape[-1]
    if ((major == 8 and minor >= 6) or major == 12) and isinstance(width, int) and 192 < width <= 224:
        return f"FlashAttention-2 has no backward for head size {width} on compute capability {major}.{minor}"
    return None


@functools.cache
def _flash_takes_windows() -> bool:
    """Whether this PyTorch's FlashAttention-2 operators have the arguments for a window."""
    schemas = [aten._flash_attention_forward.default._schema, aten._flash_attention_backward.default._schema]
    return all({"window_size_left", "window_size_right"} <= {a.name for a in s.arguments} for s in schemas)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


# -- calling it --------------------------------------------------------------------------------------------------------


def _length_major_copy(x: Tensor) -> Tensor:
    """A fresh tensor with x's values in [batch, length, heads, width] memory order."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _exactly_contiguous(x: Tensor) -> Tensor:
    """x contiguous, with a fresh tensor's strides also along dimensions of size one, where `contiguous` leaves any."""
    return x.contiguous().view(-1).view(x.shape)


def _length_major(x: Tensor) -> Tensor:
    """x with exactly the strides of `_length_major_copy`, copied only if it has others or lies unaligned."""
    if _unaligned(x):
        return _length_major_copy(x)
    return _exactly_contiguous(x.transpose(1, 2)).transpose(1, 2)


def _readable(x: Tensor) -> Tensor:
    """x where the libraries can read it in place (any strides around a dense last dimension), else a copy."""
    in_place = x.stride(-1) == 1 and 0 not in x.stride() and not _unaligned(x)
    if x.is_cuda:  # 128-bit loads at every row
        in_place = in_place and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if in_place else _length_major_copy(x)


def _unaligned(x: Tensor) -> bool:
    # cuDNN's plans are cached without the alignment of the pointers that they were built for.
    return x.is_cuda and x.data_ptr() % 16 != 0


def _additive(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Causal and the window as a mask [queries, keys] that is added to the scores, as the CPU kernel wants it."""
    return q.new_zeros(()).masked_fill(~_visible(q, k, True, window), float("-inf"))


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    backend = choose_backend(q, k, v, causal, window)
    window = _hiding(window, q)
    if backend == "explicit":
        return _reference(q, k, v, causal, scale, window)
    q, k, v = _readable(q), _readable(k), _readable(v)
    if backend == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    elif backend == "flash" and window is None:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    elif backend == "flash" and window is not None:
        out, lse, *_ = aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), None, None, q.shape[2], k.shape[2], 0.0, causal, False,
            scale=scale, window_size_left=window - 1, window_size_right=0,
        )  # fmt: skip
        out = out.transpose(1, 2)
    elif window is not None:
        mask = _additive(q, k, window)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    # cuDNN's lse is [batch, heads, queries, 1], the CPU's is transposed in memory.
    return _length_major(out), _exactly_contiguous(lse.reshape(q.shape[:3]))


def _backward(
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
    backend = choose_backend(q, k, v, causal, window)
    window = _hiding(window, q)
    if backend == "explicit":
        return _reference_backward(grad, q, k, v, out, lse, causal, scale, window, needs)
    q, k, v = _readable(q), _readable(k), _readable(v)
    # One layout for out and its gradient: cuDNN caches its plans by the layouts of q, k and v alone.
    grad, out, lse = _length_major(grad), _length_major(out), _exactly_contiguous(lse)
    # No packed sequences and no bias. Without dropout neither library reads the random state: any tensor will do, so
    # forward need not return one.
    lengths = (None, None, q.shape[2], k.shape[2])
    unused = torch.empty(1, dtype=torch.int64, device=q.device)
    if backend == "cudnn":
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, *lengths, 0.0, causal, scale=scale
        )
    elif backend == "flash" and window is None:
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, causal, unused, unused, scale=scale
        )
    elif backend == "flash" and window is not None:
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        grads = aten._flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, causal, unused, unused,
            scale=scale, window_size_left=window - 1, window_size_right=0,
        )  # fmt: skip
        grads = tuple(g.transpose(1, 2) for g in grads)
    elif window is not None:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=_additive(q, k, window), scale=scale
        )
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    return tuple(_length_major(g) if need else None for g, need in zip(grads, needs, strict=True))


# -- the operator ------------------------------------------------------------------------------------------------------


def _supports(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> str | None:
    if any(x.dim() != 4 for x in (q, k, v)):
        return "q, k and v have to be [batch, heads, length, width]"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    return _shape_problem(q, k, v, causal) or _window_problem(q, causal, window) or _library_problem(q)


def _window_problem(q: Tensor, causal: bool, window: int | None) -> str | None:
    if window is None:
        return None
    if not causal:
        return f"window {window} without causal: no kernel"
    if window < 1:
        return f"window {window} hides every key"
    if q.device.type == "cuda" and not _flash_takes_windows():
        return f"window {window}: FlashAttention-2 of this PyTorch takes none"
    return None


def _shape_problem(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
    if not all(statically_known_true(x.shape[0] == q.shape[0]) for x in (k, v)):
        return "q, k and v are not known to have one batch size"
    if not all(statically_known_true(x.shape[3] == q.shape[3]) for x in (k, v)):
        return f"head sizes differ: q {q.shape[3]}, k {k.shape[3]}, v {v.shape[3]}"
    if not all(statically_known_true(v.shape[i] == k.shape[i]) for i in (1, 2)):
        return f"k {tuple(k.shape)} and v {tuple(v.shape)} differ"
    if not statically_known_true(q.shape[1] % k.shape[1] == 0):
        return f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads"
    if causal and not statically_known_true(q.shape[2] == k.shape[2]):
        return f"causal with {q.shape[2]} queries and {k.shape[2]} keys: the libraries align the diagonal differently"
    return None


def _library_problem(q: Tensor) -> str | None:
    if q.device.type == "cuda":
        return _dtype_or_width_problem(q) or _device_problem(q)
    if q.device.type == "cpu":
        return dtype_is(q, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return f"no library of ours runs on {q.device.type}"


def _score_products(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Any:
    """Operations of one product with the matrix of scores; those that the mask hides are not computed."""
    batch, heads, queries, width = q.shape
    # Twice the visible scores: causal hides one triangle above the diagonal, a window another one, out of its reach.
    doubled = queries * k.shape[2] * (1 if causal else 2)
    if window is not None:
        out_of_reach = queries - torch.sym_min(window, queries)
        doubled -= out_of_reach * out_of_reach
    return batch * heads * doubled * width


attention = operator(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, int? window) -> (Tensor out, Tensor lse)",
    reference=_reference,
    reference_backward=_reference_backward,
    forward=_forward,
    backward=_backward,
    saves="q k v out lse",
    differentiable="q k v",
    gradients_of="out",
    supports=_supports,
    # Forward has two such products. Backward repeats the scores and makes the gradients of p, v, q and k.
    flops=lambda q, k, v, causal, scale, window: 2 * _score_products(q, k, causal, window),
    backward_flops=lambda q, k, v, causal, scale, window: 5 * _score_products(q, k, causal, window),
    devices=("cuda", "cpu"),
)
