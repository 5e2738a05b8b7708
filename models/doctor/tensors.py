"""Weights that are read one tensor at a time: of safetensors files, a GGUF file, or a model in memory.

Names differ from model to model; what rules ask for is found by what the names mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..gguf_header import Info, read_header

_EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|token_embd|embeddings)\.weight"
)
_HEAD = re.compile(r"(lm_head|.*\.lm_head|embed_out|output)\.weight")
_NORM = re.compile(r".*norm\w*\.weight|.*\.ln_\w+\.weight")
_PARTS_OF_OTHERS = re.compile(r".*(visual|vision|audio|image|position|lora_|original_module).*")


@dataclass
class Entry:
    """One tensor: its shape, and how to read it as it is held (GGUF's blocks as float32)."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass
class Tensors:
    """Weights by name; nothing is read before it is asked for.

    Attributes:
        entries: of every tensor.
        live: they are those of a model in memory, where a tied head appears under both of its names.
    """

    entries: Mapping[str, Entry]
    live: bool = False
    _norms: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def find(self, expression: re.Pattern[str], dim: int) -> str | None:
        """The first tensor of a kind that belongs to the language model."""
        return next(
            (
                name
                for name, entry in self.entries.items()
                if expression.fullmatch(name) and len(entry.shape) == dim and not _PARTS_OF_OTHERS.fullmatch(name)
            ),
            None,
        )

    @cached_property
    def embedding(self) -> str | None:
        """Name of the token embedding."""
        return self.find(_EMBEDDING, 2)

    @cached_property
    def head(self) -> str | None:
        """Name of the head's weight, where the checkpoint holds one."""
        return self.find(_HEAD, 2)

    @cached_property
    def norms(self) -> list[str]:
        """Names of the normalisations' weights."""
        return [name for name, entry in self.entries.items() if _NORM.fullmatch(name) and len(entry.shape) == 1]

    def read(self, name: str) -> Tensor:
        return self.entries[name].load().detach()

    def row_norms(self, name: str) -> Tensor:
        """L2 norm of every row of a matrix, float32 [rows]; read once."""
        if name not in self._norms:
            rows = self.read(name)
            parts = [torch.linalg.vector_norm(part.float(), dim=1) for part in rows.split(4096)]
            self._norms[name] = torch.cat(parts).cpu()
        return self._norms[name]


def of_folder(folder: Path) -> Tensors:
    """Those of ``model.safetensors``, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    files = {folder / "model.safetensors"}
    if index.is_file():
        files = {folder / shard for shard in json.loads(index.read_text())["weight_map"].values()}
    entries = {}
    for path in sorted(files):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                entries[name] = Entry(tuple(file.get_slice(name).get_shape()), lambda p=path, n=name: _read(p, n))
    return Tensors(entries)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def of_gguf(path: Path) -> Tensors:
    """Those of a GGUF file; its blocks are dequantised to float32 when a tensor is read."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    def load(info: Info) -> Tensor:
        kind = GGMLQuantizationType(info.kind)
        block, size = GGML_QUANT_SIZES[kind]
        width = info.shape[-1] // block * size
        held = np.fromfile(path, np.uint8, math.prod(info.shape[:-1]) * width, offset=info.offset)
        if kind in _PLAIN:
            return torch.from_numpy(held.view(_PLAIN[kind].newbyteorder("<"))).reshape(info.shape).float()
        return torch.from_numpy(dequantize(held.reshape(-1, width), kind)).reshape(info.shape)

    _PLAIN = {GGMLQuantizationType.F32: np.dtype("f4"), GGMLQuantizationType.F16: np.dtype("f2")}
    return Tensors({n: Entry(i.shape, lambda i=i: load(i)) for n, i in read_header(path).tensors.items()})


def of_model(model: nn.Module) -> Tensors:
    """Those of a model in memory. Packed ones (4 bits) stay out: they have no rows."""
    entries = {
        _plain(name): Entry(tuple(parameter.shape), lambda p=parameter: p)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }
    return Tensors(entries, live=True)


def _plain(name: str) -> str:
    """Without what PEFT puts around a layer."""
    return name.replace(".base_layer.", ".")
