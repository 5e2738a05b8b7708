"""Where a model is: a preset, a folder, a GGUF file, an adapter, or an id on the Hugging Face hub.

A hub id becomes a folder as well: that of the hub's cache when it holds all that is wanted, which needs no network, and
otherwise a download. Nothing but safetensors, GGUF and text is fetched, so no pickle ever arrives.
"""

from __future__ import annotations

import difflib
import errno
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub
from safetensors import SafetensorError

from . import presets

_TEXT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


class ModelError(ValueError):
    """There is no such model, or it cannot be loaded or adapted as asked."""


@dataclass(frozen=True)
class Source:
    """A model's place on this machine.

    Attributes:
        name: as it was asked for.
        folder: where its files are; None for a preset.
        gguf: name of the GGUF file in the folder, when that is where the weights and the tokenizer are.
        adapter: the folder holds an adapter, which names its base model.
    """

    name: str
    folder: Path | None = None
    gguf: str | None = None
    adapter: bool = False

    @property
    def files(self) -> Path:
        """The folder, where the source is known to have one."""
        assert self.folder is not None
        return self.folder

    @property
    def has_tokenizer(self) -> bool:
        return self.gguf is not None or any(any(self.files.glob(pattern)) for pattern in _TOKENIZERS)

    @property
    def base_model(self) -> str:
        """What an adapter was trained on.

        Raises:
            ModelError: when the adapter does not say.
        """
        try:
            base = json.loads((self.files / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = None
        if not base:
            raise ModelError(f"the adapter {self.name!r} does not name its base model: load that, then the adapter")
        return base


def locate(
    name: str,
    *,
    gguf_file: str | None = None,
    tokenizer_only: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Source:
    """Find a model, downloading it where it is on the hub only.

    Args:
        name: a key of :data:`~unsloth.models.presets.SHAPES`; a folder; a ``*.gguf`` file; or a hub id.
        gguf_file: the GGUF file in that folder or hub repository.
        tokenizer_only: a folder with a tokenizer will do, and no weights are fetched.
        trust_remote_code: fetch the Python files of a hub repository as well.
        revision: branch, tag or commit on the hub.
        token: for private and gated repositories; by default the one that ``hf auth login`` has stored.

    Raises:
        ModelError: saying what was looked for, and the closest preset where there is one.
    """
    if name in presets.SHAPES:
        return Source(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name!r}")
        return Source(name, path.parent, path.name)
    if path.name == "config.json":
        path = path.parent
    if path.is_dir():
        return _in_folder(name, path, gguf_file, tokenizer_only)
    if path.is_absolute() or name.startswith((".", "~")) or path.exists():
        raise ModelError(f"{name!r} is no folder with a config.json")
    if "/" not in name and (close := difflib.get_close_matches(name, presets.SHAPES, n=1)):
        raise ModelError(f"no preset {name!r}, did you mean {close[0]!r}? Presets are {', '.join(presets.SHAPES)}")
    with explained(name):
        # Which Python files a repository needs only the hub knows; it falls back to the cache by itself.
        folder = None if trust_remote_code else _cached(name, gguf_file, tokenizer_only, revision)
        if folder is None:
            wanted = [gguf_file] if gguf_file else [*_TEXT, *(() if tokenizer_only else _WEIGHTS)]
            wanted += ["*.py"] if trust_remote_code else []
            folder = Path(
                huggingface_hub.snapshot_download(name, revision=revision, token=token, allow_patterns=wanted)
            )
    return _in_folder(name, folder, gguf_file, tokenizer_only)


def missing_weights(folder: Path) -> list[str]:
    """The safetensors files that a model's folder should hold and does not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    return [shard for shard in shards if not (folder / shard).is_file()]


def pickles(folder: Path) -> list[str]:
    """The files of a folder that look like weights in Python's pickle format."""
    # transformers' Trainer saves its arguments so, beside the weights.
    found = (path.name for pattern in _PICKLES for path in folder.glob(pattern))
    return sorted(name for name in found if name != "training_args.bin")


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what loading can raise into one :class:`ModelError` of one or two sentences."""
    try:
        yield
    except ModelError:
        raise
    except (
        # KeyError, RuntimeError and struct.error are what readers of damaged files raise; HTTPError is httpx's.
        *(OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, struct.error),
        *(hub.HTTPError, hub.EntryNotFoundError),
    ) as error:
        raise ModelError(f"cannot load {name!r}: {_reason(name, error)}") from error


def _in_folder(name: str, folder: Path, gguf_file: str | None, tokenizer_only: bool) -> Source:
    others = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"{name!r} has no file {gguf_file!r}" + (f", but {others}" if others else ""))
        return Source(name, folder, gguf_file)
    if (folder / "config.json").is_file():
        return Source(name, folder)
    if (folder / "adapter_config.json").is_file():
        return Source(name, folder, adapter=True)
    source = Source(name, folder)
    if tokenizer_only and source.has_tokenizer:
        return source
    raise ModelError(f"{name!r} has no config.json" + (f"; gguf_file chooses one of its {others}" if others else ""))


def _cached(name: str, gguf_file: str | None, tokenizer_only: bool, revision: str | None) -> Path | None:
    """The hub's cache of a repository, when all that is wanted is in it."""
    for probe in [gguf_file] if gguf_file else ["config.json", "adapter_config.json"]:
        found = huggingface_hub.try_to_load_from_cache(name, probe, revision=revision)
        if not isinstance(found, str):
            continue
        # A GGUF file may lie in a folder of its repository.
        folder = Path(found.removesuffix(probe))
        if probe == gguf_file:
            return folder
        if tokenizer_only:
            complete = Source(name, folder).has_tokenizer
        elif probe == "adapter_config.json":
            complete = (folder / "adapter_model.safetensors").is_file()
        else:
            complete = not missing_weights(folder)
        if complete:
            return folder
    return None


def _reason(name: str, error: BaseException) -> str:
    """What went wrong, in a sentence or two."""
    if isinstance(error, hub.GatedRepoError):
        return f"its authors ask you to accept their terms at {constants.ENDPOINT}/{name}; then pass your hub token"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "there is no folder and no public model on the hub of that name; a private one needs your hub token"
    if isinstance(error, hub.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HTTPError)):
        hub_is = "was not asked (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "cannot be reached"
        cache = constants.HF_HUB_CACHE
        return f"there is no folder of that name, the cache {cache} does not hold it whole, and the hub {hub_is}"
    if isinstance(error, hub.HFValidationError):
        return "it is neither a folder nor a GGUF file here, and no valid id on the hub"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has not enough free memory for its weights; 4 bits per weight need a quarter of 16"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk of {error.filename or constants.HF_HUB_CACHE}"
    if isinstance(error, PermissionError):
        return f"no permission to use {error.filename or 'its files'}"
    text = str(error)
    if "trust_remote_code" in text:
        return "it brings Python code of its own; pass trust_remote_code=True to run that, once you have read it"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
