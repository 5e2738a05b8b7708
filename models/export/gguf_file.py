"""A model as one GGUF file: settings, vocabulary and weights, written tensor by tensor.

f32, f16, bf16 and q8_0 (blocks of 32 numbers: an f16 scale and 8-bit codes). Vectors stay in float32, as llama.cpp
wants them. Smaller types need statistics of calibration data or llama.cpp's own search, and are made from such a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..source import ModelError
from .gguf_architectures import Architecture, architecture, changes, write_settings
from .gguf_vocabulary import write_vocabulary
from .merged import Merged, Weight

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""What can be written: of the weights, and of the file."""

ROWS = 8192
"""Rows that are converted at a time: an embedding in float32 would be gigabytes."""

_F32 = GGMLQuantizationType.F32


def check_type(name: str) -> str:
    """The name of a type in lower case.

    Raises:
        ModelError: for one that is not in :data:`TYPES`, saying how llama.cpp makes it.
    """
    known = name.lower()
    if known not in TYPES:
        raise ModelError(
            f"GGUF type {name!r} cannot be written here: {', '.join(TYPES)} can. The others are made by llama.cpp from "
            f"such a file: llama-quantize model.F16.gguf model.{name.upper()}.gguf {name.upper()}"
        )
    return known


def write_gguf(
    path: Path, model: Merged, tokenizer: PreTrainedTokenizerBase, kind: str, *, title: str = "model"
) -> None:
    """Write a model.

    Args:
        path: the file, which does not exist.
        model: its weights in float32 or 16 bits; those that the file holds in float32 are only rounded once if it is.
        kind: a key of :data:`TYPES`.
        title: the model's name in the file.

    Raises:
        ModelError: for an architecture, a setting or a tokenizer that the file cannot hold.
    """
    kind = check_type(kind)
    wanted, file_type = TYPES[kind]
    config: Any = model.config.get_text_config()
    known = architecture(config)
    names = gguf.get_tensor_name_map(known.arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, known.name)
    try:
        writer.add_type("model")
        writer.add_name(title)
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        divisors = write_settings(writer, config, known)
        write_vocabulary(writer, tokenizer, config.vocab_size, pre=_splitting_of(model.base))
        plan = [(weight, _named(names, weight.name, known), _type(weight, wanted)) for weight in model.weights]
        if divisors is not None:
            rope = Weight("rope_freqs", tuple(divisors.shape), torch.float32, lambda: divisors)
            plan.insert(0, (rope, "rope_freqs.weight", _F32))
        for weight, name, number in plan:
            writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), _bytes(weight.shape, number), number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, _, number in plan:
            change = changes(weight.name, config, known)
            value = weight.value()
            writer.write_tensor_data(encoded(value if change is None else change(value.float()), number))
    finally:
        writer.close()


def encoded(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """A tensor's values as the file holds them."""
    if tensor.dim() < 2:
        return gguf.quantize(tensor.float().numpy(), kind)
    parts: Iterator[np.ndarray] = (gguf.quantize(part.float().numpy(), kind) for part in tensor.split(ROWS))
    return np.concatenate(list(parts))


def _named(names: gguf.TensorNameMap, name: str, known: Architecture) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"gguf has no name for {name!r} in the architecture {known.name!r}; its weights are others")
    return found


def _type(weight: Weight, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(weight.shape) < 2:
        return _F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if weight.shape[-1] % block == 0 else GGMLQuantizationType.F16


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // block * size


def _splitting_of(base: Any) -> str | None:
    """How texts are split, where the model came from a GGUF file that says so."""
    source = Path(str(getattr(base, "name_or_path", "")))
    if source.suffix != ".gguf" or not source.is_file():
        return None
    field = gguf.GGUFReader(source).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
