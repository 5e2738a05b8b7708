"""A digest of this package's code, so that caches below us never serve a graph that an older version made."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_PARTS = ("kernels", "passes", "compiler")


@functools.cache
def source_digest() -> str:
    """Hash of every source file that decides what a compiled graph looks like (about a millisecond, once)."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in _PARTS:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
