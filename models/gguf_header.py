"""The header of a GGUF file, in milliseconds: settings and where each tensor lies, without the lists of the vocabulary.

``gguf.GGUFReader`` makes an array of every token and every merge, which takes seconds. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONG = 1024
"""Arrays with more items than that are lists of the vocabulary."""


class Info(NamedTuple):
    """One tensor: its shape in PyTorch's order, GGML's number of its type, and where its bytes begin in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What stands before the weights.

    Attributes:
        settings: scalars and texts by key; of an array its length.
        tensors: by name.
        short: the file's header again, without tensors and long arrays: a GGUF file of its own, for libraries that
            make a configuration of it.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Info]
    short: bytes


def read_header(path: Path) -> Header:
    """Read it.

    Raises:
        ValueError: when the file is no GGUF file, or is cut off.
        OSError: when it cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read(data, path)
        except struct.error:
            raise ValueError(f"{path} is cut off in its header") from None


def _read(data: mmap.mmap, path: Path) -> Header:
    magic, version, tensors, count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"{path} is no GGUF file of version 2 or 3")
    position, settings, kept = 24, {}, []
    for _ in range(count):
        start = position
        key, position = _text(data, position)
        (kind,) = struct.unpack_from("<I", data, position)
        value, position = _value(data, position + 4, kind)
        settings[key] = value
        if kind != _ARRAY or value <= _LONG:
            kept.append(data[start:position])
    found = {}
    for _ in range(tensors):
        name, position = _text(data, position)
        (dims,) = struct.unpack_from("<I", data, position)
        *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", data, position + 4)
        position += 4 + 8 * dims + 12
        found[name] = Info(tuple(reversed(shape)), kind, offset)
    alignment = settings.get("general.alignment", 32)
    begin = -(-position // alignment) * alignment
    short = struct.pack("<4sIQQ", magic, version, 0, len(kept)) + b"".join(kept)
    return Header(settings, {name: i._replace(offset=begin + i.offset) for name, i in found.items()}, short)


def _text(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    return data[position + 8 : end].decode("utf-8", "replace"), end


def _value(data: mmap.mmap, position: int, kind: int) -> tuple[Any, int]:
    """(the value, or an array's length; where the next one begins)."""
    if kind == _STRING:
        return _text(data, position)
    if kind != _ARRAY:
        form = _SCALARS.get(kind)
        if form is None:
            raise ValueError(f"GGUF has no type {kind}")
        return struct.unpack_from(form, data, position)[0], position + struct.calcsize(form)
    inner, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if inner in _SCALARS:
        return length, position + length * struct.calcsize(_SCALARS[inner])
    size = struct.Struct("<Q")
    for _ in range(length):
        if inner == _STRING:
            position += 8 + size.unpack_from(data, position)[0]
        else:
            _, position = _value(data, position, inner)
    return length, position
