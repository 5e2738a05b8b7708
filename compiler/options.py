"""The backend's options: few, typed, and a misspelt one is answered with the right spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class OptionError(ValueError):
    """An option of the backend is unknown or has a value that it cannot have."""


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="unsloth", options={...})``.

    Attributes:
        memory_budget: peak bytes that the step may use, as a number of bytes or a string ("24GiB", "80GB"); 0 asks
            for as little as possible; None means what the device has free.
        disable: names of passes to leave out ("rms_norm", "attention"; ``unsloth.explain`` lists them).
        strict: raise where the backend would otherwise warn and go on with what is left.
        lowering: "inductor", or "eager": run the rewritten graph under eager autograd (debugging, fast tests).
        logits: "keep", or "drop": do not keep the logits when the graph also returns the loss computed from them.
            Dropped logits raise a clear error when they are read.
        padding: "any", or "right": a promise that attention masks hide tokens at the end of a row only, and that
            nothing is read at hidden positions (their labels are ignored). Causal attention then needs no mask.
    """

    memory_budget: int | None = None
    disable: tuple[str, ...] = ()
    strict: bool = False
    lowering: Literal["inductor", "eager"] = "inductor"
    logits: Literal["keep", "drop"] = "keep"
    padding: Literal["any", "right"] = "any"

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, passes: Iterable[str] = ()) -> Options:
        """Check what a user gave.

        Args:
            options: option names and values; None for all defaults.
            passes: the names that ``disable`` may hold.

        Raises:
            OptionError: naming the option, and the closest valid spelling where there is one.
        """
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(
                    f"unknown option {name!r}{_did_you_mean(name, known)}; options are {', '.join(known)}"
                )
        checks = {
            "memory_budget": parse_bytes,
            "disable": lambda value: _names(value, list(passes)),
            "strict": lambda value: _one_of("strict", value, (True, False)),
            "lowering": lambda value: _one_of("lowering", value, ("inductor", "eager")),
            "logits": lambda value: _one_of("logits", value, ("keep", "drop")),
            "padding": lambda value: _one_of("padding", value, ("any", "right")),
        }
        return cls(**{name: checks[name](value) for name, value in given.items()})


def parse_bytes(value: int | str | None) -> int | None:
    """Bytes from a number or a string with a unit: ``"24GiB"`` is 24·2³⁰, ``"24GB"`` 24·10⁹.

    Raises:
        OptionError: for anything else, negative sizes included.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)):
        number, unit = found.groups()
        if unit.lower() in _UNITS:
            return int(float(number) * _UNITS[unit.lower()])
    raise OptionError(f"memory_budget {value!r} is not a size: give bytes, or a string such as '24GiB' or '80GB'")


def _names(value: Any, known: list[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if known and name not in known:
            hint = _did_you_mean(name, known)
            raise OptionError(f"disable names an unknown pass {name!r}{hint}; passes are {', '.join(known)}")
    return names


def _one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed or type(value) is not type(allowed[0]):
        hint = _did_you_mean(str(value), [str(a) for a in allowed])
        raise OptionError(f"{option} cannot be {value!r}{hint}; it is one of {', '.join(map(repr, allowed))}")
    return value


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
