"""offload and fetch: what comes back is what left, whatever its layout, and whether or not its copy was under way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import DEVICE
from unsloth.kernels import offload as module
from unsloth.kernels.offload import fetch, offload, prefetch, settle

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[::2],
    "bfloat16": lambda x: x.bfloat16(),
    "empty": lambda x: x[:0],
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_comes_back_is_what_left(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(random(6, 4, 10))
    host = offload(x)
    assert host.device.type == "cpu" and (not x.numel() or host.data_ptr() != x.data_ptr())
    back = fetch(x, host, None)
    assert back.device == x.device and back.dtype == x.dtype and (not x.numel() or back.data_ptr() != host.data_ptr())
    assert back.stride() == host.stride() == torch.empty_like(x).stride()
    assert torch.equal(back, x)


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_each_is_its_own_however_many_are_under_way(ahead: int) -> None:
    """Many values, memory that is used again at once, and more arithmetic than copies, or fewer."""
    for size in (64, 1024):
        a = random(size, size)
        values = [random(256, 256, seed=i) for i in range(12)]
        truth = [x.clone() for x in values]
        leaving: list[tuple[Tensor, Tensor]] = []
        hosts = []
        while values:
            x = values.pop(0)
            leaving.append((offload(x), x))
            del x
            a = a @ a / size
            if len(leaving) > ahead:
                hosts.append(settle(a, *leaving.pop(0)))
            torch.full((256, 256), 7.0, device=DEVICE)  # takes the memory that was just given back
        hosts += [settle(a, *left) for left in leaving]
        coming = {i: prefetch(a, hosts[i]) for i in range(12 - ahead, 12)}
        for i in reversed(range(12)):
            if ahead and i - ahead >= 0:
                coming[i - ahead] = prefetch(a, hosts[i - ahead])
            x = fetch(a, hosts[i], coming.pop(i, None))
            a = a @ a / size
            assert torch.equal(x, truth[i]), i
    module.forget()


def test_a_copy_that_nobody_asked_for_is_not_taken_for_another() -> None:
    x, other = random(8, 8), random(8, 8, seed=1)
    first, second = offload(x), offload(other)
    prefetch(x, first)
    prefetch(x, second)
    fetch(x, first, None)  # and the backward pass ends here
    third = offload(x + 1)
    assert torch.equal(fetch(x, third, None), x + 1)
    assert torch.equal(fetch(x, second, None), other)
    module.forget()


@pytest.mark.parametrize("name", ["offload", "settle", "prefetch", "fetch"])
def test_the_operators_are_what_the_dispatcher_is_told(name: str) -> None:
    x = random(4, 6)
    host = offload(x)
    args = {"offload": (x,), "settle": (x, host, x), "prefetch": (x, host), "fetch": (x, host, None)}[name]
    # settle returns what it is given, and says that it does not
    checks = ("test_faketensor",) if name == "settle" else ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.unsloth_launch, name).default, args, test_utils=checks)
    module.forget()
