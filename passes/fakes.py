"""Running operators on fake tensors, outside of any tracer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def fake_execution(values: Iterable[Any]) -> Iterator[None]:
    """Operators called inside take and give fake tensors of the mode that the values belong to.

    The Python dispatcher is on, as it is when Dynamo propagates: composite operators written in C++ ask a tensor for
    plain sizes, and each answer would become a guard on a symbolic one. A graph that changes the grad mode changes it
    for what is inside only.
    """
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with mode, enable_python_dispatcher(), torch.set_grad_enabled(torch.is_grad_enabled()):
        yield
