"""What an operator's results look like, asked once for each layout of its arguments.

A graph is traced, checked, planned and compiled on fake tensors, and every one of these asks every call in it for its
results. PyTorch remembers those of its own operators, and not of ours, most of which answer by running their formula,
a dozen operators, on fake tensors. The layers of a model share nearly all layouts, and where sizes are symbols, all of
whose operators take a multiple of the time, also these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from .launch import MOST_LAYOUTS

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class _Symbolic(NamedTuple):
    """A number that is not known yet: its expression, and what it is in the batch that is being traced, if it is known.

    It keeps nothing alive of the shapes that it belongs to.
    """

    expression: Any
    hint: Any


class _Result(NamedTuple):
    shape: tuple[int | _Symbolic, ...]
    stride: tuple[int | _Symbolic, ...]
    dtype: torch.dtype
    device: torch.device
    in_a_row: bool

    def fresh(self, environment: Any) -> Tensor:
        """A tensor like this, whose symbols are those of ``environment``, a ShapeEnv; None where there are none."""

        def size(s: int | _Symbolic) -> Any:
            return s if isinstance(s, int) else environment.create_symintnode(s.expression, hint=s.hint)

        shape = tuple(map(size, self.shape))
        if self.in_a_row:  # the size of whose memory is a shorter expression
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.empty_strided(shape, tuple(map(size, self.stride)), dtype=self.dtype, device=self.device)


_Known = dict[Any, tuple[list[_Result], bool] | None]


def once_per_layout(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what a fake makes of its arguments' layouts, and give it in tensors of its own.

    Layouts with symbols are remembered as long as the ShapeEnv of these. The fake is asked each time where its results
    are not what their layouts say (views of something larger) or have sizes that no argument has a part in.

    Args:
        fake: reads nothing of its arguments but numbers and their tensors' shape, strides, dtype and device; returns
            fresh tensors, one or a tuple.
    """
    plain: _Known = {}
    symbolic: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()

    def remembered(*args: Any) -> Any:
        environment = _environment(args)
        known = plain if environment is None else symbolic.setdefault(environment, {})
        key = _key(args)
        if (found := known.get(key)) is not None:
            results, several = found
            fresh = tuple(result.fresh(environment) for result in results)
            return fresh if several else fresh[0]
        answer = fake(*args)
        if key not in known:
            if len(known) >= MOST_LAYOUTS:
                known.clear()
            known[key] = _results(answer, args, environment)
        return answer

    return remembered


def _key(args: tuple[Any, ...]) -> Any:
    """All that an answer depends on."""
    kind = next(a.device.type for a in args if isinstance(a, Tensor))
    # What autocast and the default dtype do to a formula's own operators.
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return tuple(map(_layout, args)), casts and torch.get_autocast_dtype(kind), torch.get_default_dtype()


def _layout(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        if argument._has_symbolic_sizes_strides:
            sizes = tuple(map(_expression, argument.shape)), tuple(map(_expression, argument.stride()))
        else:
            sizes = argument.shape, argument.stride()
        return sizes, argument.dtype, argument.device
    if isinstance(argument, (list, tuple)):
        return tuple(map(_layout, argument))
    if isinstance(argument, _SYMBOLIC):
        return type(argument), argument.node.expr
    return type(argument), argument  # True is not 1


def _results(answer: Any, args: tuple[Any, ...], environment: Any) -> tuple[list[_Result], bool] | None:
    """An answer's layouts, and whether it is a tuple; None where they do not say all about it."""
    several = isinstance(answer, tuple)
    tensors = answer if several else (answer,)
    if not all(isinstance(tensor, Tensor) and _expression(tensor.storage_offset()) == 0 for tensor in tensors):
        return None
    if not _symbols(tensors) <= _symbols(args):  # read off the data: each call's are its own
        return None
    results = []
    for tensor in tensors:
        shape, stride = tuple(map(_number, tensor.shape)), tuple(map(_number, tensor.stride()))
        result = _Result(shape, stride, tensor.dtype, tensor.device, in_a_row=True)
        if tuple(map(_expression, result.fresh(environment).stride())) != tuple(map(_expression, tensor.stride())):
            result = result._replace(in_a_row=False)
        if not statically_known_true(_bytes(result.fresh(environment)) == _bytes(tensor)):
            return None
        results.append(result)
    return results, several


def _bytes(tensor: Tensor) -> Any:
    return tensor.untyped_storage().nbytes()


def _expression(size: int | torch.SymInt) -> Any:
    """A size as it can be compared without adding a guard."""
    return size if isinstance(size, int) else size.node.expr


def _number(size: int | torch.SymInt) -> int | _Symbolic:
    return size if isinstance(size, int) else _Symbolic(size.node.expr, size.node.hint)


def _numbers(values: Iterable[Any]) -> Iterable[Any]:
    """All symbolic numbers in arguments or results, sizes and strides included."""
    for value in pytree.tree_leaves(list(values)):
        if isinstance(value, _SYMBOLIC):
            yield value
        elif isinstance(value, Tensor) and value._has_symbolic_sizes_strides:
            yield from (size for size in (*value.shape, *value.stride()) if isinstance(size, torch.SymInt))


def _symbols(values: Iterable[Any]) -> set[Any]:
    return {symbol for number in _numbers(values) for symbol in number.node.expr.free_symbols}


def _environment(args: tuple[Any, ...]) -> Any:
    """The ShapeEnv of the symbols in arguments; None where there are none."""
    return next((number.node.shape_env for number in _numbers(args)), None)
