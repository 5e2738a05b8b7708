"""Compiles kernels before they are launched, while PyTorch's compiler is busy with the graph around them.

A kernel is compiled at its first launch, one after the other, when everything else is done. But which kernels a graph
launches, and for which layouts, its fake tensors say as soon as it is there: operators are called with fake tensors
under :func:`~unsloth.kernels.launch.collecting`, and what they would launch is compiled by threads. Triton's passes and
LLVM let go of the interpreter, so this runs beside a compiler written in Python. A first launch waits for its kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from .launch import Pending, collecting, is_interpreted
from .operator import OPERATORS, Operator

MOST_THREADS = 8
"""More gain little: a part of each compilation holds the interpreter."""
BY_LAUNCH = ("rms_norm", "add_rms_norm", "swiglu", "geglu", "rope", "nf4_dequantize", "lora_", "glu_lora_")
"""What names of operators begin with that launch by :class:`~unsloth.kernels.launch.Launch` and by nothing else: it
knows fake tensors. Triton would launch on their address, which is 0."""

_UNKNOWN = object()
"""A size that only data tell."""


@dataclass(frozen=True)
class _Layout:
    """Of a tensor, in numbers."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    def fake(self, mode: FakeTensorMode) -> Tensor:
        with mode:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _Call(NamedTuple):
    """An operator's kernel and what a graph gives it."""

    run: Any
    args: tuple[Any, ...]


def compile_ahead(graphs: Iterable[fx.Graph]) -> int:
    """Begin to compile what the operators in these graphs will launch on this machine's GPU; does not wait for it.

    Nodes carry fake tensors in ``meta["val"]``. A symbolic size counts as what it is in the batch that is traced; calls
    with sizes that only data tell are left to their first launch, and so is what cannot be called with fake tensors.

    Returns:
        how many kernels are being compiled.
    """
    if not torch.cuda.is_available() or is_interpreted():
        return 0
    pending = kernels_of(graphs)
    if pending:
        pool = ThreadPoolExecutor(min(MOST_THREADS, len(pending), max(1, (os.cpu_count() or 2) // 2)))
        for kernel in pending:
            kernel.start(pool)
        pool.shutdown(wait=False)
    return len(pending)


def kernels_of(graphs: Iterable[fx.Graph], device: str = "cuda") -> list[Pending]:
    """What the operators in these graphs would launch and nobody compiles yet, each kernel once, not begun."""
    kernels = _kernels()
    calls = dict(found for graph in graphs for node in graph.nodes if (found := _call(node, kernels, device)))
    with FakeTensorMode() as mode, collecting() as pending:
        for run, args in calls.values():
            try:
                run(*pytree.tree_map_only(_Layout, lambda x: x.fake(mode), args))
            except Exception:  # noqa: BLE001  it will be compiled when it is launched, as ever
                continue
    return list(pending.values())


def _call(node: fx.Node, kernels: Mapping[Any, Any], device: str) -> tuple[Any, _Call] | None:
    """What tells a node's launches apart and the kernel that it calls; None where there is none, or a size unknown."""
    run = kernels.get(node.target)
    if run is None:
        return None
    args = pytree.tree_map(_numbers, fx.map_arg(node.args, lambda n: n.meta.get("val")))
    leaves = pytree.tree_leaves(args)
    tensors = [x for x in leaves if isinstance(x, _Layout)]
    if any(x is _UNKNOWN or (isinstance(x, _Layout) and _UNKNOWN in (*x.shape, *x.stride)) for x in leaves):
        return None
    if any(x.device.type != device for x in tensors):
        return None
    return (node.target, len(node.args), tuple(leaves)), _Call(run, args)


def _kernels() -> Mapping[Any, Any]:
    """By operator as graphs call it, with an autograd layer and without: what runs on the GPU."""
    return {
        target: run
        for op in OPERATORS.values()
        if op.runs_kernel_on("cuda") and op.name.startswith(BY_LAUNCH)
        for target, run in _halves(op)
    }


def _halves(op: Operator) -> Iterable[tuple[Any, Any]]:
    for overload, launch in op.launch.items():
        run = op.forward if overload is op.overload else op.backward
        yield from ((overload, run), (launch, run))


def _numbers(x: Any) -> Any:
    """A tensor's layout, and of a symbolic number what it is in the batch that is traced."""
    if isinstance(x, Tensor):
        shape, stride = (tuple(map(_numbers, of)) for of in (x.shape, x.stride()))
        return _Layout(shape, stride, x.dtype, x.device)
    if isinstance(x, torch.SymInt):
        return x.node.hint if x.node.has_hint() else _UNKNOWN
    return x
