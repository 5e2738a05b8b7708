"""nf4_dequantize: reference and kernel (interpreted where there is no GPU) give bitsandbytes' weights, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.oracle import DEVICE, IMPLEMENTATIONS, assert_compiles, assert_fresh, assert_same_layout
from unsloth.kernels.nf4 import BLOCKS, GROUPS, NF4, nf4_dequantize

bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_nesting = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def quantised(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    block: int = 64,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, Any, tuple[Any, ...]]:
    """A random weight, bitsandbytes' quantisation of it, and the operator's arguments that unpack it."""
    generator = torch.Generator(DEVICE).manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator, device=DEVICE).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    inner = (state.state2.code, state.state2.absmax, state.offset) if nested else (None, None, None)
    nested_block = state.state2.blocksize if nested else 0
    arguments = (packed, state.absmax, *inner, rows, columns, block, nested_block, dtype)
    assert nf4_dequantize.supports(*arguments) is None
    return weight, state, arguments


def unpacked(implementation: str, arguments: tuple[Any, ...]) -> Tensor:
    forward, _ = IMPLEMENTATIONS[implementation]
    (weight,) = forward(nf4_dequantize, *arguments)
    return weight


def assert_kernel_equals_reference(arguments: tuple[Any, ...]) -> None:
    expected, actual = unpacked("reference", arguments), unpacked("kernel", arguments)
    assert_same_layout([actual], [expected])
    assert_fresh([actual], [a for a in arguments if isinstance(a, Tensor)])
    if DEVICE == "cpu" and expected.dtype == torch.bfloat16:
        # The interpreter cuts bfloat16 off where hardware rounds.
        exact = unpacked("reference", (*arguments[:-1], torch.float32))
        expected = (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert torch.equal(actual, expected)


# -- the formula -------------------------------------------------------------------------------------------------------


def test_the_table_is_bitsandbytes_own() -> None:
    assert torch.equal(torch.tensor(NF4), bnb.get_4bit_type("nf4", device="cpu"))


@each_nesting
def test_the_formula_one_weight_at_a_time(nested: bool) -> None:
    """high nibble first, a scale for every 32 weights in row-major order, rounded to float32 at every step."""
    _, state, arguments = quantised(5, 31, block=32, nested=nested)
    codes = [nibble for byte in arguments[0].flatten().tolist() for nibble in (byte >> 4, byte & 15)]
    expected = []
    for i in range(5 * 31):
        scale = state.absmax[i // 32].cpu()
        if nested:
            scale = state.state2.code[int(scale)] * state.state2.absmax[i // 32 // 256] + state.offset
        expected.append(float(torch.tensor(NF4[codes[i]], device=DEVICE) * scale.to(DEVICE)))
    assert unpacked("reference", arguments).flatten().tolist() == expected


@each_dtype
@each_nesting
@pytest.mark.parametrize("block", [64, 128, 2048])
# On the CPU, bitsandbytes 0.50 unpacks wrongly where a block crosses from one row into the next.
@pytest.mark.parametrize("shape", [(3, 2048), (2, 4096)] + ([(96, 160), (130, 96)] if DEVICE == "cuda" else []))
def test_bitsandbytes_weights(shape: tuple[int, int], block: int, nested: bool, dtype: torch.dtype) -> None:
    _, state, arguments = quantised(*shape, dtype, block=block, nested=nested)
    assert torch.equal(unpacked("reference", arguments), bnb.dequantize_4bit(arguments[0], state))


@each_nesting
@pytest.mark.parametrize("shape", [(96, 160), (130, 96), (7, 33), (1, 1)])
def test_blocks_cross_rows(shape: tuple[int, int], nested: bool) -> None:
    weight, _, arguments = quantised(*shape, nested=nested)
    error = (unpacked("reference", arguments) - weight).norm() / weight.norm()
    assert error < 0.12  # 4 bits; with the scales of other blocks it is above 0.2


# -- the kernel --------------------------------------------------------------------------------------------------------


@each_dtype
@each_nesting
@pytest.mark.parametrize("shape", [(8, 8 * GROUPS // 4), (65, 160), (33, 127), (3, 5), (1, 1)])
def test_kernel(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    """Whole programs, a last one cut within a group of eight, odd numbers of weights, fewer than a group."""
    assert_kernel_equals_reference(quantised(*shape, dtype, nested=nested)[2])


@each_nesting
@pytest.mark.parametrize("block", BLOCKS)
def test_kernel_with_every_block(block: int, nested: bool) -> None:
    assert_kernel_equals_reference(quantised(3, 3000, block=block, nested=nested)[2])


def test_kernel_with_several_nested_blocks() -> None:
    assert_kernel_equals_reference(quantised(40, 1000, block=32)[2])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_may_be_stored_as_any_dtype(storage: torch.dtype) -> None:
    expected = unpacked("reference", quantised(16, 64)[2])
    arguments = quantised(16, 64, storage=storage)[2]
    assert arguments[0].dtype == storage
    assert torch.equal(unpacked("reference", arguments), expected)
    assert_kernel_equals_reference(arguments)


def test_codes_need_no_alignment() -> None:
    packed, *rest = quantised(16, 64)[2]
    shifted = torch.cat((packed.new_zeros(1, 1), packed))[1:]
    assert torch.equal(unpacked("kernel", (shifted, *rest)), unpacked("kernel", (packed, *rest)))
    assert torch.equal(unpacked("kernel", (packed.t(), *rest)), unpacked("kernel", (packed, *rest)))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs 6 GB of GPU memory")
def test_more_weights_than_32_bits_count() -> None:
    rows, columns = (1 << 17) + 1, 1 << 14
    packed = torch.randint(256, (rows * columns // 2, 1), device=DEVICE, dtype=torch.uint8)
    packed[-columns // 2 :] = packed[: columns // 2]
    absmax = torch.ones(rows * columns // 64, device=DEVICE)
    weight = nf4_dequantize(packed, absmax, None, None, None, rows, columns, 64, 0, torch.bfloat16)
    assert weight.numel() > 1 << 31
    assert torch.equal(weight[-1], weight[0])


def test_compiles_for_hopper() -> None:
    assert_compiles("""
