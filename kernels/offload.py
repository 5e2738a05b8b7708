"""Values that wait in host memory: ``offload`` copies one there, ``fetch`` brings it back.

``host = offload(x)`` is a pinned copy of x on the CPU. The copy runs beside the arithmetic: x has to be left alone
until ``host = settle(after, host, x)``, which waits for it. ``x = fetch(after, host, coming)`` is a copy of host on
after's device; ``coming = prefetch(after, host)`` starts that copy ahead of its use, and fetch only waits for it.
``after`` is not read: it says which operator has to be done before, so that no scheduler moves a copy or its end to the
front.

Copies run on two streams of their own, one for each direction. Nothing waits on the host:
* settle reads x, so that whoever lays out memory keeps it until then and overwrites it no sooner; by when that should
  be, without anyone waiting, is for the planner (passes/memory/transfers.py). (``record_stream`` would let the host,
  which is far ahead, find none of that memory free: at 32k tokens it reserved 34 GiB where 14 are used.)
* a copy to the device starts when what after's stream has launched so far is done, because its memory may have been in
  use before, and whoever reads the result waits for an event.
Host memory is page-locked, in the first step only, and in the sizes that are asked for (:mod:`.pinned`).

Bytes over the link: those of x, either way; 55 GB/s on an H100 (PCIe 5), so 32 MiB take 0.6 ms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import pinned
from .operator import operator

_launched = 0


def launched() -> int:
    """How many copies to the host were started in this process: such steps cannot be recorded as a CUDA graph."""
    return _launched


# -- reference ---------------------------------------------------------------------------------------------------------


def _offload_reference(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu").copy_(x)


def _settle_reference(after: Tensor, host: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(host).copy_(host)


def _prefetch_reference(after: Tensor, host: Tensor) -> Tensor:
    return torch.empty(0, device=after.device)


def _fetch_reference(after: Tensor, host: Tensor, coming: Tensor | None) -> Tensor:
    return torch.empty_like(host, device=after.device).copy_(host)


def _offload_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


def _settle_fake(after: Tensor, host: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(host)


def _fetch_fake(after: Tensor, host: Tensor, coming: Tensor | None) -> Tensor:
    return torch.empty_like(host, device=after.device)


# -- beside the arithmetic ---------------------------------------------------------------------------------------------


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """To the host, and from it."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@dataclass(eq=False)
class _Coming:
    """A copy to the device that was started before anyone asked for it."""

    host: Tensor
    x: Tensor
    done: torch.cuda.Event


_coming: dict[int, _Coming] = {}
"""By the address of its host tensor, which it holds, so that no other value can wait there meanwhile."""

_leaving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
"""By the address of a host tensor what is copied there, and when that is done."""


def forget() -> None:
    """Drop copies that nobody asked for: of a pass that was left in the middle."""
    _coming.clear()
    for x, done in _leaving.values():
        torch.cuda.current_stream(x.device).wait_event(done)
    _leaving.clear()


def _offload(x: Tensor) -> Tensor:
    global _launched
    _launched += 1
    host = pinned.empty_like(x)
    out, back = _streams(x.device)
    out.wait_stream(torch.cuda.current_stream(x.device))
    out.wait_stream(back)  # which may still be reading what waited in this memory before
    with torch.cuda.stream(out):
        host.copy_(x, non_blocking=True)
        done = torch.cuda.Event()
        done.record(out)
    _leaving[host.data_ptr()] = x, done
    return host


def _settle(after: Tensor, host: Tensor, x: Tensor) -> Tensor:
    """The same host tensor: it is nobody else's, because a graph has no other use for what offload returns."""
    if (found := _leaving.pop(host.data_ptr(), None)) is not None:
        torch.cuda.current_stream(x.device).wait_event(found[1])
    return host


def _prefetch(after: Tensor, host: Tensor) -> Tensor:
    _coming[host.data_ptr()] = _start(host, after.device)
    return torch.empty(0, device=after.device)


def _fetch(after: Tensor, host: Tensor, coming: Tensor | None) -> Tensor:
    device = after.device
    found = _coming.pop(host.data_ptr(), None)
    if found is None or found.host.dtype != host.dtype or found.host.shape != host.shape:
        found = _start(host, device)
    torch.cuda.current_stream(device).wait_event(found.done)
    return found.x


def _start(host: Tensor, device: torch.device) -> _Coming:
    x = torch.empty_like(host, device=device)
    _, back = _streams(device)
    back.wait_stream(torch.cuda.current_stream(device))
    if (leaving := _leaving.get(host.data_ptr())) is not None:
        back.wait_event(leaving[1])  # nobody has waited for it
    with torch.cuda.stream(back):
        x.copy_(host, non_blocking=True)
        done = torch.cuda.Event()
        done.record(back)
    return _Coming(host, x, done)


# -- the operators -----------------------------------------------------------------------------------------------------


def _always(*_: Any) -> None:
    return None


offload = operator(
    "offload(Tensor x) -> (Tensor host)",
    reference=_offload_reference,
    forward=_offload,
    fake=_offload_fake,
    supports=_always,
    flops=lambda *_: 0,
)

settle = operator(
    "settle(Tensor after, Tensor host, Tensor x) -> (Tensor settled)",
    reference=_settle_reference,
    forward=_settle,
    fake=_settle_fake,
    supports=_always,
    flops=lambda *_: 0,
)

prefetch = operator(
    "prefetch(Tensor after, Tensor host) -> (Tensor coming)",
    reference=_prefetch_reference,
    forward=_prefetch,
    fake=_prefetch_reference,
    supports=_always,
    flops=lambda *_: 0,
)

fetch = operator(
    "fetch(Tensor after, Tensor host, Tensor? coming) -> (Tensor x)",
    reference=_fetch_reference,
    forward=_fetch,
    fake=_fetch_fake,
    supports=_always,
    flops=lambda *_: 0,
)
