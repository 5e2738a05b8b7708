"""rope: both directions of the rotation of q and k together and of one alone, in every layout, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    Arguments,
    assert_accurate,
    assert_compiles,
    assert_same_layout,
    assert_skips_unneeded,
    assert_symbolic,
    kernel_backward,
    kernel_forward,
    opcheck,
    random_grads,
    reference_backward,
    reference_forward,
)
from unsloth.kernels.rope import MAX_WIDTH, rope, rope_of_one

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# batch, query heads, key heads, length, width
SHAPES = [(2, 4, 2, 3, 64), (1, 3, 3, 3, 80), (3, 9, 3, 1, 96), (1, 1, 1, 5, 2)]

LLAMA, COHERE, DEEPSEEK = (False, False), (True, True), (True, False)
"""(interleaved, interleaved_out) of the layouts that models use."""
LAYOUTS = [LLAMA, COHERE, DEEPSEEK, (False, True)]


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)  # type: ignore[return-value]


def joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, interleaved_out: bool, narrow: bool) -> Tensor:
    """As transformers writes it, with tables per feature (Llama, Cohere) or per pair (DeepSeek)."""
    x1, x2 = pairs(x, interleaved)
    if cos.shape[-1] == x.shape[-1]:
        y = x * cos + joined(-x2, x1, interleaved) * sin
    else:
        y = joined(x1 * cos - x2 * sin, x2 * cos + x1 * sin, interleaved_out)
    return y.to(x.dtype) if narrow else y


def eager(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return rotated(q, *others), rotated(k, *others)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
    table_dtype: torch.dtype | None = None,
    table_shape: tuple[int, ...] | None = None,
    layout: tuple[bool, bool] = LLAMA,
    per_pair: bool | None = None,
    heads_last: bool = False,
    narrow: bool = False,
) -> Arguments:
    """q and k as projections leave them, [batch, length, heads, width] in memory; tables whose pairs differ."""
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE)

    q, k = (random(batch, length, n, width).to(dtype) for n in (heads, kv_heads))
    if not heads_last:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    if per_pair is None:
        per_pair = layout[0] != layout[1]
    angle = random(*(table_shape or (batch, length, width)))[..., : width // (1 + per_pair)]
    angle = angle.unsqueeze(2 if heads_last else -3)
    tables = (table.to(table_dtype or dtype) for table in (angle.cos(), angle.sin()))
    return q, k, *tables, *layout, narrow


def of_one(args: Arguments) -> Arguments:
    """The arguments for q alone."""
    return args[0], *args[2:]


# -- accuracy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_pair", [False, True])
def test_accurate(layout: tuple[bool, bool], per_pair: bool) -> None:
    if layout[0] != layout[1] and not per_pair:
        return  # refused: see test_supports_says_why_not

    def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Arguments:
        return make(shape, dtype, seed, layout=layout, per_pair=per_pair)

    dtypes = [F32, BF16, F16, F64] if layout == LLAMA else [F32, BF16]
    assert_accurate(rope, arguments, eager, dtypes=dtypes, shapes=SHAPES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accurate_alone(layout: tuple[bool, bool]) -> None:
    def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Arguments:
        return of_one(make(shape, dtype, seed, layout=layout))

    assert_accurate(rope_of_one, arguments, rotated, dtypes=[F32, BF16], shapes=SHAPES[:2])


@pytest.mark.parametrize("layout", [LLAMA, DEEPSEEK])
def test_accurate_with_heads_last(layout: tuple[bool, bool]) -> None:
    def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Arguments:
        return make(shape, dtype, seed, layout=layout, heads_last=True)

    assert_accurate(rope, arguments, eager, dtypes=[F32, BF16], shapes=SHAPES)


def test_accurate_where_wide_tables_leave_a_narrow_result() -> None:
    def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Arguments:
        return make(shape, dtype, seed, F32, narrow=True)

    assert rope(*arguments(SHAPES[0], BF16, 0))[0].dtype == BF16
    assert_accurate(rope, arguments, eager, dtypes=[BF16, F16], shapes=SHAPES[:2])


def test_tables_as_complex_numbers_hold_them() -> None:
    q, k, cos, sin, *_ = make((2, 4, 2, 7, 64), F32, layout=COHERE, per_pair=True)
    table = torch.view_as_real(torch.complex(cos, sin))
    _assert_kernel_equals_reference((q, k, table[..., 0], table[..., 1], True, True, False))


def test_images_have_no_batch() -> None:
    q, k, cos, sin, *flags = make((1, 4, 4, 7, 16), F32, heads_last=True)
    args = q[0], k[0], cos[0], sin[0], *flags
    torch.testing.assert_close(kernel_forward(rope, *args), eager(*args))
    _assert_kernel_equals_reference(args)


@pytest.mark.parametrize(("dtype", "table_dtype"), [(BF16, F32), (F32, BF16), (F16, F32), (BF16, F16)])
def test_result_has_the_promoted_dtype(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    args = make((2, 4, 2, 7, 64), dtype, 0, table_dtype)
    for forward, _ in IMPLEMENTATIONS.values():
        assert forward(rope, *args)[0].dtype == torch.result_type(args[0], args[2])
    outputs = kernel_forward(rope, *args)
    for output, truth in zip(outputs, eager(*(x.double() if isinstance(x, Tensor) else x for x in args)), strict=True):
        error = (output.double() - truth).norm() / truth.norm()
        assert error <= torch.finfo(output.dtype).eps


def test_gradients_reach_inputs_of_a_narrower_dtype() -> None:
    q, k, *others = make((2, 4, 2, 7, 64), BF16, 0, F32)
    q.requires_grad_(), k.requires_grad_()
    q_out, k_out = rope(q, k, *others)
    (q_out.square().sum() + k_out.sum()).backward()
    assert q.grad is not None and q.grad.dtype == BF16
    wide = q.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(eager(wide, k, *others)[0].square().sum(), wide)
    assert (q.grad - expected).norm() / expected.norm() <= torch.finfo(BF16).eps


def test_backward_is_the_transpose_and_not_the_inverse() -> None:
    """<R q, g> = <q, Rt g>, for tables whose halves differ."""
    args = make((2, 3, 1, 5, 16), F64)
    outputs = reference_forward(rope, *args)
    grads = random_grads(rope, outputs)
    for x, y, g, dx in zip(args, outputs, grads, reference_backward(rope, args, outputs, grads), strict=False):
        assert dx is not None
        torch.testing.assert_close((y * g).sum(), (x * dx).sum())


# -- kernel against reference: tables, layouts, sizes ------------------------------------------------------------------


def _assert_kernel_equals_reference(args: Arguments, grads: list[Tensor] | None = None) -> None:
    expected, outputs = reference_forward(rope, *args), kernel_forward(rope, *args)
    assert_same_layout(outputs, expected)
    torch.testing.assert_close(outputs, expected)
    grads = grads or random_grads(rope, outputs)
    expected_gradients = reference_backward(rope, args, expected, grads)
    gradients = kernel_backward(rope, args, outputs, grads)
    assert_same_layout(gradients, expected_gradients)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("table_shape", [(2, 7, 64), (1, 7, 64), (7, 64)])
def test_tables_serve_one_batch_or_all(table_shape: tuple[int, ...]) -> None:
    args = make((2, 4, 2, 7, 64), F32, 0, None, table_shape)
    torch.testing.assert_close(kernel_forward(rope, *args), eager(*args))
    _assert_kernel_equals_reference(args)


def test_tables_of_any_strides() -> None:
    q, k, cos, sin, *flags = make((2, 4, 2, 7, 64), F32)
    expanded = cos[:1].expand(2, 1, 7, 64), sin[:, :, :1].expand(2, 1, 7, 64)
    transposed = cos.transpose(0, 2).contiguous().transpose(0, 2), sin.mT.contiguous().mT
    for tables in (expanded, transposed):
        _assert_kernel_equals_reference((q, k, *tables, *flags))


def layouts() -> dict[str, Tensor]:
    """x of shape [2, 3, 5, 16] as graphs hold it."""
    base = torch.randn(2, 5, 9, 32, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    heads = base[:, :, :3, :16].contiguous()
    return {
        "transposed": heads.transpose(1, 2),
        "contiguous": heads.transpose(1, 2).contiguous(),
        "fused projection": base[..., :16][:, :, 3:6].transpose(1, 2),
        "part of the width": base[:, :, :3, 16:].transpose(1, 2),
        "expanded batch": heads[:1].expand(2, -1, -1, -1).transpose(1, 2),
        "expanded heads": heads[:, :, :1].expand(-1, -1, 3, -1).transpose(1, 2),
        "one number": heads[0, 0, 0, 0].expand(2, 3, 5, 16),
        "every other column": base[:, :, :3, ::2].transpose(1, 2),
        "last dimension not dense": heads.permute(0, 3, 2, 1).contiguous().permute(0, 2, 3, 1),
        "unaligned": torch.arange(481.0, device=DEVICE)[1:].sin().view(2, 5, 3, 16).transpose(1, 2),
    }


@pytest.mark.parametrize("memory", layouts())
@pytest.mark.parametrize("layout", [LLAMA, COHERE])
def test_layouts(memory: str, layout: tuple[bool, bool]) -> None:
    x = layouts()[memory]
    q, k, *others = make((2, 3, 3, 5, 16), F32, layout=layout)
    for args in ((x, k, *others), (q, x, *others)):
        assert_same_layout(kernel_forward(rope, *args), [args[0] * 2, args[1] * 2])  # what eager leaves
        _assert_kernel_equals_reference(args)
    for grads in ([x, torch.randn_like(k)], [torch.randn_like(q), x]):
        _assert_kernel_equals_reference((q, k, *others), grads)


@pytest.mark.parametrize("shape", [(1, 5, 1, 3, 40), (1, 40, 8, 2, 128), (1, 3, 1, 2, MAX_WIDTH)])
def test_more_heads_than_a_tile_and_heads_that_fill_none(shape: tuple[int, ...]) -> None:
    _assert_kernel_equals_reference(make(shape, F32))


@pytest.mark.parametrize("shape", [(0, 4, 2, 7, 16), (2, 4, 2, 0, 16)])
def test_no_positions(shape: tuple[int, ...]) -> None:
    args = make(shape, BF16)
    for forward, backward in IMPLEMENTATIONS.values():
        outputs = forward(rope, *args)
        gradients = backward(rope, args, outputs, random_grads(rope, outputs))
        assert (
            [y.shape for y in outputs] == [g.shape for g in gradients if g is not None] == [x.shape for x in args[:2]]
        )


def test_compiles() -> None:
    assert_compiles("""
