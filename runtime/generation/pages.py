"""Pages of keys and values: who holds which, and the tensors themselves.

A sequence holds as many pages as its longest continuation can need from the moment it is admitted, so that none is ever
put back to wait; pages that are full of a prompt are held by all sequences that continue it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 32
"""Tokens of a page: rows of one head side by side, 8 KB of them at 128 channels in bfloat16."""
TRASH = 0
"""The page into which goes what nobody will read: padding, and rows that stand for no sequence."""


class NoSpaceError(RuntimeError):
    """The device has no room for the keys and values of a single sequence."""


class Book:
    """Which pages are free, and how many hold each of the others."""

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, TRASH, -1))
        self._holders: dict[int, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """As many pages, each with one holder."""
        if count > self.free:
            raise NoSpaceError(f"{count} pages are wanted and {self.free} are free")
        taken = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One holder more for each."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; what nobody holds is free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free.append(page)


class Shape(NamedTuple):
    """Of a layer's keys and values."""

    heads: int
    width: int
    channels: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.width + self.channels) * self.dtype.itemsize


@dataclass
class Pages:
    """Keys [layers, pages, heads, page, width] and values of the layers that have one shape."""

    keys: Tensor
    values: Tensor
    layers: list[int]


class Pools:
    """The pages of all layers."""

    def __init__(self, shapes: Mapping[int, Shape], pages: int, device: torch.device) -> None:
        """Allocate.

        Args:
            shapes: by the layer's number, as its attention module gives it to the cache.
            pages: how many, :data:`TRASH` included.
        """
        self.pages = pages
        self.groups: list[Pages] = []
        self._place: dict[int, tuple[Pages, int]] = {}
        for shape in dict.fromkeys(shapes.values()):
            layers = sorted(layer for layer, of in shapes.items() if of == shape)
            keys, values = (
                torch.zeros(len(layers), pages, shape.heads, PAGE, width, dtype=shape.dtype, device=device)
                for width in (shape.width, shape.channels)
            )
            self.groups.append(group := Pages(keys, values, layers))
            self._place.update((layer, (group, index)) for index, layer in enumerate(layers))

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [pages, heads, page, width] each."""
        group, index = self._place[layer]
        return group.keys[index], group.values[index]

    def write(self, layer: int, k: Tensor, v: Tensor, page: Tensor, offset: Tensor) -> None:
        """Put tokens where they belong.

        Args:
            k, v: [batch, heads, length, width].
            page, offset: int64 [batch * length].
        """
        for pool, x in zip(self.of(layer), (k, v), strict=True):
            pool[page, :, offset] = x.transpose(1, 2).flatten(0, 1).to(pool.dtype)

    def write_all(self, fresh: Mapping[int, tuple[Tensor, Tensor]], page: Tensor, offset: Tensor) -> None:
        """Put one token of each row, [batch, heads, 1, width], of every layer where it belongs."""
        for group in self.groups:
            k, v = (torch.stack([fresh[layer][i].squeeze(2) for layer in group.layers], dim=1) for i in range(2))
            group.keys[:, page, :, offset] = k.to(group.keys.dtype)
            group.values[:, page, :, offset] = v.to(group.values.dtype)

    def release(self) -> None:
        """Give the memory back now, whoever still refers to the tensors: a compiler that has traced them may."""
        for group in self.groups:
            for pool in (group.keys, group.values):
                pool.untyped_storage().resize_(0)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages, of every layer."""
        if sources:
            for group in self.groups:
                source, target = (torch.tensor(pages, device=group.keys.device) for pages in (sources, targets))
                group.keys[:, target] = group.keys[:, source]
                group.values[:, target] = group.values[:, source]


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def free_bytes(device: torch.device) -> int | None:
    """What a device has free, cached by PyTorch's allocator included; None where that is not known."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def affordable(shapes: Mapping[int, Shape], wanted: int, largest: int, available: int | None, requested: int) -> int:
    """How many pages to allocate.

    Args:
        wanted: pages with which every sequence runs at once.
        largest: pages of the largest sequence, alone.
        available: bytes that pages may take; None for as many as wanted.
        requested: sequences, for the message.

    Raises:
        NoSpaceError: when the largest sequence does not fit, saying how much it needs and what there is.
    """
    if available is None:
        return wanted + 1
    per_page = PAGE * sum(shape.bytes_per_token for shape in shapes.values())
    affordable = available // per_page - 1
    if affordable < largest:
        need, have = largest * per_page / 2**30, max(available, 0) / 2**30
        fits = max(affordable, 0) * PAGE
        raise NoSpaceError(
            f"no space for keys and values: a sequence of {largest * PAGE} tokens needs {need:.2f} GiB and {have:.2f} "
            f"GiB are available, so 0 of {requested} sequences fit at a time (one of {fits} tokens would); ask for "
            "fewer new tokens, or leave more of the device's memory free"
        )
    return min(wanted, affordable) + 1
