"""Where a step's time goes on the device, and what it could not go below.

A profile is split into matrix products, attention, the rest, and idle time between kernels. The floor is what the
model's base products and its attention take alone, back to back, on the same card in the same process. Loaded by its
path into every system's process, so it needs PyTorch only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

KINDS = {
    "attention": re.compile(r"sdpa|flash|fmha|attn|attention", re.IGNORECASE),
    "products": re.compile(r"gemm|nvjet|cutlass|xmma|_descriptor_kernel|_pointer_kernel|grouped", re.IGNORECASE),
}
"""What kernels are called that compute it; the first that fits counts. All else is the rest."""


PAUSES = 12
"""How many of the busiest stream's longest pauses are listed."""


class Kernel(NamedTuple):
    """One run of a kernel, copy or fill; microseconds."""

    name: str
    start: float
    end: float
    stream: int = 0


def split(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds by kind, of idle time and of the whole span, and the number of kernels.

    Where kernels run side by side, each counts for its kind with its whole time, and the time counts once as busy.
    """
    kernels = sorted(kernels, key=lambda k: k.start)
    total = dict.fromkeys((*KINDS, "rest"), 0.0)
    idle, end = 0.0, kernels[0].start if kernels else 0.0
    for kernel in kernels:
        kind = next((name for name, words in KINDS.items() if words.search(kernel.name)), "rest")
        total[kind] += kernel.end - kernel.start
        idle += max(0.0, kernel.start - end)
        end = max(end, kernel.end)
    span = end - kernels[0].start if kernels else 0.0
    times = {**total, "idle": idle, "span": span}
    return {**{f"{name}_ms": time / 1e3 for name, time in times.items()}, "kernels": len(kernels)}


def listed(kernels: Iterable[Kernel]) -> str:
    """The kernels by name, those that took longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(kernel.end - kernel.start)
    rows = sorted(times.items(), key=lambda item: -sum(item[1]))
    lines = [f"{sum(t) / 1e3:>10.3f}{len(t):>8}{sum(t) / len(t):>10.1f}  {name[:140]}" for name, t in rows]
    return "\n".join([f"{'ms':>10}{'calls':>8}{'µs each':>10}  kernel", *lines])


def streams(kernels: Iterable[Kernel]) -> str:
    """What each stream did, and how much of it while the busiest one did nothing: where arithmetic waits for copies.

    Returns:
        a line for each stream, the busiest first, and one for each of its longest pauses.
    """
    by_stream: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda k: k.start):
        by_stream[kernel.stream].append(kernel)
    busy = {stream: sum(k.end - k.start for k in found) for stream, found in by_stream.items()}
    order = sorted(by_stream, key=lambda stream: -busy[stream])
    if not order:
        return "nothing ran on the device"
    begin = min(found[0].start for found in by_stream.values())
    pauses: list[tuple[float, float, str, str]] = []
    end, before = begin, "the beginning"
    for kernel in by_stream[order[0]]:
        if kernel.start > end:
            pauses.append((end, kernel.start, before, kernel.name))
        if kernel.end >= end:
            end, before = kernel.end, kernel.name
    idle = sum(b - a for a, b, *_ in pauses)
    lines = [
        f"stream {order[0]}: busy {busy[order[0]] / 1e3:.1f} of {(end - begin) / 1e3:.1f} ms, idle {idle / 1e3:.1f}"
    ]
    for stream in order[1:]:
        found = by_stream[stream]
        beside = sum(max(0.0, min(b, k.end) - max(a, k.start)) for a, b, *_ in pauses for k in found)
        span = f"from {(found[0].start - begin) / 1e3:.1f} to {(max(k.end for k in found) - begin) / 1e3:.1f}"
        lines.append(
            f"stream {stream}: busy {busy[stream] / 1e3:.1f} ms {span}, {beside / 1e3:.1f} in pauses of the first; "
            f"{found[0].name[:60]}"
        )
    for a, b, last, following in sorted(pauses, key=lambda p: p[0] - p[1])[:PAUSES]:
        told = f"after {last[:50]}, before {following[:50]}"
        lines.append(f"  pause {(b - a) / 1e3:9.2f} ms at {(a - begin) / 1e3:9.1f}, {told}")
    return "\n".join(lines)


def profiled(step: Callable[[], Any]) -> list[Kernel]:
    """What runs on the device during one step, behind another one that nobody waited for."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        step()
        torch.cuda.synchronize()
    found = [
        Kernel(e.name, e.time_range.start, e.time_range.end, e.device_resource_id)
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    found.sort(key=lambda k: k.start)
    return found[len(found) // 2 :]


def floor(model: nn.Module, batch: int, seq: int, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of the model's base products, forward and backward, and of its attention; bfloat16, on CUDA.

    A weight that is not trained needs no gradient: two products instead of three. Only linear layers count, not the
    experts of a mixture. Attention is PyTorch's fastest causal one at that length (cuDNN's where there is one).
    """
    rows, shapes = batch * seq, defaultdict(int)
    for name, module in model.named_modules():
        out, into = getattr(module, "out_features", None), getattr(module, "in_features", None)
        weight = getattr(module, "weight", None)
        if isinstance(out, int) and isinstance(into, int) and "lora_" not in name and weight is not None:
            shapes[out, into, weight.requires_grad] += not hasattr(module, "base_layer")
    pieces = {
        shape: [_bf16(rows, shape[1]), _bf16(rows, shape[0]), _bf16(*shape[:2])] for shape, n in shapes.items() if n
    }

    def products() -> None:
        for shape, (x, dy, weight) in pieces.items():
            for _ in range(shapes[shape]):
                x @ weight.T
                dy @ weight
                if shape[2]:
                    dy.T @ x

    config: Any = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    q, k, v = (
        _bf16(batch, seq, n, width).transpose(1, 2).requires_grad_()
        for n in (heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    grad = torch.randn_like(q)

    def attention() -> None:
        for _ in range(config.num_hidden_layers):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(grad)

    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return {"products_ms": _time(products, repeats), "attention_ms": _time(attention, repeats)}


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _time(run: Callable[[], None], repeats: int) -> float:
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats
