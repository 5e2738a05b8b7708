"""The backend's options: few, typed, and a misspelt one is answered with the right spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"tib": 2**40, "tb": 10**12}
_SPELT = {"b": "B", "kib": "KiB", "mib": "MiB", "gib": "GiB", "kb": "KB", "mb": "MB", "gb": "GB"}
_SPELT |= {"tib": "TiB", "tb": "TB"}


class OptionError(ValueError):
    """An option of the backend is unknown or has a value that it cannot have."""


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="unsloth", options={...})``.

    Attributes:
        memory_budget: peak bytes that the step may use, weights and optimiser included: a number of bytes, a string
            ("24GiB", "80GB"), or a share of the device's memory (0.8, "80%"); 0 asks for as little as possible; None
            means what the device has free.
        disable: names of passes to leave out ("rms_norm", "attention"; ``unsloth.explain`` lists them).
        strict: raise where the backend would otherwise warn and go on with what is left.
        lowering: "inductor", or "eager": run the rewritten graph under eager autograd (debugging, fast tests).
        logits: "keep", or "drop": do not keep the logits when the graph also returns the loss computed from them.
            Dropped logits raise a clear error when they are read.
        padding: "any", or "right": a promise that attention masks hide tokens at the end of a row only, and that
            nothing is read at hidden positions (their labels are ignored). Causal attention then needs no mask.
        host_memory_budget: bytes of (pinned) host memory in which values may wait for backward, given like
            memory_budget but for shares; None means half of the machine's, 0 none.
    """

    memory_budget: int | None = None
    disable: tuple[str, ...] = ()
    strict: bool = False
    lowering: Literal["inductor", "eager"] = "inductor"
    logits: Literal["keep", "drop"] = "keep"
    padding: Literal["any", "right"] = "any"
    host_memory_budget: int | None = None

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
            "host_memory_budget": lambda value: parse_bytes(value, "host_memory_budget"),
            "disable": lambda value: _names(value, list(passes)),
            "strict": lambda value: _one_of("strict", value, (True, False)),
            "lowering": lambda value: _one_of("lowering", value, ("inductor", "eager")),
            "logits": lambda value: _one_of("logits", value, ("keep", "drop")),
            "padding": lambda value: _one_of("padding", value, ("any", "right")),
        }
        return cls(**{name: checks[name](value) for name, value in given.items()})


def parse_bytes(value: int | float | str | None, option: str = "memory_budget") -> int | None:
    """Bytes from a number, a size with a unit, or a share of the current device's memory.

    ``"24GiB"`` is 24·2³⁰, ``"24GB"`` 24·10⁹; ``0.8``, ``"0.8"`` and ``"80%"`` are shares, which need a CUDA device.

    Raises:
        OptionError: for anything else, negative sizes included, with the closest unit where one is misspelt.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float):
        value = str(value)
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*", value)):
        number, unit = float(found[1]), found[2].lower()
        if option == "memory_budget" and (unit == "%" or (not unit and "." in found[1])):
            return _share(number / 100 if unit else number, value)
        if unit in _UNITS:
            return int(number * _UNITS[unit])
        close = difflib.get_close_matches(unit, [u for u in _UNITS if u], n=1, cutoff=0.5)
        meant = f", did you mean {found[1]} {_SPELT[close[0]]}?" if close else ""
        raise OptionError(f"{option} {value!r} has an unknown unit{meant}; units are {', '.join(_SPELT.values())}")
    raise OptionError(
        f"{option} {value!r} is not a size: give bytes, a string such as '24GiB' or '80GB'"
        + (", or a share of the device's memory such as 0.8" if option == "memory_budget" else "")
    )


def _share(share: float, given: str) -> int:
    if not 0 < share <= 1:
        raise OptionError(f"memory_budget {given!r} is no share between 0 and 1; a size needs a unit, such as '24GiB'")
    if not torch.cuda.is_available():
        raise OptionError(f"memory_budget {given!r} is a share of the device's memory, and there is no CUDA device")
    return int(share * torch.cuda.mem_get_info()[1])


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
