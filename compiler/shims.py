"""What this process has changed in other libraries: nothing, unless a script asked for it; `explain` says so."""

from __future__ import annotations

_SHIMS: dict[str, str] = {}


def declare(name: str, what: str) -> None:
    """Put a change on record: where, and what it does, in a sentence."""
    _SHIMS[name] = what


def withdraw(name: str) -> None:
    """Take a change off the record, which is undone."""
    _SHIMS.pop(name, None)


def declared() -> tuple[str, ...]:
    """All of them, a line each."""
    return tuple(f"{name}: {what}" for name, what in _SHIMS.items())
