"""Settings that must be in place before torch and triton are imported by a test, and what keeps the suite short."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

# Without a GPU, Triton kernels run in Triton's interpreter: same code, real numbers, small shapes.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The interpreter's products are NumPy's. OpenBLAS picks a kernel by the processor, and those of some add up in an order
# that depends on the block's shape; this one is on every x86-64 machine, and gives the same bits for every tiling.
if platform.machine() == "x86_64":
    os.environ.setdefault("OPENBLAS_CORETYPE", "Nehalem")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A graph from the cache of an earlier run was planned in another process: a test would see nothing of it.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# Every worker compiles by itself: a pool of its own would import PyTorch in further processes on the same cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

LONGEST = (
    "compiler/test_backend.py",
    "runtime/test_train.py",
    "runtime/test_sturdy.py",
    "runtime/test_trainer.py",
    "runtime/test_two_processes.py",
    "test_examples.py",
    "runtime/test_smaller.py",
    "models/test_smollm2.py",
    "compiler/test_equalities.py",
    "compiler/test_explain_verify.py",
    "compiler/test_caches.py",
    "test_benchmarks.py",
    "runtime/test_learning_rates.py",
    "passes/test_nf4.py",
    "passes/test_cross_entropy.py",
    "test_sweep.py",
    "passes/test_lora_linear.py",
    "memory/test_same_numbers.py",
    "kernels/test_low_rank_product.py",
)
"""Files that are begun first, so that no worker is alone with one of them at the end (``--no-loadscope-reorder``)."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, order = Path(__file__).parent, {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(here).as_posix(), len(order)))


def pytest_collection_finish() -> None:
    # pytest listens to every logger that does not propagate, and as long as anybody listens to this one, PyTorch
    # prints each graph of each compilation for it, several times.
    logging.getLogger("torch.__trace").propagate = True
    _look_for_builtins_once()
    _keep_what_is_there()
    gc.set_threshold(100_000, 20, 50)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _keep_what_is_there()


def _look_for_builtins_once() -> None:
    """A third of what Triton's interpreter takes is looking through its language at each call of each function."""
    if (interpreter := sys.modules.get("triton.runtime.interpreter")) is None:
        return
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names(part: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(part) if is_builtin(member)]

    def patch(part: Any, *rest: Any) -> None:
        for name in names(part):
            if is_builtin(member := getattr(part, name)):  # else a caller has done so
                interpreter._patch_attr(part, name, member, *rest)

    interpreter._patch_builtin = patch


def _keep_what_is_there() -> None:
    """What is imported lives as long as the process: a million objects that need not be looked through again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions find their objects alive at the end, and say so
