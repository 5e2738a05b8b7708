"""A trained model for others: merged into 16 bits, or 4, as GGUF, or the adapter as it is; whole, or not there.

What is written is filled in a folder beside its place, sealed with a manifest, and moved (:mod:`.checkpoints`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..models.export.gguf_file import check_type, write_gguf
from ..models.export.merged import Merged, merged
from ..models.export.paths import file_name, inside
from ..models.export.safetensors_files import write_safetensors
from ..models.load import ModelError, load_model, load_tokenizer
from ..models.processor import has_processor, load_processor
from ..models.source import Source, locate
from . import checkpoints
from .card import RUN, model_card, read_run
from .curves import plot_loss
from .outputs import OutputError

logger = logging.getLogger(__name__)

FORMATS = ("merged", "merged-4bit", "adapter", "gguf")
CURVE, LOG = "loss.png", "log.json"
SHARD_BYTES = 5 * 10**9

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", CURVE, "README.md")


@dataclass
class Exported:
    """What was written; ``print`` it.

    Attributes:
        folder: where.
        kind: one of :data:`FORMATS`.
        files: names and bytes of all files.
    """

    folder: Path
    kind: str
    files: dict[str, int] = field(repr=False)

    def __str__(self) -> str:
        width = max(map(len, self.files)) + 2
        lines = [f"exported    {self.folder}  ({self.kind}, {_size(sum(self.files.values()))})"]
        lines += [f"            {name:<{width}}{_size(size)}" for name, size in self.files.items()]
        return "\n".join(lines)


def export(
    source: str,
    output_dir: Path,
    *,
    format: str = "merged",
    dtype: torch.dtype | None = None,
    types: Sequence[str] = ("q8_0",),
    name: str | None = None,
    quantise: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
) -> Exported:
    """Load a model or an adapter, and write it.

    Args:
        source: as :func:`~unsloth.models.load.load_model` takes it; a folder that ``unsloth train`` has filled brings
            its settings, data report and curve into the model card.
        output_dir: a folder that does not exist, or is empty.
        format: one of :data:`FORMATS`.
        dtype: of merged weights; None is the checkpoint's own where that is 16 bits, else bfloat16.
        types: of GGUF files: f32, f16, bf16, q8_0; each is a file.
        name: of the GGUF files, before ``.Q8_0.gguf``; None takes the model's.
        quantise: "nf4" or "int8": the adapter is added to the base as it was when it was trained on a quantised one.
        max_shard_bytes: of a safetensors file.
        overwrite: write into a folder that holds something: files of the same name are replaced, others stay.
        trust_remote_code, token: as :func:`~unsloth.models.load.load_model` takes them.

    Raises:
        ModelError: when the model cannot be loaded, or not written so.
        OutputError: when the folder cannot be used.
    """
    if format not in FORMATS:
        raise ModelError(f"format {format!r} is none of {', '.join(FORMATS)}")
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "token": token}
    found = locate(source, **where)
    _check_place(output_dir, found, overwrite)
    if format == "adapter":
        return _copy_adapter(found, output_dir)
    for kind in types if format == "gguf" else ():
        check_type(kind)
    precision = _precision(found, **where)
    model = load_model(source, dtype=precision, quantise=quantise, **where)  # pyright: ignore[reportArgumentType]
    return save(
        model,
        # What prepares images as well, where the model takes any; GGUF files hold the tokenizer alone.
        (load_processor if has_processor(found) and format != "gguf" else load_tokenizer)(source, **where),
        output_dir,
        format=format,
        dtype=dtype or (precision if precision != torch.float32 else None),
        types=types,
        name=name,
        max_shard_bytes=max_shard_bytes,
        run=found.folder if found.adapter or (found.folder and (found.folder / RUN).is_file()) else None,
    )


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    output_dir: str | Path,
    *,
    format: str = "merged",
    dtype: torch.dtype | None = None,
    types: Sequence[str] = ("q8_0",),
    name: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    run: Path | None = None,
) -> Exported:
    """Write a model that is loaded, with its adapters; see :func:`export`.

    A folder that is there keeps its other files. The model stays as it is.

    Args:
        tokenizer: written beside the weights, or the processor of a model that takes images; GGUF needs the former.
        run: the folder of the run that trained it, for the model card.

    Raises:
        ModelError: when the model cannot be written so.
        OSError: when the disk is full or fails; what was there before is as it was.
    """
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, and the model needs a folder")
    base = _base_name(model)
    title = name or file_name(str(run or base))
    with _staged(folder) as staged:
        if format == "adapter":
            if not hasattr(model, "peft_config"):
                raise ModelError("the model has no adapter; merged writes all of it")
            active = model.active_adapter
            if active != "default":  # PEFT makes it the name of a folder
                inside(staged, active)
            model.save_pretrained(str(staged), selected_adapters=[active])
            weights = ["adapter_model.safetensors"]
        elif format == "gguf":
            if tokenizer is None:
                raise ModelError("a GGUF file holds the tokenizer as well: pass it")
            inner: Any = getattr(tokenizer, "tokenizer", tokenizer)
            kinds = [check_type(kind) for kind in types]
            weights = [f"{title}.{kind.upper()}.gguf" for kind in kinds]
            for kind, file in zip(kinds, weights, strict=True):
                # From float32: the file's own rounding is the only one.
                write_gguf(inside(staged, file), merged(model, torch.float32), inner, kind, title=title)
        elif format == "merged-4bit":
            weights = _in_4_bits(merged(model, dtype), staged, max_shard_bytes)
        else:
            weights = _write_merged(merged(model, dtype), staged, max_shard_bytes)
        if tokenizer is not None and format != "gguf":
            tokenizer.save_pretrained(staged)
        curve = _take_curve(run, staged)
        card = model_card(
            title=file_name(folder.name) if format != "gguf" else title,
            base=base,
            kind=format.removesuffix("-4bit"),
            files=weights,
            adapters=_adapters(model),
            run=read_run(run),
            curve=curve,
        )
        (staged / "README.md").write_text(card, encoding="utf-8")
        files = {p.relative_to(staged).as_posix(): p.stat().st_size for p in sorted(staged.rglob("*")) if p.is_file()}
    return Exported(folder, format, files)


# -- formats -----------------------------------------------------------------------------------------------------------


def _write_merged(result: Merged, folder: Path, max_shard_bytes: int) -> list[str]:
    names = write_safetensors(folder, result.weights, max_shard_bytes=max_shard_bytes)
    result.config.architectures = [type(result.base).__name__]
    result.config.save_pretrained(folder)
    try:
        if getattr(result.base, "generation_config", None) is not None:
            result.base.generation_config.save_pretrained(folder)
    except ValueError as error:  # of settings that contradict each other, as old checkpoints have them
        logger.warning("generation_config.json is left out: %s", str(error).splitlines()[0])
    return names


def _in_4_bits(result: Merged, staged: Path, max_shard_bytes: int) -> list[str]:
    """By way of the 16-bit model on the disk, which is read back and quantised weight by weight."""
    place = next((p.device for p in result.base.parameters()), torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=staged.parent, prefix=".saving-16-bit-") as name:
        _write_merged(result, Path(name), max_shard_bytes)
        dtype: Any = result.config.dtype
        model: Any = load_model(name, dtype=dtype, device=place, quantise="nf4")
        model.save_pretrained(staged, max_shard_size=max_shard_bytes)
        del model
    return sorted(path.name for path in staged.glob("*.safetensors"))


def _copy_adapter(source: Source, output_dir: Path) -> Exported:
    """The adapter's files as they are."""
    if not source.adapter:
        raise ModelError(f"{source.name!r} is no adapter, but a whole model; merged and gguf write that")
    if not all((source.files / name).is_file() for name in _ADAPTER):
        raise ModelError(f"the adapter {source.name!r} has no {_ADAPTER[1]}")
    config = json.loads((source.files / _ADAPTER[0]).read_text(encoding="utf-8"))
    with _staged(output_dir) as staged:
        found = {p.name: p for pattern in (*_ADAPTER, *_BESIDE) for p in source.files.glob(pattern) if p.is_file()}
        for name, path in sorted(found.items()):
            if name != checkpoints.MANIFEST:
                shutil.copyfile(path, staged / name)
        shown = {name: config[name] for name in ("r", "lora_alpha", "target_modules", "use_dora") if name in config}
        card = model_card(
            title=file_name(output_dir.name),
            base=str(config.get("base_model_name_or_path")),
            kind="adapter",
            files=[_ADAPTER[1]],
            adapters=shown,
            run=read_run(source.folder),
            curve=_take_curve(source.folder, staged),
        )
        (staged / "README.md").write_text(card, encoding="utf-8")
        files = {p.name: p.stat().st_size for p in sorted(staged.iterdir())}
    return Exported(output_dir, "adapter", files)


