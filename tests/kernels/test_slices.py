"""A program run on a few tokens at a time gives what it gives for all, and holds no more than a slice of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unsloth.kernels.slices import ALIGNED, by_slices, slice_rows

FEATURES, WIDE, RANK = 6, 96, 3


def call(name: str, args: list[Any], makes: int, last: list[int]) -> dict[str, Any]:
    return {"call": name, "args": args, "kwargs": {}, "makes": makes, "last": last}


def value(number: int) -> dict[str, int]:
    return {"value": number}


def program(dtype: str = "float32") -> str:
    """y = tanh(x Wᵀ) W + z, and the sum over tokens of zᵀ x; W is [wide, features]."""
    return json.dumps({
        "rows": [1, 1],
        "whole": 1,
        "once": [call("aten::t.default", [value(2)], 3, [])],
        "each": [
            call("aten::mm.default", [value(0), value(3)], 4, [3]),
            call("aten::tanh.default", [value(4)], 5, [4]),
            call("aten::mm.default", [value(5), value(2)], 6, [2, 5]),
            call("aten::add.Tensor", [value(6), value(1)], 7, [6]),
            call("aten::t.default", [value(1)], 8, [1]),
            call("aten::mm.default", [value(8), value(0)], 9, [0, 8]),
        ],
        "results": [
            {"value": 7, "dtype": dtype, "features": [FEATURES], "like": 0},
            {"value": 7, "dtype": dtype, "features": [FEATURES], "like": None},
            {"value": 9, "dtype": dtype, "shape": [FEATURES, FEATURES]},
        ],
        "flops": 4.0 * FEATURES * WIDE,
    })  # fmt: skip


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(*shape, FEATURES, generator=generator).to(dtype) for _ in range(2))
    return x, z, torch.randn(WIDE, FEATURES, generator=generator).to(dtype)


def run(x: Tensor, z: Tensor, w: Tensor, most: int) -> list[Tensor]:
    return by_slices(x, [z], [w], program(str(x.dtype).removeprefix("torch.")), most)


@pytest.mark.parametrize("shape", [(3, 117), (1, 128), (351,), (1, 1), (2, 0)], ids=str)
@pytest.mark.parametrize("most", [1, 128, 200, 4096])
def test_slices_give_what_all_tokens_give(shape: tuple[int, ...], most: int) -> None:
    x, z, w = inputs(*shape, dtype=torch.float64)
    y, flat, total = run(x, z, w, most)
    torch.testing.assert_close(y, torch.tanh(x @ w.T) @ w + z)
    assert y.shape == x.shape and y.is_contiguous() and torch.equal(flat, y.view(-1, FEATURES))
    torch.testing.assert_close(total, z.reshape(-1, FEATURES).T @ x.reshape(-1, FEATURES))


def test_rows_of_a_slice_are_whole_tiles_and_as_many_in_each() -> None:
    assert slice_rows(32768, 8192) == 8192
    assert slice_rows(9000, 8192) == 4608  # two slices, not one and a rest
    assert slice_rows(5, 8192) == ALIGNED and slice_rows(0, 8192) == ALIGNED
    for count in (1, 127, 1000, 12345):
        assert slice_rows(count, 512) % ALIGNED == 0 and slice_rows(count, 512) <= 512


def test_sums_are_added_up_in_float32() -> None:
    """In half precision 16 slices of ones would stop growing where a one is less than half a unit."""
    x = torch.ones(16 * 4096, FEATURES, dtype=torch.bfloat16)
    _, _, total = run(x, x, torch.zeros(WIDE, FEATURES, dtype=torch.bfloat16), 128)
    assert torch.equal(total, torch.full_like(total, 16 * 4096))


def test_no_more_than_a_slice_is_wide() -> None:
    class Widest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.shape[-1:] == (WIDE,)]
            self.numel = max([self.numel, *(t.numel() for t in made)])
            return result

    x, z, w = inputs(1, 1024)
    with Widest() as seen:
        by_slices.reference(x, [z], [w], program(), 256)
    assert seen.numel == 256 * WIDE


def test_inputs_are_left_as_they_were_and_rows_may_be_strided() -> None:
    x, z, w = inputs(2, 200)
    wider = torch.cat([x, x], -1)
    before = wider.clone()
    assert all(torch.equal(a, b) for a, b in zip(run(wider[..., :FEATURES], z, w, 128), run(x, z, w, 128), strict=True))
    assert torch.equal(wider, before)


def test_shapes_without_values() -> None:
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        x = mode.from_tensor(torch.empty(3, 50, FEATURES))
        found = run(x, x, mode.from_tensor(torch.empty(WIDE, FEATURES)), 128)
    sizes = [tuple(map(str, t.shape)) for t in found]
    batch, length = (str(s) for s in x.shape[:2])
    assert sizes[0] == (batch, length, str(FEATURES)) and sizes[2] == (str(FEATURES), str(FEATURES))


def test_registration() -> None:
    x, z, w = inputs(1, 150)
    torch.library.opcheck(
        by_slices.overload, (x, [z], [w], program(), 128), test_utils=("test_schema", "test_faketensor")
    )
    with FlopCounterMode(display=False) as counted:
        run(x, z, w, 128)
    assert counted.get_total_flops() == 4 * FEATURES * WIDE * 150
