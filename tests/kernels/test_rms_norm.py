"""rms_norm and add_rms_norm: the three places where models round, forward and every gradient, against float64."""

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
from unsloth.kernels.operator import Operator
from unsloth.kernels.rms_norm import add_rms_norm, rms_norm
from unsloth.kernels.rows import MAX_HIDDEN

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Triton's interpreter truncates to bfloat16, where a GPU rounds: what is rounded midway is held to the bar in float16.
HALF, OTHER_HALF = (BF16, F16) if DEVICE == "cuda" else (F16, BF16)

LLAMA, GEMMA, OLMO = (0.0, True), (1.0, False), (0.0, False)
"""(offset, round_first) of the formulas that models spell out."""

SHAPES = [(17, 64), (3, 80), (1, 257), (3, 1), (2, 5, 1030), (2, 3, 4, 96)]


def eager(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> Tensor:
    """As transformers writes it."""
    wide = x.double() if x.dtype == F64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return (normed * offset).to(x.dtype)
    if round_first:
        return weight * normed.to(x.dtype)
    scale = weight.to(wide.dtype)
    return (normed * (offset + scale) if offset else scale * normed).to(x.dtype)


def eager_sum(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, eager(total, *others)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
    variant: tuple[float, bool] = LLAMA,
    weight_dtype: torch.dtype | None = None,
) -> Arguments:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    weight = torch.randn(shape[-1], generator=generator, device=DEVICE) * 0.3 + 1 - variant[0]
    # With one value per row and a small eps the gradient is a difference of equal numbers: any answer is noise.
    eps = 1e-5 if shape[-1] > 1 else 1.0
    return x, weight.to(weight_dtype or dtype), eps, *variant


def make_sum(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *options: Any) -> Arguments:
    x, *others = make(shape, dtype, seed, *options)
    generator = torch.Generator(DEVICE).manual_seed(100 + seed)
    return x, torch.randn(shape, generator=generator, device=DEVICE).to(dtype), *others


def without_weight(args: Arguments, offset: float = 1.0) -> Arguments:
    *tensors, _, eps, _, round_first = args
    return *tensors, None, eps, offset, round_first


# -- accuracy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [LLAMA, GEMMA, OLMO])
def test_accurate(variant: tuple[float, bool]) -> None:
    assert_accurate(
        rms_norm,
        lambda shape, dtype, seed: make(shape, dtype, seed, variant),
        eager,
        dtypes=[F32, BF16, F16, F64],
        shapes=SHAPES,
    )


@pytest.mark.parametrize("offset", [1.0, 0.125])
def test_accurate_without_weight(offset: float) -> None:
    """The plain norm, and the L2 norm, which is a scaled one."""

    def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Arguments:
        return without_weight(make(shape, dtype, seed), offset)

    def alone(x: Tensor, *others: Any) -> Tensor:
        return eager(x, *others)

    assert_accurate(rms_norm, arguments, alone, dtypes=[F32, BF16, F64], shapes=[(17, 64), (2, 5, 257)])


@pytest.mark.parametrize("variant", [LLAMA, GEMMA, OLMO])
def test_accurate_of_a_sum(variant: tuple[float, bool]) -> None:
    """Eager's own sum is rounded too, so that both implementations normalise what eager does."""

    def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Arguments:
        return make_sum(shape, dtype, seed, variant)

    assert_accurate(add_rms_norm, arguments, eager_sum, dtypes=[F32, HALF, F64], shapes=SHAPES)
    assert_accurate(
        add_rms_norm, lambda *a: without_weight(arguments(*a)), eager_sum, dtypes=[F32, HALF], shapes=SHAPES[:2]
    )


def test_the_sum_is_rounded_before_it_is_normalised() -> None:
    """Bitwise eager's, where normalising the exact sum would differ."""
    args = make_sum((64, 128), HALF)
    total, y, _ = kernel_forward(add_rms_norm, *args)
    assert torch.equal(total, args[0] + args[1])
    torch.testing.assert_close((total, y), eager_sum(*args))
    reference = reference_forward(add_rms_norm, *args)
    assert torch.equal(reference[1], eager_sum(*args)[1])
    exact = eager(args[0].float() + args[1].float(), *args[2:]).to(HALF)
    assert not torch.equal(reference[1], exact)


def test_the_residuals_gradient_is_that_of_x() -> None:
    """Through autograd, with both results used, with one, and with one input that wants none."""
    x, residual, weight, *others = make_sum((5, 80), F64)
    for of_total, of_y in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0)):
        for wanted in ("both", "x", "residual"):
            x.requires_grad_(wanted != "residual"), residual.requires_grad_(wanted != "x")
            leaves = [t for t in (x, residual, weight.requires_grad_()) if t.requires_grad]
            gradients = []
            for total, y in (add_rms_norm(x, residual, weight, *others)[:2], eager_sum(x, residual, weight, *others)):
                loss = of_total * total.square().sum() + of_y * y.sin().sum()
                gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("variant", [LLAMA, GEMMA, OLMO])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(HALF, F32), (F32, HALF), (HALF, OTHER_HALF)])
