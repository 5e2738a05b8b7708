"""rope: both directions of the rotation of q and k together, against float64."""

from __future__ import annotations

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
from unsloth.kernels.rope import MAX_WIDTH, rope

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# batch, query heads, key heads, length, width
SHAPES = [(2, 4, 2, 3, 64), (1, 3, 3, 3, 80), (3, 9, 3, 1, 96), (1, 1, 1, 5, 2)]


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers writes it."""
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)

    def rotate_half(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((-x2, x1), dim=-1)

    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
    table_dtype: torch.dtype | None = None,
    table_shape: tuple[int, ...] | None = None,
) -> Arguments:
    """q and k as projections leave them, [batch, length, heads, width] in memory; tables whose halves differ."""
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE)

    q, k = random(batch, length, heads, width), random(batch, length, kv_heads, width)
    angle = random(*(table_shape or (batch, length, width)))
    tables = (table.to(table_dtype or dtype) for table in (angle.cos(), angle.sin()))
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2), *tables


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_accurate() -> None:
    assert_accurate(rope, make, eager, dtypes=[F32, BF16, F16, F64], shapes=SHAPES)


@pytest.mark.parametrize(("dtype", "table_dtype"), [(BF16, F32), (F32, BF16), (F16, F32), (BF16, F16)])
def test_result_has_the_promoted_dtype(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    args = make((2, 4, 2, 7, 64), dtype, 0, table_dtype)
    for forward, _ in IMPLEMENTATIONS.values():
        assert forward(rope, *args)[0].dtype == torch.result_type(args[0], args[2])
    outputs = kernel_forward(rope, *args)
    for output, truth in zip(outputs, eager(*(x.double() for x in args)), strict=True):
        error = (output.double() - truth).norm() / truth.norm()
        assert error <= torch.finfo(output.dtype).eps


def test_gradients_reach_inputs_of_a_narrower_dtype() -> None:
    q, k, cos, sin = make((2, 4, 2, 7, 64), BF16, 0, F32)
    q.requires_grad_(), k.requires_grad_()
    q_out, k_out = rope(q, k, cos, sin)
    (q_out.square().sum() + k_out.sum()).backward()
    assert q.grad is not None and q.grad.dtype == BF16
    wide = q.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(eager(wide, k, cos, sin)[0].square().sum(), wide)
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
    q, k, cos, sin = make((2, 4, 2, 7, 64), F32)
    expanded = cos[:1].expand(2, 7, 64), sin[:, :1].expand(2, 7, 64)
    transposed = cos.transpose(0, 1).contiguous().transpose(0, 1), sin.mT.contiguous().mT
    for tables in (expanded, transposed):
        _assert_kernel_equals_reference((q, k, *tables))


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


@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout: str) -> None:
    x = layouts()[layout]
    q, k, cos, sin = make((2, 3, 3, 5, 16), F32)
    for args in ((x, k, cos, sin), (q, x, cos, sin)):
        assert_same_layout(kernel_forward(rope, *args), [args[0] * 2, args[1] * 2])  # what eager leaves
        _assert_kernel_equals_reference(args)
    for grads in ([x, torch.randn_like(k)], [torch.randn_like(q), x]):
        _assert_kernel_equals_reference((q, k, cos, sin), grads)


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
    cos = sin = torch.empty(1, 5, width, dtype=table)
    grads = rope.forward(q, k, cos, sin)
    rope.backward(*grads, cos, sin, [True, True])
    rope.backward(*grads, cos, sin, [False, True])
""")


# -- contract ----------------------------------------------------------------------------------------------------------


def test_skips_unneeded_gradients() -> None:
    assert_skips_unneeded(rope, *make((2, 4, 2, 7, 16), F32))


def test_tables_get_no_gradient() -> None:
    q, k, cos, sin = (x.requires_grad_() for x in make((2, 4, 2, 7, 16), F32))
    q_out, k_out = rope(q, k, cos, sin)
    (q_out.sum() + k_out.sum()).backward()
    assert q.grad is not None and k.grad is not None and cos.grad is None and sin.grad is None


@pytest.mark.parametrize("table_shape", [None, (1, 7, 16)])
def test_opcheck(table_shape: tuple[int, ...] | None) -> None:
    opcheck(rope, *make((2, 4, 3, 7, 16), F32, 0, None, table_shape))


def test_symbolic_sizes_are_not_guarded_on() -> None:
    for table_shape in ((3, 11, 16), (1, 11, 16)):
        assert_symbolic(rope, *make((3, 4, 2, 11, 16), BF16, 0, None, table_shape))


def test_supports_says_why_not() -> None:
    q, k, cos, sin = make((2, 4, 2, 7, 16), F32)

    def reason(*args: Tensor) -> str:
        return rope.supports(*args) or ""

    assert reason(q, k, cos, sin) == "" and reason(q, k, cos[0], sin[0]) == ""
    assert "float64" in reason(*(x.double() for x in (q, k, cos, sin)))
    assert "k is torch.bfloat16" in reason(q, k.bfloat16(), cos, sin)
    assert "sin is torch.bfloat16" in reason(q, k, cos, sin.bfloat16())
    assert "15" in reason(*(x[..., :15] for x in (q, k, cos, sin)))
    assert str(MAX_WIDTH) in reason(*(x.repeat_interleave(64, -1) for x in (q, k, cos, sin)))
    assert "number of heads" in reason(q, k[:, :, :3], cos, sin) and "number of heads" in reason(q, k[:1], cos, sin)
    assert "cos" in reason(q, k, cos[:, :3], sin) and "sin" in reason(q, k, cos, sin[..., :8])
    assert "cos" in reason(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
    assert "cos" in reason(q[:, :, :, :8], k[:, :, :, :8], cos, sin)


def test_what_it_does_not_support_still_computes() -> None:
    """A direct call in float64 runs the reference, in float64."""
    args = make((2, 4, 2, 7, 16), F64)
    outputs = kernel_forward(rope, *args)
    torch.testing.assert_close(outputs, eager(*args))
    grads = random_grads(rope, outputs)
    expected = reference_backward(rope, args, outputs, grads)
    torch.testing.assert_close(kernel_backward(rope, args, outputs, grads), expected)


def test_costs() -> None:
    args = make((2, 4, 2, 7, 16), BF16)
    assert rope.flops(*args) > 0 and rope.backward_flops(*args) > 0
    assert rope.bytes(*args) == 2 * (2 * 2 * (4 + 2) * 7 * 16 + 2 * 2 * 7 * 16)