from unsloth.kernels.rope import rope
for width, dtype, table in ((128, torch.bfloat16, torch.bfloat16), (80, torch.bfloat16, torch.float32)):
    q, k = (torch.empty(1, 5, heads, width, dtype=dtype).transpose(1, 2) for heads in (40, 8))
    cos = sin = torch.empty(1, 1, 5, width, dtype=table)
    for interleaved in (False, True):
        tables = (x[..., : width // (1 + interleaved)] for x in (cos, sin))
        others = (*tables, interleaved, False, False)
        grads = rope.forward(q, k, *others)
        rope.backward(*grads, *others, [True, True])
        rope.backward(*grads, *others, [False, True])
""")


# -- contract ----------------------------------------------------------------------------------------------------------


def test_skips_unneeded_gradients() -> None:
    assert_skips_unneeded(rope, *make((2, 4, 2, 7, 16), F32))


def test_tables_get_no_gradient() -> None:
    q, k, cos, sin, *flags = make((2, 4, 2, 7, 16), F32)
    q, k, cos, sin = (x.requires_grad_() for x in (q, k, cos, sin))
    q_out, k_out = rope(q, k, cos, sin, *flags)
    (q_out.sum() + k_out.sum()).backward()
    assert q.grad is not None and k.grad is not None and cos.grad is None and sin.grad is None


@pytest.mark.parametrize("table_shape", [None, (1, 7, 16)])
@pytest.mark.parametrize("heads_last", [False, True])
def test_opcheck(table_shape: tuple[int, ...] | None, heads_last: bool) -> None:
    args = make((2, 4, 3, 7, 16), F32, 0, None, table_shape, heads_last=heads_last)
    opcheck(rope, *args)
    opcheck(rope_of_one, *of_one(args))


@pytest.mark.parametrize("layout", [LLAMA, DEEPSEEK])
def test_symbolic_sizes_are_not_guarded_on(layout: tuple[bool, bool]) -> None:
    for table_shape, heads_last in (((3, 11, 16), False), ((1, 11, 16), False), ((3, 11, 16), True)):
        args = make((3, 4, 2, 11, 16), BF16, 0, None, table_shape, layout, heads_last=heads_last)
        assert_symbolic(rope, *args)
        assert_symbolic(rope_of_one, *of_one(args))


def test_supports_says_why_not() -> None:
    q, k, cos, sin, *flags = make((2, 4, 2, 7, 16), F32)

    def reason(*args: Tensor, flags: Any = flags) -> str:
        return rope.supports(*args, *flags) or ""

    assert reason(q, k, cos, sin) == "" and reason(q, k, cos[0, 0], sin[0, 0]) == ""
    assert "float64" in reason(*(x.double() for x in (q, k, cos, sin)))
    assert "k is torch.bfloat16" in reason(q, k.bfloat16(), cos, sin)
    assert "sin is torch.bfloat16" in reason(q, k, cos, sin.bfloat16())
    assert "15" in reason(*(x[..., :15] for x in (q, k, cos, sin)))
    assert str(MAX_WIDTH) in reason(*(x.repeat_interleave(64, -1) for x in (q, k, cos, sin)))
    assert "their heads" in reason(q, k[0], cos[:1], sin[:1]) and "their heads" in reason(q, k[:1], cos, sin)
    assert "their heads" in reason(q, k[:, :, :3], cos, sin)
    assert "one shape" in reason(q, k, cos, sin[..., :8])
    assert "not known to fit" in reason(q, k, cos[:, :, :3], sin[:, :, :3])
    assert "their heads" in reason(q, k, cos[:, 0], sin[:, 0])  # taken for [length, 1, width]
    assert "not known to fit" in rope_of_one.supports(q, cos[:, 0], sin[:, 0], *flags)
    assert "not known to fit" in reason(q[..., :8], k[..., :8], cos[..., :6], sin[..., :6])
    assert "differs between heads" in reason(q, q, *(x.expand(2, 4, 7, 16) for x in (cos, sin)))
    assert "broadcast" in reason(*(x.unsqueeze(0) for x in (q, k, cos, sin)))
    assert "one value per pair" in reason(q, k, cos, sin, flags=(True, False, False))
    assert reason(q, k, cos[..., :8], sin[..., :8], flags=(True, False, False)) == ""


def test_what_it_does_not_support_still_computes() -> None:
    """A direct call in float64 runs the reference, in float64."""
    args = make((2, 4, 2, 7, 16), F64, layout=DEEPSEEK)
    outputs = kernel_forward(rope, *args)
    torch.testing.assert_close(outputs, eager(*args))
    grads = random_grads(rope, outputs)
    expected = reference_backward(rope, args, outputs, grads)
    torch.testing.assert_close(kernel_backward(rope, args, outputs, grads), expected)


def test_costs() -> None:
    args = make((2, 4, 2, 7, 16), BF16)
    assert rope.flops(*args) > 0 and rope.backward_flops(*args) > 0
    assert rope.bytes(*args) == 2 * (2 * 2 * (4 + 2) * 7 * 16 + 2 * 2 * 7 * 16)
    one = of_one(args)
    assert rope_of_one.flops(*one) > 0 and rope_of_one.backward_flops(*one) > 0
