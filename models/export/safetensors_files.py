"""Weights as safetensors files, written tensor by tensor: the memory that it takes is that of the largest one.

The format is eight bytes with the length of a header, the header (JSON: dtype, shape and place of every tensor), and
their bytes: https://huggingface.co/docs/safetensors. Places are known from shapes before anything is computed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .merged import Weight

INDEX = "model.safetensors.index.json"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(folder: Path, weights: Sequence[Weight], *, max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """Write ``model.safetensors``, or, when they are more than ``max_shard_bytes``, several files and their index.

    A tensor that is larger than that has a file of its own.

    Returns:
        the names of the files with weights.
    """
    shards = list(_shards(weights, max_shard_bytes))
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        places = {weight.name: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        index = {"metadata": {"total_size": sum(weight.bytes for weight in weights)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard)
    return names


def _shards(weights: Iterable[Weight], limit: int) -> Iterable[list[Weight]]:
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        if shard and size + weight.bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += weight.bytes
    yield shard


def _write(path: Path, weights: Sequence[Weight]) -> None:
    # Wider elements first, so that each begins at a multiple of its size.
    weights = sorted(weights, key=lambda weight: -weight.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + weight.bytes
        header[weight.name] = {
            "dtype": _DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight in weights:
            tensor = weight.value()
            if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
                raise RuntimeError(f"{weight.name} became {tensor.dtype} {tuple(tensor.shape)}, not as announced")
            tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)
