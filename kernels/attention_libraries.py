"""PyTorch's attention kernels behind one contract: which of them runs, in which layout, and the calls themselves.

What the libraries leave open is settled here, so that graphs, planner and backward see one contract: out and all
gradients lie in memory as [batch, length, heads, width], which makes the reshape around a projection free, and lse is
one tensor that either library's backward understands.

The libraries want heads of one size. Where those of v are narrower than those of q and k (multi-head latent attention,
arXiv:2405.04434), or wider, zeros make up for it, which is exact: a channel of zeros adds nothing to a score, and what
v has of it comes out as zero and is cut off again.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

aten = torch.ops.aten

Backend = Literal["cudnn", "flash", "cpu", "explicit"]

_forced: Backend | None = None


# -- which library -----------------------------------------------------------------------------------------------------


def choose_backend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None) -> Backend:
    """The implementation that forward and backward run for these (real) tensors.

    cuDNN where it is known to be right and fastest (Hopper and data-centre Blackwell), FlashAttention-2 on the other
    CUDA devices and for windows that hide something, PyTorch's flash kernel on the CPU, and the formula written out
    where none of them applies, which only a direct call of the operator meets: `supports` refuses those cases.
    """
    if _forced is not None:
        return _forced
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0 or (window is not None and not causal):
        return "explicit"
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or device_problem(q, v) or dtype_or_width_problem(q, v):
        return "explicit"
    if causal and q.shape[2] != k.shape[2]:
        return "explicit"  # FlashAttention-2 aligns the diagonal bottom right, cuDNN and PyTorch top left
    return "cudnn" if hiding(window, q) is None and cudnn_is_best(q, k, v) else "flash"


def hiding(window: int | None, q: Tensor) -> int | None:
    """The window, or None where it reaches the first key from each of the (real) queries and so hides nothing."""
    return None if window is None or window >= q.shape[2] else window


def common_width(q: Tensor, v: Tensor) -> int:
    """The head size that the libraries are given."""
    return max(q.shape[-1], v.shape[-1])


@contextlib.contextmanager
def forced_backend(name: Backend | None) -> Iterator[None]:
    """Run one implementation in the whole process, autograd's threads included: for tests and measurements."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def cudnn_is_best(q: Tensor, k: Tensor, v: Tensor) -> bool:
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    # Right for lengths that are no multiple of its tile only after 9.15 (pytorch#169849).
    tiled = queries % 128 == 0 and keys % 128 == 0
    return (
        _capability(q.device) in ((9, 0), (10, 0), (10, 3))
        and (_cudnn_version() > 91500 or (tiled and _cudnn_version() >= 90600))
        and common_width(q, v) <= 128
        and queries > 1  # a single query or key is where its graphs are refused or were wrong
        and keys > 1
        and max(batch, heads) <= 65535
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()  # FlashAttention-2 has a deterministic backward
        # Experimental in PyTorch: stores lse in another layout than the one our contract states.
        and os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") != "1"
    )


def dtype_or_width_problem(q: Tensor, v: Tensor) -> str | None:
    """Why no CUDA library takes this dtype or head size, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA libraries compute in bfloat16 or float16, not in {str(q.dtype).removeprefix('torch.')}"
    if not (isinstance(q.shape[-1], int) and isinstance(v.shape[-1], int)):
        return "the head size is symbolic"
    width = common_width(q, v)
    if width % 8 or width > 256:
        return f"the head size is {width}, the CUDA libraries take multiples of 8 up to 256"
    return None


def device_problem(q: Tensor, v: Tensor) -> str | None:
    """Why no CUDA library of ours runs on this device, or None. Without a GPU (planning on fake tensors): None."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "only the NVIDIA libraries are known to meet the operator's contract"
    major, minor = _capability(q.device)
    if major < 8:
        return f"the device has compute capability {major}.{minor}, FlashAttention-2 needs 8.0"
    width = common_width(q, v)
    if ((major == 8 and minor >= 6) or major == 12) and 192 < width <= 224:
        return f"FlashAttention-2 has no backward for head size {width} on compute capability {major}.{minor}"
    return None


def memory_efficient_problem(q: Tensor) -> str | None:
    """Why the memory-efficient kernel does not run on this device, or None. Without a GPU: None."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "only the NVIDIA libraries are known to meet the operator's contract"
    if q.dtype == torch.bfloat16 and (capability := _capability(q.device)) < (8, 0):
        return f"the device has compute capability {'.'.join(map(str, capability))}, bfloat16 needs 8.0"
    return None


@functools.cache
def flash_takes_windows() -> bool:
    """Whether this PyTorch's FlashAttention-2 operators have the arguments for a window."""
    schemas = [aten._flash_attention_forward.default._schema, aten._flash_attention_backward.default._schema]
    return all({"window_size_left", "window_size_right"} <= {a.name for a in s.arguments} for s in schemas)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


# -- layouts --------------------------------------------------------------------------------------------------------


