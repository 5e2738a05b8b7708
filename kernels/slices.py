"""A stretch of a graph run on a few tokens at a time: what its widest values take no longer grows with the tokens.

``by_slices(x, rows, whole, program, most)`` runs a program, a list of calls, on slices of x and of each of ``rows``,
[tokens, …] or [batch, length, …], one after the other, and gives it ``whole`` as they are. What a call makes of whole
values alone (an unpacked weight) is made once. A result with rows is put together from its slices; one that is a sum
over tokens is added up in float32 and rounded once.

Nothing but the results, what is made once, and one slice's values is alive at a time; beyond what the calls themselves
move, each result is read and written once more. The memory floor makes the programs (passes/memory/sliced.py). They are
text, so that a graph that comes out of a cache brings its own:

    {"rows": [number of feature dimensions of x, of each of rows],
     "whole": how many,
     "once": [call, …], "each": [call, …],
     "results": [{"value": number, "dtype": "bfloat16", "features": [4096], "like": which of rows or None: flat} |
                 {"value": number, "dtype": "bfloat16", "shape": [32, 4096]}],
     "flops": per token}

A call is {"call": "aten::mm.default", "args": […], "kwargs": {…}, "makes": number, "last": [number, …]}; values are
numbered from 0, x and rows first, then whole, and ``last`` are those that nobody reads after it. An argument is a
number, None, a text, a list of arguments, {"value": number}, {"dtype": …}, {"device": …}, or {"tokens": 0} for the rows
of a slice.
"""

from __future__ import annotations

import functools
import json
import math
import operator as python
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .operator import operator

ALIGNED = 128
"""A slice has a multiple of so many rows: whole tiles of a product, and addresses as aligned as the first one."""
MEMBER = "member"
"""The call that takes one of several results."""


def slice_rows(count: int, most: int) -> int:
    """Rows of each slice but the last, where there are ``count`` rows and a slice shall have about ``most``."""
    slices = max(1, -(-count // max(1, most)))
    return -(-max(1, -(-count // slices)) // ALIGNED) * ALIGNED


class _Program:
    """A program that is ready to run."""

    def __init__(self, text: str) -> None:
        told = json.loads(text)
        self.features: list[int] = told["rows"]
        self.once, self.each = ([_Call(call) for call in told[name]] for name in ("once", "each"))
        self.results: list[dict[str, Any]] = told["results"]
        self.flops: float = told["flops"]
        calls = [*self.once, *self.each]
        self.values = max([len(self.features) + told["whole"], *(call.makes + 1 for call in calls)])

    def shapes(self, rows: Sequence[Tensor]) -> list[tuple[list[Any], torch.dtype]]:
        """Of the results, from values with rows as they were given."""
        shapes = []
        for result in self.results:
            if "shape" in result:
                shape = result["shape"]
            else:
                like = result["like"] or 0
                tokens = list(rows[like].shape[: rows[like].dim() - self.features[like]])
                shape = [*([math.prod(tokens)] if result["like"] is None else tokens), *result["features"]]
            shapes.append((shape, getattr(torch, result["dtype"])))
        return shapes

    def run(self, rows: Sequence[Tensor], whole: Sequence[Tensor], most: int) -> list[Tensor]:
        count = math.prod(rows[0].shape[: rows[0].dim() - self.features[0]])
        flat = [
            x.reshape(count, *x.shape[x.dim() - features :])
            for x, features in zip(rows, self.features, strict=True)
        ]  # fmt: skip
        shared: list[Any] = [None] * self.values
        shared[len(flat) : len(flat) + len(whole)] = whole
        for call in self.once:
            call.run(shared, 0)
        made = [rows[0].new_empty(shape, dtype=dtype) for shape, dtype in self.shapes(rows)]
        sums = [
            torch.zeros_like(m, dtype=torch.promote_types(m.dtype, torch.float32)) if "shape" in result else None
            for m, result in zip(made, self.results, strict=True)
        ]
        pieces = [
            m.view(count, *r["features"]) if s is None else m
            for m, s, r in zip(made, sums, self.results, strict=True)
        ]  # fmt: skip
        step = slice_rows(count, most)
        for start in range(0, count, step):
            length = min(step, count - start)
            values = [x.narrow(0, start, length) for x in flat] + shared[len(flat) :]
            for call in self.each:
                call.run(values, length)
            for result, piece, total in zip(self.results, pieces, sums, strict=True):
                value = values[result["value"]]
                if total is None:
                    piece.narrow(0, start, length).copy_(value)
                else:
                    total.add_(value)
            del values
        for m, total in zip(made, sums, strict=True):
            if total is not None:
                m.copy_(total)
        return made


class _Call:
    """One call of a program."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.function = _function(told["call"])
        self.args, self.kwargs = _argument(told["args"]), _argument(told["kwargs"])
        self.makes: int = told["makes"]
        self.last: list[int] = told["last"]

    def run(self, values: list[Any], length: int) -> None:
        values[self.makes] = self.function(*self.args(values, length), **self.kwargs(values, length))
        for i in self.last:
            values[i] = None


def _function(name: str) -> Callable[..., Any]:
    if name == MEMBER:
        return python.getitem
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.rpartition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _argument(told: Any) -> Callable[[list[Any], int], Any]:
    """What makes an argument of the values that there are and the rows of the slice."""
    if isinstance(told, list):
        parts = [_argument(part) for part in told]
        return lambda values, length: [part(values, length) for part in parts]
    if not isinstance(told, dict):
        return lambda values, length: told
    if told.keys() == {"value"}:
        number = told["value"]
        return lambda values, length: values[number]
    if told.keys() == {"dtype"} and isinstance(told["dtype"], str):  # and not arguments by name
        dtype = getattr(torch, told["dtype"])
        return lambda values, length: dtype
    if told.keys() == {"device"}:
        device = torch.device(told["device"])
        return lambda values, length: device
    if told.keys() == {"tokens"}:
        return lambda values, length: length
    parts = {name: _argument(part) for name, part in told.items()}
    return lambda values, length: {name: part(values, length) for name, part in parts.items()}


_program = functools.lru_cache(maxsize=1024)(_Program)


# -- the operator ------------------------------------------------------------------------------------------------------


def _run(x: Tensor, rows: Sequence[Tensor], whole: Sequence[Tensor], program: str, most: int) -> list[Tensor]:
    with torch.no_grad():
        return _program(program).run([x, *rows], whole, most)


def _fake(x: Tensor, rows: Sequence[Tensor], whole: Sequence[Tensor], program: str, most: int) -> list[Tensor]:
    shapes = _program(program).shapes([x, *rows])
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def _tokens(x: Tensor, program: str) -> Any:
    features = _program(program).features[0]
    return math.prod(x.shape[: x.dim() - features])


by_slices = operator(
    "by_slices(Tensor x, Tensor[] rows, Tensor[] whole, str program, int most) -> (Tensor[] results)",
    reference=_run,
    forward=_run,
    fake=_fake,
    supports=lambda *_: None,
    flops=lambda x, rows, whole, program, most: _program(program).flops * _tokens(x, program),
    devices=("cuda", "cpu"),
)
