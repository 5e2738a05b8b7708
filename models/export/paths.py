"""Names of files that come from elsewhere: a model's name, an adapter's, a setting. None leads out of its folder."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from ..source import ModelError

LONGEST = 200
"""Characters of a name: file systems allow 255 bytes, and an ending is added."""

_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]*")


def inside(folder: Path, name: str) -> Path:
    """The place of a file in a folder.

    Args:
        folder: where it belongs.
        name: one name, of letters, digits and ``_ . - + = @``, and blanks between them. No path: what looks like a
            separator anywhere, on any system and after any decoding, is refused, not repaired.

    Raises:
        ModelError: when the name is anything else, or a link of that name leads out of the folder.
    """
    plain = isinstance(name, str) and unicodedata.normalize("NFKC", name) == name and _NAME.fullmatch(name)
    if not plain or len(name) > LONGEST or ".." in name or name[-1] in ". " or name[0] == " ":
        raise ModelError(f"{name!r} is no name for a file in {folder}: letters, digits and _ . - are")
    if name.split(".")[0].lower() in _RESERVED:
        raise ModelError(f"{name!r} is the name of a device on Windows, and no name for a file")
    path = folder / name
    if path.is_symlink() or path.resolve().parent != folder.resolve():
        raise ModelError(f"{path} leads out of {folder}")
    return path


def file_name(title: str) -> str:
    """A name for a file, made of a model's title, hub id or path: the last part of it, with what no name has left out.

    ``"HuggingFaceTB/SmolLM2-135M"`` → ``"SmolLM2-135M"``.
    """
    last = re.split(r"[/\\]", title.strip().rstrip("/\\"))[-1]
    for ending in (".gguf", ".safetensors"):
        last = last.removesuffix(ending)
    kept = re.sub(r"[^A-Za-z0-9_.-]+", "-", last)
    kept = re.sub(r"\.{2,}", ".", kept).strip(".-")[:LONGEST].rstrip(".-")
    return kept if kept and kept.split(".")[0].lower() not in _RESERVED else "model"