def length_major_copy(x: Tensor) -> Tensor:
    """A fresh tensor with x's values in [batch, length, heads, width] memory order."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def exactly_contiguous(x: Tensor) -> Tensor:
    """x contiguous, with a fresh tensor's strides also along dimensions of size one, where `contiguous` leaves any."""
    stride = 1
    for size, given in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if given != stride:
            return x.contiguous().view(-1).view(x.shape)
        stride *= size
    return x


def length_major(x: Tensor) -> Tensor:
    """x with exactly the strides of `length_major_copy`, copied only if it has others or lies unaligned."""
    if _unaligned(x):
        return length_major_copy(x)
    _, heads, length, width = x.shape
    if x.stride() == (length * heads * width, width, heads * width, 1):
        return x
    return exactly_contiguous(x.transpose(1, 2)).transpose(1, 2)


def readable(x: Tensor) -> Tensor:
    """x where the libraries can read it in place (any strides around a dense last dimension), else a copy."""
    in_place = x.stride(-1) == 1 and 0 not in x.stride() and not _unaligned(x)
    if x.is_cuda:  # 128-bit loads at every row
        in_place = in_place and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if in_place else length_major_copy(x)


def _unaligned(x: Tensor) -> bool:
    # cuDNN's plans are cached without the alignment of the pointers that they were built for.
    return x.is_cuda and x.data_ptr() % 16 != 0


def widened(x: Tensor, width: int) -> Tensor:
    """x with zeros behind its channels, up to ``width`` of them."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def additive(visible: Tensor, q: Tensor) -> Tensor:
    """A boolean mask as one that is added to the scores, as the CPU kernel wants it."""
    return q.new_zeros(()).masked_fill(~visible, float("-inf"))


# -- calling them ------------------------------------------------------------------------------------------------------


def forward(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and lse, by a library.

    Args:
        window: only for "flash", and only with ``causal``.
        mask: only for "cpu", and then instead of ``causal``: added to the scores.
    """
    width, channels = common_width(q, v), v.shape[-1]
    q, k, v = (readable(widened(x, width)) for x in (q, k, v))
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
    else:
        causal = causal and mask is None
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # cuDNN's lse is [batch, heads, queries, 1], the CPU's is transposed in memory.
    return length_major(out[..., :channels]), exactly_contiguous(lse.reshape(q.shape[:3]))


def backward(
    backend: Backend,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    mask: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v; see :func:`forward`."""
    width, channels = common_width(q, v), (q.shape[-1], k.shape[-1], v.shape[-1])
    q, k, v = (readable(widened(x, width)) for x in (q, k, v))
    # One layout for out and its gradient: cuDNN caches its plans by the layouts of q, k and v alone.
    grad, out, lse = length_major(widened(grad, width)), length_major(widened(out, width)), exactly_contiguous(lse)
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
    else:
        causal = causal and mask is None
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    return tuple(
        length_major(g[..., :size]) if need else None for g, size, need in zip(grads, channels, needs, strict=True)
    )


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """out and lse of documents that lie one behind the other in the rows of a batch, by FlashAttention-2.

    Args:
        cu_seqlens: [documents + 1] int32: where each starts in the rows laid end to end, and where the last one ends.
        longest: tokens of the longest document.
    """
    (batch, heads, length, _), width, channels = q.shape, common_width(q, v), v.shape[-1]
    left, right = (None, None) if window is None else (window - 1, 0)
    out, lse, *_ = aten._flash_attention_forward(
        *(_end_to_end(widened(x, width)) for x in (q, k, v)), cu_seqlens, cu_seqlens, longest, longest, 0.0, causal,
        False, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    # Of packed sequences lse is [heads, tokens].
    return _in_rows(out, batch, channels), exactly_contiguous(lse.view(heads, batch, length).transpose(0, 1))


def packed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    window: int | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v; see :func:`packed_forward`."""
    (batch, heads, length, _), width = q.shape, common_width(q, v)
    channels = (q.shape[-1], k.shape[-1], v.shape[-1])
    left, right = (None, None) if window is None else (window - 1, 0)
    unused = torch.empty(1, dtype=torch.int64, device=q.device)
    grads = aten._flash_attention_backward(
        *(_end_to_end(widened(x, width)) for x in (grad, q, k, v, out)),
        lse.transpose(0, 1).reshape(heads, batch * length).contiguous(), cu_seqlens, cu_seqlens, longest, longest, 0.0,
        causal, unused, unused, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return tuple(
        _in_rows(g, batch, size) if need else None for g, size, need in zip(grads, channels, needs, strict=True)
    )


def _end_to_end(x: Tensor) -> Tensor:
    """[batch, heads, length, width] as [batch * length, heads, width], read in place where it lies so."""
    return readable(x).transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _in_rows(x: Tensor, batch: int, channels: int) -> Tensor:
    """The reverse of :func:`_end_to_end`, without the channels that were added."""
    return length_major(x.unflatten(0, (batch, -1)).transpose(1, 2)[..., :channels])