from unsloth.kernels.nf4 import nf4_dequantize
for rows, columns in ((64, 512), (7, 33)):
    packed, blocks = torch.zeros((rows * columns + 1) // 2, 1, dtype=torch.uint8), -(-rows * columns // 64)
    nested = torch.zeros(blocks, dtype=torch.uint8), torch.zeros(256), torch.zeros(1), torch.zeros(())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        nf4_dequantize.forward(packed, *nested, rows, columns, 64, 256, dtype)
        nf4_dequantize.forward(packed, torch.zeros(blocks), None, None, None, rows, columns, 64, 0, dtype)
""")


# -- the operator ------------------------------------------------------------------------------------------------------


@each_nesting
def test_opcheck(nested: bool) -> None:
    torch.library.opcheck(nf4_dequantize.overload, quantised(7, 33, torch.bfloat16, nested=nested)[2])


def test_it_has_no_gradient() -> None:
    """Loudly: a weight that lost its gradient would train wrongly and say nothing."""
    packed, absmax, *rest = quantised(16, 64, nested=False)[2]
    weight = nf4_dequantize(packed, absmax.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="nf4_dequantize"):
        weight.sum().backward()
    assert not hasattr(torch.ops.unsloth, "nf4_dequantize_backward")


def test_autocast_does_not_touch_it() -> None:
    arguments = quantised(16, 64)[2]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(nf4_dequantize(*arguments), nf4_dequantize.reference(*arguments))


def test_shape_and_costs_are_known_without_running() -> None:
    arguments = quantised(16, 64, torch.bfloat16)[2]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weight = nf4_dequantize(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        assert (weight.shape, weight.dtype, weight.device.type) == ((16, 64), torch.bfloat16, DEVICE)
    assert nf4_dequantize.bytes(*arguments) == 512 + 16 + 4 * (256 + 1 + 1) + 2 * 1024
    with FlopCounterMode(display=False) as counter:
        nf4_dequantize(*arguments)
    assert counter.get_total_flops() == 2 * 1024


def test_supports_says_why_not() -> None:
    *tensors, rows, columns, block, nested_block, dtype = quantised(16, 64)[2]
    packed, absmax, code, inner, offset = tensors

    def reason(*tensors: Tensor | None, rows: Any = rows, block: int = block, dtype: torch.dtype = dtype) -> str:
        return str(nf4_dequantize.supports(*tensors, rows, columns, block, nested_block, dtype))

    assert reason(*tensors) == "None"
    assert "float64" in reason(*tensors, dtype=torch.float64)
    assert "48 weights share a scale" in reason(*tensors, block=48)
    assert "do not hold 17 x 64" in reason(*tensors, rows=17)
    assert "do not hold 16 x 64" in reason(packed[1:], *tensors[1:])
    assert "is missing" in reason(packed, absmax, code, None, offset)
    assert "absmax is torch.uint8" in reason(packed, absmax, None, None, None)
    assert "absmax is torch.float32" in reason(packed, absmax.float(), code, inner, offset)
    assert "nested_code is torch.bfloat16" in reason(packed, absmax, code.bfloat16(), inner, offset)
    assert "nested_code has 255 values where 256 belong" in reason(packed, absmax, code[1:], inner, offset)
    assert "nested_offset has 2 values where 1 belong" in reason(packed, absmax, code, inner, offset.expand(2))
    assert "absmax has 15 values where 16 belong" in reason(packed, absmax[1:], code, inner, offset)
    assert "sizes are symbolic" in reason(*tensors, rows=_symbolic())


def _symbolic() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv().create_unbacked_symint()
