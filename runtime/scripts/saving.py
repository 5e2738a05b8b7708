"""Methods of models from ``FastLanguageModel`` for saving: Unsloth's names, and :mod:`unsloth.runtime.export`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...models.export.paths import file_name
from ...models.load import ModelError
from .. import checkpoints
from ..export import SHARD_BYTES, Exported, save
from .old_names import explain_once

METHODS = {
    "lora": "adapter",
    "merged_16bit": "merged",
    "merged_4bit": "merged-4bit",
    "merged_4bit_forced": "merged-4bit",
}
"""By Unsloth's name, the format of :func:`~unsloth.runtime.export.save`."""

_KINDS = {"fast_quantized": "q8_0", "quantized": "q4_k_m"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WITHOUT_EFFECT = {
    *("maximum_memory_usage", "temporary_location", "safe_serialization", "first_conversion", "tags", "use_temp_dir"),
    *(
        "create_pr",
        "state_dict",
        "save_function",
        "is_main_process",
        "variant",
        "revision",
        "datasets",
        "commit_description",
    ),
}


def give_methods(model: Any) -> Any:
    """Put the methods on a model; they export it with the adapters that it has when they are called."""
    for method in (save_pretrained_merged, push_to_hub_merged, save_pretrained_gguf, push_to_hub_gguf):
        setattr(model, method.__name__, MethodType(method, model))
    return model


def save_pretrained_merged(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    max_shard_size: int | str = SHARD_BYTES,
    **others: Any,
) -> Exported:
    """Write the model with its adapters, or the adapter alone ("lora"), into a folder.

    Args:
        save_method: "merged_16bit", "merged_4bit" or "lora".
        push_to_hub: upload it as well, as the repository ``save_directory``.

    Raises:
        ModelError: for another method, and for a model that cannot be merged.
    """
    _explain(others)
    method = save_method.lower().replace(" ", "_")
    if method not in METHODS:
        raise ModelError(f"save_method {save_method!r} is none of {', '.join(METHODS)}")
    written = save(model, tokenizer, save_directory, format=METHODS[method], max_shard_bytes=_bytes(max_shard_size))
    if push_to_hub:
        _upload(written.folder, str(save_directory), token, private, None)
    return written


def save_pretrained_gguf(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    **others: Any,
) -> Exported:
    """Write the model with its adapters as a GGUF file for each ``quantization_method``.

    Args:
        quantization_method: "f32", "f16", "bf16", "q8_0", several of them, "fast_quantized" (q8_0) or "not_quantized"
            (the model's 16 bits).

    Raises:
        ModelError: for other types, which llama.cpp makes from such a file, and for an architecture without a mapping.
    """
    _explain(others)
    asked = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method or ["q8_0"])
    plain = "f16" if str(model.dtype) == "torch.float16" else "bf16"
    kinds = [plain if kind == "not_quantized" else _KINDS.get(kind, kind) for kind in asked]
    written = save(model, tokenizer, save_directory, format="gguf", types=kinds)
    if push_to_hub:
        _upload(written.folder, str(save_directory), token, private, None)
    return written


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    **others: Any,
) -> str:
    """:func:`save_pretrained_merged` into a repository of the hub; returns its address."""
    with _aside(repo_id) as folder:
        save_pretrained_merged(model, folder, tokenizer, save_method, **others)
        return _upload(folder, repo_id, token, private, commit_message)


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    **others: Any,
) -> str:
    """:func:`save_pretrained_gguf` into a repository of the hub; returns its address."""
    with _aside(repo_id) as folder:
        save_pretrained_gguf(model, folder, tokenizer, quantization_method, **others)
        return _upload(folder, repo_id, token, private, commit_message)


class _aside(tempfile.TemporaryDirectory):
    """A folder of the repository's name that goes when it is uploaded. Bad names are refused first."""

    def __init__(self, repo_id: str) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ModelError(f"{repo_id!r} is no name of a repository: {str(error).splitlines()[0]}") from None
        super().__init__(prefix="unsloth-")
        self.folder = Path(self.name) / file_name(repo_id)

    def __enter__(self) -> Path:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().__enter__()
        return self.folder


def _upload(folder: Path, repo_id: str, token: Any, private: bool | None, message: str | None) -> str:
    hub = huggingface_hub.HfApi(token=token)
    repository = hub.create_repo(repo_id, private=private, exist_ok=True)
    hub.upload_folder(
        folder_path=folder,
        repo_id=repository.repo_id,
        commit_message=message or "Upload model",
        ignore_patterns=[checkpoints.MANIFEST],
    )
    return str(repository)


def _explain(others: dict[str, Any]) -> None:
    for name in others:
        if name not in _WITHOUT_EFFECT:
            raise TypeError(f"there is no argument {name!r} of saving")
        explain_once(name, "saving does not need it: a tensor is in memory at a time, and files are safetensors")


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    for unit, count in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * count)
    raise ModelError(f"max_shard_size {size!r} is no size such as '5GB'")
