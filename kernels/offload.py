"""Values that wait in host memory: ``offload`` copies one there, ``fetch`` brings it back.

Both are functional. ``host = offload(x)`` is a pinned copy of x on the CPU; ``x = fetch(after, host, ahead)`` is a copy
of host on after's device. ``after`` is not read: it says which operator has to be done before, so that no scheduler
moves the fetch to the front, where all of memory would be needed at once. ``ahead`` is what will be fetched next: its
copy is started too, and the next fetch finds it under way.

Copies run on two streams of their own, one for each direction, beside the arithmetic. Nothing waits on the host:
* x is held until the next value leaves, and its memory given back when its copy is done. (``record_stream`` would let
  the host, which is far ahead, find none of that memory free: at 32k tokens it reserved 34 GiB where 14 are used.);
* a fetch starts when what after's stream has launched so far is done, because its memory may have been in use before,
  and whoever reads the result waits for an event.
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


def _fetch_reference(after: Tensor, host: Tensor, ahead: Tensor | None) -> Tensor:
    return torch.empty_like(host, device=after.device).copy_(host)


def _offload_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


def _fetch_fake(after: Tensor, host: Tensor, ahead: Tensor | None) -> Tensor:
    return torch.empty_like(host, device=after.device)


# -- beside the arithmetic ---------------------------------------------------------------------------------------------


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """To the host, and from it."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@dataclass(eq=False)
class _UnderWay:
    """A copy to the device that was started before anyone asked for it."""

    host: Tensor
    x: Tensor
    done: torch.cuda.Event


_ahead: dict[torch.device, _UnderWay] = {}
"""At most one for each device. It holds its host tensor, so that no other one can be taken for it."""

_leaving: dict[torch.device, tuple[Tensor, torch.cuda.Event]] = {}
"""The value that left last, and when its copy is done."""


def forget() -> None:
    """Drop copies that nobody asked for: of a backward pass that was left in the middle."""
    _ahead.clear()
    for device in list(_leaving):
        _release(device)


def _release(device: torch.device) -> None:
    if (last := _leaving.pop(device, None)) is not None:
        torch.cuda.current_stream(device).wait_event(last[1])


def _offload(x: Tensor) -> Tensor:
    global _launched
    _launched += 1
    _release(x.device)
    host = pinned.empty_like(x)
    out, back = _streams(x.device)
    out.wait_stream(torch.cuda.current_stream(x.device))
    out.wait_stream(back)  # which may still be reading what waited in this memory before
    with torch.cuda.stream(out):
        host.copy_(x, non_blocking=True)
        done = torch.cuda.Event()
        done.record(out)
    _leaving[x.device] = x, done
    return host


def _fetch(after: Tensor, host: Tensor, ahead: Tensor | None) -> Tensor:
    device = after.device
    _release(device)
    found = _ahead.pop(device, None)
    if found is None or found.host is not host:
        found = _start(host, device)
    if ahead is not None:
        _ahead[device] = _start(ahead, device)
    torch.cuda.current_stream(device).wait_event(found.done)
    return found.x


def _start(host: Tensor, device: torch.device) -> _UnderWay:
    x = torch.empty_like(host, device=device)
    out, back = _streams(device)
    back.wait_stream(out)  # the copy to the host may still be under way
    back.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(back):
        x.copy_(host, non_blocking=True)
        done = torch.cuda.Event()
        done.record(back)
    return _UnderWay(host, x, done)


# -- the operators -----------------------------------------------------------------------------------------------------


def _always(*_: Any) -> None:
    return None


offload = operator(
    "offload(Tensor x) -> (Tensor host)",
    reference=_offload_reference,
    forward=_offload,
    fake=_offload_fake,
    supports=_always,
    flops=lambda x: 0,
)

fetch = operator(
    "fetch(Tensor after, Tensor host, Tensor? ahead) -> (Tensor x)",
    reference=_fetch_reference,
    forward=_fetch,
    fake=_fetch_fake,
    supports=_always,
    flops=lambda *_: 0,
)