def test_accurate_with_weight_of_another_dtype(
    variant: tuple[float, bool], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    args = make((5, 80), dtype, 0, variant, weight_dtype)
    for forward, _ in IMPLEMENTATIONS.values():
        assert forward(rms_norm, *args)[0].dtype == eager(*args).dtype
    assert_accurate(
        rms_norm,
        lambda shape, dtype, seed: make(shape, dtype, seed, variant, weight_dtype),
        eager,
        dtypes=[dtype],
        shapes=[(5, 80)],
    )


def test_rounds_where_llama_rounds() -> None:
    """Bitwise equal to eager in bfloat16, where rounding late would differ."""
    args = make((64, 128), BF16)
    y, _ = reference_forward(rms_norm, *args)
    assert torch.equal(y, eager(*args))
    late, _ = reference_forward(rms_norm, *args[:4], False)
    assert not torch.equal(y, late)


def test_rstd() -> None:
    x, weight, eps, *variant = make((5, 7, 80), BF16)
    truth = torch.rsqrt(x.double().square().mean(-1) + eps)
    for forward, _ in IMPLEMENTATIONS.values():
        _, rstd = forward(rms_norm, x, weight, eps, *variant)
        assert rstd.dtype == F32 and rstd.shape == (5, 7)
        torch.testing.assert_close(rstd.double(), truth, rtol=1e-6, atol=0)


def test_large_and_tiny_values_stay_finite() -> None:
    for scale in (1e4, 1e-4, 0.0):
        x, *rest = make((3, 80), BF16)
        args = (x * scale, *rest)
        outputs = kernel_forward(rms_norm, *args)
        gradients = kernel_backward(rms_norm, args, outputs, random_grads(rms_norm, outputs))
        assert all(value.isfinite().all() for value in (*outputs, *gradients) if value is not None)


# -- kernel against reference: layouts and sizes -----------------------------------------------------------------------


def layouts() -> dict[str, Tensor]:
    """x as graphs hold it: [batch, heads, sequence, width] views and others."""
    base = torch.randn(3, 5, 4, 48, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    return {
        "transposed heads": base.transpose(1, 2),
        "slice of rows": base[..., :33].transpose(1, 2),
        "every other column": base[..., ::2],
        "fused projection": base.flatten(2)[..., :96].view(3, 5, 2, 48).transpose(1, 2),
        "expanded batch": base[:1].expand(3, -1, -1, -1),
        "one number": base[0, 0, 0, 0].expand(2, 3, 8),
        "last dimension not dense": base.permute(0, 2, 3, 1),
        "one token": base[:, :1].transpose(1, 2),
        "one row": base[0, 0, 0],
        "unaligned": base.flatten()[1:481].view(10, 48),
    }


@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout: str) -> None:
    x = layouts()[layout]
    _, weight, *others = make((x.shape[-1],), F32)
    args = (x, weight, *others)
    expected, outputs = reference_forward(rms_norm, *args), kernel_forward(rms_norm, *args)
    assert_same_layout(outputs, expected)
    assert_same_layout(outputs[:1], [x * 2])  # what eager leaves
    torch.testing.assert_close(outputs, expected)
    for grads in (
        [torch.randn_like(x)],
        [torch.randn(x.shape, device=DEVICE)],
        [torch.ones(1, device=DEVICE).expand_as(x)],
    ):
        expected_gradients = reference_backward(rms_norm, args, expected, grads)
        gradients = kernel_backward(rms_norm, args, outputs, grads)
        assert_same_layout(gradients, expected_gradients)
        torch.testing.assert_close(gradients, expected_gradients)


def test_strided_weight() -> None:
    x, weight, *others = make((4, 80), F32)
    args = (x, torch.stack([weight, weight], 1)[:, 0], *others)
    torch.testing.assert_close(kernel_forward(rms_norm, *args), reference_forward(rms_norm, x, weight, *others))


@pytest.mark.parametrize("rows", [1, 15, 16, 33, 130])
@pytest.mark.parametrize("hidden", [64, 96])
def test_rows_that_fill_a_program_and_rows_that_do_not(rows: int, hidden: int) -> None:
    _assert_kernel_equals_reference(make((rows, hidden), F32))


@pytest.mark.parametrize("hidden", [5000, MAX_HIDDEN])
def test_wide_rows(hidden: int) -> None:
    _assert_kernel_equals_reference(make((3, hidden), F32))


def _assert_kernel_equals_reference(args: Arguments, op: Operator = rms_norm) -> None:
    expected, outputs = reference_forward(op, *args), kernel_forward(op, *args)
    assert_same_layout(outputs, expected)
    torch.testing.assert_close(outputs, expected)
    grads = random_grads(op, outputs)
    torch.testing.assert_close(kernel_backward(op, args, outputs, grads), reference_backward(op, args, expected, grads))


def test_sums_of_any_layout() -> None:
    x, residual, *others = make_sum((3, 5, 2, 48), F32)
    for left, right in ((x.transpose(0, 1), residual.transpose(0, 1)), (x, residual[:, :1].expand(3, 5, 2, 48))):
        _assert_kernel_equals_reference((left, right, *others), add_rms_norm)
        _assert_kernel_equals_reference((left, left, *others), add_rms_norm)
    transposed = residual.transpose(0, 2).contiguous().transpose(0, 2)
    _assert_kernel_equals_reference((x, transposed, *others), add_rms_norm)


def test_no_rows() -> None:
    args = make((2, 0, 80), BF16)
    for forward, backward in IMPLEMENTATIONS.values():
        outputs = forward(rms_norm, *args)
        assert [tuple(y.shape) for y in outputs] == [(2, 0, 80), (2, 0)]
        grad_x, grad_weight = backward(rms_norm, args, outputs, random_grads(rms_norm, outputs))
        assert grad_x is not None and grad_x.shape == (2, 0, 80)
        assert grad_weight is not None and torch.equal(grad_weight, torch.zeros_like(args[1]))


def test_weight_gradient_is_the_same_every_time() -> None:
    args = make((130, 64), BF16)
    outputs = kernel_forward(rms_norm, *args)
    grads = random_grads(rms_norm, outputs)
    first, second = (kernel_backward(rms_norm, args, outputs, grads)[1] for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second)


def test_compiles() -> None:
    assert_compiles("""
from unsloth.kernels.rms_norm import add_rms_norm, rms_norm
for hidden, dtype in ((4096, torch.bfloat16), (257, torch.float32)):
    x, weight = torch.empty(64, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
    y, rstd = rms_norm.forward(x, weight, 1e-5, 0.0, True)
    rms_norm.backward(y, x, weight, rstd, 1e-5, 0.0, True, [True, True])
    total, y, rstd = add_rms_norm.forward(x, x, weight, 1e-5, 0.0, True)
    add_rms_norm.backward(total, y, total, weight, rstd, 1e-5, 0.0, True, [True, True])
    y, rstd = rms_norm.forward(x, None, 1e-5, 1.0, False)
    rms_norm.backward(y, x, None, rstd, 1e-5, 1.0, False, [True, False])
""")


# -- contract ----------------------------------------------------------------------------------------------------------


def test_skips_unneeded_gradients() -> None:
    assert_skips_unneeded(rms_norm, *make((5, 80), F32))
    assert_skips_unneeded(rms_norm, *without_weight(make((5, 80), F32)))
    assert_skips_unneeded(add_rms_norm, *make_sum((5, 80), F32))


def test_frozen_weight_gets_no_gradient() -> None:
    x, weight, *others = make((5, 80), F32)
    y, rstd = rms_norm(x.requires_grad_(), weight, *others)
    assert y.requires_grad and not rstd.requires_grad
    y.sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    x, *others = make((2, 3, 5, 48), F32)
    x = x.transpose(1, 2) if transposed else x
    opcheck(rms_norm, x, *others)
    opcheck(rms_norm, *without_weight((x, *others)))
    opcheck(add_rms_norm, x, x.flip(0), *others)


def test_symbolic_sizes_are_not_guarded_on() -> None:
    x, *others = make((3, 5, 7, 48), BF16)
    assert_symbolic(rms_norm, x, *others)
    assert_symbolic(rms_norm, x.transpose(1, 2), *others)
    assert_symbolic(rms_norm, *without_weight((x, *others)))
    assert_symbolic(add_rms_norm, x, x, *others)


def test_supports_says_why_not() -> None:
    x, weight, *others = make((3, 80), F32)

    def reason(x: Tensor, weight: Tensor) -> str:
        return rms_norm.supports(x, weight, *others) or ""

    assert reason(x, weight) == ""
    assert "last dimension" in reason(x, weight[:-1]) and "last dimension" in reason(x, weight.expand(3, 80))
    assert "float64" in reason(x.double(), weight) and "float64" in reason(x, weight.double())
    wide = torch.empty(1, MAX_HIDDEN + 1, device=DEVICE)
    assert str(MAX_HIDDEN) in reason(wide, wide[0]) and str(MAX_HIDDEN) in (rms_norm.supports(wide, None) or "")
    assert add_rms_norm.supports(x, x, weight, *others) is None
    assert "the residual is torch.bfloat16" in (add_rms_norm.supports(x, x.bfloat16(), weight, *others) or "")
    assert "one shape" in (add_rms_norm.supports(x, x[:1], weight, *others) or "")
    assert "last dimension" in (add_rms_norm.supports(x, x, weight[:-1], *others) or "")


def test_what_it_does_not_support_still_computes() -> None:
    """A direct call with float64, or with rows wider than the kernel holds, runs the reference."""
    for args in (make((3, 80), F64), make((2, MAX_HIDDEN + 1), F32)):
        outputs = kernel_forward(rms_norm, *args)
        torch.testing.assert_close(outputs[0], eager(*args))
        gradients = kernel_backward(rms_norm, args, outputs, random_grads(rms_norm, outputs))
        assert all(g is not None and g.isfinite().all() for g in gradients)


def test_costs() -> None:
    args = make((3, 80), BF16)
    assert rms_norm.flops(*args) > 0 and rms_norm.backward_flops(*args) > 0
    assert rms_norm.bytes(*args) == 2 * (3 * 80) * 2 + 80 * 2 + 3 * 4
    args = make_sum((3, 80), BF16)
    assert add_rms_norm.flops(*args) > rms_norm.flops(*args) > 0
    assert add_rms_norm.bytes(*args) == 4 * (3 * 80) * 2 + 80 * 2 + 3 * 4
