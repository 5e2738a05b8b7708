"""Fakes that are asked once for each layout: what is asked anew, and that answers are tensors of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true, sym_eq

from unsloth.kernels.glu import swiglu
from unsloth.kernels.shapes import once_per_layout


class Counted:
    """A fake, and how often it was asked."""

    def __init__(self, formula: Any) -> None:
        self.formula, self.asked = formula, 0
        self.remembered = once_per_layout(self)

    def __call__(self, *args: Any) -> Any:
        self.asked += 1
        return self.formula(*args)


def double(x: Tensor, number: Any = 1, flags: Any = ()) -> Tensor:
    return x + x


def test_a_layout_is_asked_about_once_and_answered_in_fresh_tensors() -> None:
    fake = Counted(lambda x: (x.t() + 1, x.sum(-1).to(torch.float64)))
    with FakeTensorMode():
        x, y = torch.empty(3, 5), torch.empty(3, 5)
        first, second = fake.remembered(x), fake.remembered(y)
    assert fake.asked == 1
    assert isinstance(second, tuple)
    for a, b in zip(first, second, strict=True):
        assert a is not b and a.untyped_storage()._cdata != b.untyped_storage()._cdata
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize(
    "other",
    [
        lambda: (torch.empty(5, 3),),
        lambda: (torch.empty(5, 3).t(),),
        lambda: (torch.empty(3, 5, dtype=torch.float16),),
        lambda: (torch.empty(3, 5, device="meta"),),
        lambda: (torch.empty(3, 5), True),
        lambda: (torch.empty(3, 5), 1.0),
        lambda: (torch.empty(3, 5), 1, [True, False]),
    ],
)
def test_what_differs_is_asked_about_anew(other: Any) -> None:
    fake = Counted(double)
    with FakeTensorMode():
        fake.remembered(torch.empty(3, 5), 1)
        answer, expected = fake.remembered(*other()), double(*other())
    assert fake.asked == 2
    assert (answer.shape, answer.stride(), answer.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert answer.device == expected.device


def test_autocast_is_asked_about_anew() -> None:
    fake = Counted(lambda x: x @ x)
    with FakeTensorMode():
        x = torch.empty(4, 4)
        assert fake.remembered(x).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fake.remembered(x).dtype == torch.bfloat16
        assert fake.remembered(x).dtype == torch.float32
    assert fake.asked == 2


def _symbolic(*shape: int) -> tuple[FakeTensorMode, Tensor]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode, mode.from_tensor(torch.empty(shape))


def test_symbolic_sizes_are_asked_about_once() -> None:
    fake = Counted(lambda x: (x + x, x.t() + 1))
    mode, x = _symbolic(7, 3)
    assert all(isinstance(size, torch.SymInt) for size in x.shape)
    with mode:
        first, second = fake.remembered(x), fake.remembered(x * 2)
    assert fake.asked == 1
    for a, b in zip(first, second, strict=True):
        assert a is not b and statically_known_true(sym_eq((*a.shape, *a.stride()), (*b.shape, *b.stride())))
        assert statically_known_true(a.untyped_storage().nbytes() == b.untyped_storage().nbytes())
        assert [size.node.hint for size in b.shape] == [size.node.hint for size in a.shape]
    assert not x.fake_mode.shape_env.guards


def test_another_symbol_and_another_trace_are_asked_about_anew() -> None:
    fake = Counted(double)
    for asked in (2, 4):
        mode, x = _symbolic(7, 3)  # whose symbols have the same names in each
        with mode:
            for y in (x, x.t()):
                answer = fake.remembered(y)
                assert answer.fake_mode is mode
                assert statically_known_true(sym_eq(tuple(answer.shape), tuple(y.shape)))
                assert answer.shape[0].node.shape_env is mode.shape_env
        assert fake.asked == asked


def test_sizes_read_off_the_data_are_asked_for_every_time() -> None:
    fake = Counted(lambda x: x.nonzero())
    mode, x = _symbolic(7, 3)
    with mode, x.fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        first, second = fake.remembered(x), fake.remembered(x + 0)
    assert fake.asked == 2
    assert first.shape[0].node.expr != second.shape[0].node.expr


def test_views_of_something_larger_are_asked_for_every_time() -> None:
    fake = Counted(lambda x: x.new_empty(8, 8)[:, :4])
    with FakeTensorMode():
        for _ in range(2):
            assert fake.remembered(torch.empty(2)).untyped_storage().nbytes() == 8 * 8 * 4
    assert fake.asked == 2


def test_an_error_is_raised_every_time() -> None:
    fake = Counted(lambda x: x @ x)
    with FakeTensorMode():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                fake.remembered(torch.empty(2, 3))
    assert fake.asked == 2


def test_of_one_mode_is_nothing_left_in_the_next() -> None:
    for _ in range(2):
        with FakeTensorMode() as mode:
            gate = torch.empty(2, 8, requires_grad=True)
            y = swiglu(gate, torch.empty(2, 8))
            assert y.fake_mode is mode and y.requires_grad
            y.sum().backward()
            assert gate.grad is not None and gate.grad.shape == gate.shape
