"""Checkpoints on the disk: written so that they are whole or not there, and read only when they are whole.

A checkpoint is filled in a folder of another name beside its place. Then every file is flushed to the disk, the
manifest (size and SHA-256 of each) is written last, and one rename puts the folder in its place. A process that dies
anywhere in between leaves all earlier checkpoints as they were. Reading compares with the manifest, says which file is
damaged and how, and goes back to the newest checkpoint that is whole.

Nothing here knows trainers; :mod:`.resume` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1

READ_BY_LOADERS = {".safetensors", ".bin", ".pt", ".pth", ".json"}
"""A file of such a name that the manifest does not list came from elsewhere, and a loader might prefer it."""

_NAME = re.compile(r"checkpoint-(\d+)")
_STAGED, _REPLACED, _DELETED = ".saving-", ".replaced-", ".deleting-"


class CheckpointError(ValueError):
    """There is no checkpoint to go on from; says what is wrong with each that was tried."""


# -- writing -----------------------------------------------------------------------------------------------------------


def stage(folder: Path) -> Path:
    """An empty folder beside ``folder``, on the same file system, to fill for :func:`publish`."""
    staged = folder.with_name(_STAGED + folder.name)
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir(parents=True)
    return staged


def publish(staged: Path, folder: Path) -> None:
    """Put a filled folder in its place, all at once and for good.

    Args:
        staged: what :func:`stage` gave.
        folder: its place. What is there already is replaced; it, or the new one, is there at any time, or comes back
            with :func:`recover`.

    Raises:
        OSError: when the disk is full or fails; ``folder`` is then as it was.
    """
    _seal(staged)
    before = folder.with_name(_REPLACED + folder.name)
    if folder.exists():
        os.rename(folder, before)
    try:
        os.rename(staged, folder)
    except OSError:
        if before.exists():
            os.rename(before, folder)
        raise
    _flush(folder.parent)
    _remove(before)


def install(staged: Path, folder: Path) -> None:
    """Put a filled folder's files into a folder that may hold others, which stay.

    A folder that is not there yet appears all at once, as with :func:`publish`. Into one that is there, files move one
    by one, the manifest last: while it is missing, or does not fit, the files are not whole, and :func:`damage` says
    so. A file that the last manifest lists and this one does not (a shard of a larger model) is removed.

    Raises:
        OSError: when the disk is full or fails. Before the first file has moved, ``folder`` is as it was.
    """
    if not folder.exists() or not any(folder.iterdir()):
        if folder.exists():
            folder.rmdir()
        publish(staged, folder)
        return
    _seal(staged)
    manifest = folder / MANIFEST
    try:
        before = set(_listed(manifest)) if manifest.is_file() else set()
    except ValueError:  # somebody else's
        before = set()
    manifest.unlink(missing_ok=True)
    files = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    for name in sorted(files, key=lambda name: name.as_posix() == MANIFEST):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, folder / name)
    for name in before - {name.as_posix() for name in files}:
        (folder / name).unlink(missing_ok=True)
    _flush(folder)
    discard(staged)


def discard(staged: Path) -> None:
    """Remove a folder that will not be published."""
    shutil.rmtree(staged, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Tidy up after a process that died while it saved: half-written folders go, half-replaced ones come back."""
    for before in output_dir.glob(_REPLACED + "*"):
        place = before.with_name(before.name.removeprefix(_REPLACED))
        if place.exists():
            _remove(before)
        else:
            os.rename(before, place)
    for prefix in (_STAGED, _DELETED):
        for left in output_dir.glob(prefix + "*"):
            _remove(left)


def rotate(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the oldest checkpoints beyond ``limit``.

    Args:
        output_dir: the folder of the checkpoints.
        limit: how many stay; None or 0 removes none.
        keep: checkpoints that stay whatever their age, such as the one just written and the best one. They count.
    """
    if not limit:
        return
    kept = {path.resolve() for path in keep}
    old = [path for path in reversed(checkpoints(output_dir)) if path.resolve() not in kept]
    for path in old[: max(0, len(old) + len(kept) - limit)]:
        doomed = path.with_name(_DELETED + path.name)  # first under another name: half of one is no checkpoint
        os.rename(path, doomed)
        _remove(doomed)


# -- reading -----------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a folder, whole or not, the highest step first."""
    if not output_dir.is_dir():
        return []
    return sorted((p for p in output_dir.iterdir() if _NAME.fullmatch(p.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written; -1 where its name does not say it."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each file; empty when it is whole."""
    if not checkpoint.exists():
        return ["there is no such folder"]
    if not checkpoint.is_dir():
        return ["is a file, not a folder"]
    if not (checkpoint / MANIFEST).is_file():
        empty = not any(checkpoint.iterdir())
        return ["is empty" if empty else f"has no {MANIFEST}: it was not finished, or something else wrote it"]
    try:
        files = _listed(checkpoint / MANIFEST)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = [f"{name}: {reason}" for name, entry in files.items() if (reason := _difference(checkpoint / name, entry))]
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and path.suffix in READ_BY_LOADERS and name not in files and name != MANIFEST:
            found.append(f"{name}: is not listed in {MANIFEST}; it was put there later")
    return found


def newest_whole(output_dir: Path, named: Path | None = None) -> tuple[Path, list[str]]:
    """The checkpoint to go on from; after :func:`recover`.

    Args:
        output_dir: the folder of the checkpoints.
        named: the one that is asked for; older ones beside it are tried after it. None tries all, the newest first.

    Returns:
        the checkpoint, and a line ``path: damage`` for everything wrong with those that were passed over.

    Raises:
        CheckpointError: when none is whole.
    """
    candidates = checkpoints(output_dir)
    if named is not None:
        older = [path for path in checkpoints(named.parent) if 0 <= step_of(path) < step_of(named)]
        candidates = [named, *older]
    notes: list[str] = []
    for checkpoint in candidates:
        found = damage(checkpoint)
        if not found:
            return checkpoint, notes
        notes += [f"{checkpoint}: {reason}" for reason in found]
    if not notes:
        raise CheckpointError(f"there is no checkpoint in {output_dir} to resume from")
    raise CheckpointError("no checkpoint to resume from is whole:\n" + "\n".join(notes))


def _seal(staged: Path) -> None:
    """Have everything in a folder on the disk, and written down in its manifest."""
    files = {}
    for path in sorted(p for p in staged.rglob("*") if p.is_file()):
        files[path.relative_to(staged).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    _flush(manifest)
    for inner in (p for p in staged.rglob("*") if p.is_dir()):
        _flush(inner)
    _flush(staged)


def _listed(manifest: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest.

    Raises:
        ValueError: when it is no manifest, or names a file outside of its folder.
    """
    content = json.loads(manifest.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("it lists no files")
    if content.get("format") != FORMAT:
        raise ValueError(f"its format is {content.get('format')!r}, this version reads {FORMAT}")
    for name, entry in content["files"].items():
        if name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"it names {name!r}, which is outside of the checkpoint")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"its entry for {name!r} is incomplete")
    return content["files"]


def _difference(path: Path, entry: dict[str, Any]) -> str | None:
    """How a file differs from its entry in the manifest."""
    if not path.is_file():
        return "is a folder" if path.is_dir() else "is missing"
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size:,} bytes instead of {entry['bytes']:,}"
        if _sha256(path) != entry["sha256"]:
            return "its content changed after it was written (SHA-256 differs)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
