"""Page-locked host memory in the sizes that are asked for, kept and handed out again.

PyTorch's allocator of pinned memory rounds up to powers of two: the residual of a layer of 8B at 350,000 tokens
(2.7 GiB) would take 4, and 31 of them all of a machine with 128. Here a buffer has the pages that it needs. It is
locked once and belongs to the process; it is free for the next value as soon as no tensor shows it any more. Where
lengths vary, buffers that are too small make room for larger ones, so that there are in the end as many as values wait
at one time, of the largest size.

Whoever copies on streams of his own sees to it that a buffer's last reader is done before it is written again.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

PAGE = 4096

_buffers: list[_Buffer] = []


class _Buffer:
    """Page-aligned bytes of host memory that the device knows.

    Attributes:
        size: bytes, whole pages.
        bytes: all of them, uint8.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        memory = torch.empty(size + PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE
        self.bytes = memory[start : start + size]
        del memory
        self.bytes[::PAGE].zero_()  # makes the pages, on all cores; the driver would, on one
        _lock(self.bytes)
        self._idle = self._holders()

    def _holders(self) -> int:
        """How many hold the storage; more than at the start where a tensor shows it."""
        return torch._C._storage_Use_Count(self.bytes.untyped_storage()._cdata)  # type: ignore[attr-defined]

    @property
    def is_free(self) -> bool:
        return self._holders() <= self._idle

    def release(self) -> None:
        """Let the device forget it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a copy from it may be under way
            _runtime().cudaHostUnregister(self.bytes.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()


def _lock(memory: Tensor) -> None:
    code = _runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.numel():,} bytes failed: {code}")


def whole_pages(size: int) -> int:
    """What so many bytes take."""
    return -(-size // PAGE) * PAGE


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised page-locked memory for a copy of x, of its shape, dtype and (where it is dense) strides."""
    needed = whole_pages(max(1, x.numel() * x.element_size()))
    try:
        buffer = _free_one(needed)
    except (RuntimeError, AttributeError) as error:  # a system that does not lock what is there
        warnings.warn(f"unsloth: pinned memory is taken in powers of two: {error}", stacklevel=2)
        return torch.empty_like(x, device="cpu", pin_memory=torch.cuda.is_available())
    strides = torch.empty_like(x, device="meta").stride()
    return buffer.bytes[: x.numel() * x.element_size()].view(x.dtype).as_strided(x.shape, strides)


def _free_one(needed: int) -> _Buffer:
    free = [b for b in _buffers if b.is_free]
    if found := min((b for b in free if b.size >= needed), key=lambda b: b.size, default=None):
        return found
    if small := max(free, key=lambda b: b.size, default=None):
        small.release()
        _buffers.remove(small)
        del free, small  # its memory goes before there is more
    buffer = _Buffer(needed)
    _buffers.append(buffer)
    return buffer


def held() -> int:
    """Bytes of host memory that are locked."""
    return sum(b.size for b in _buffers)


def release_all() -> None:
    """Give back what no value waits in."""
    for buffer in [b for b in _buffers if b.is_free]:
        buffer.release()
        _buffers.remove(buffer)