# -- what lies beside the weights --------------------------------------------------------------------------------------


def _take_curve(run: Path | None, staged: Path) -> str | None:
    """Copy what a run has logged, and its picture, which is drawn where it is missing."""
    if run is None or not (run / LOG).is_file():
        return None
    shutil.copyfile(run / LOG, staged / LOG)
    if (run / RUN).is_file():
        shutil.copyfile(run / RUN, staged / RUN)
    try:
        if (run / CURVE).is_file():
            shutil.copyfile(run / CURVE, staged / CURVE)
        else:
            plot_loss(json.loads((run / LOG).read_text(encoding="utf-8")), staged / CURVE)
    except ValueError as error:
        logger.warning("no curve: %s", error)
        return None
    return CURVE


def _adapters(model: Any) -> dict[str, Any]:
    configs = getattr(model, "peft_config", {})
    config = configs.get(getattr(model, "active_adapter", None) or "default")
    if config is None:
        return {}
    modules = config.target_modules
    shown = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    return {**shown, "target_modules": modules if isinstance(modules, str) else sorted(modules or ())}


def _base_name(model: Any) -> str:
    for config in getattr(model, "peft_config", {}).values():
        if config.base_model_name_or_path:
            return str(config.base_model_name_or_path)
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


# -- places ------------------------------------------------------------------------------------------------------------


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder to fill, whose files are installed in their place when nothing went wrong."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = checkpoints.stage(folder.absolute())
    try:
        yield staged
        checkpoints.install(staged, folder.absolute())
    finally:
        checkpoints.discard(staged)


def _check_place(folder: Path, source: Source, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, and the model needs a folder")
    if folder.exists() and source.folder is not None and folder.samefile(source.folder):
        raise OutputError(f"{folder} is where the model comes from: choose another folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder} is not empty: choose another folder, or --overwrite")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} cannot be written: {above} is {'read-only' if above.is_dir() else 'a file'}")


def _precision(source: Source, **where: Any) -> torch.dtype:
    """Of the base's own weights, in which reading them loses nothing."""
    while source.adapter:
        source = locate(source.base_model, **where)
    if source.folder is None or source.gguf:
        return torch.float32
    config = json.loads((source.files / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config") or {}
    name = next((c[key] for c in (config, inner) for key in ("dtype", "torch_dtype") if c.get(key)), "float32")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name), torch.float32)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
