"""paged_attention: a query against keys that lie in pages, held against plain attention over the same keys."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import DEVICE, assert_compiles, assert_fresh, assert_same_layout, symbolic
from unsloth.kernels.paged_attention import in_slices, paged_attention

SHAPES = [  # heads, key heads, width, channels, page, lengths
    (4, 2, 16, 16, 4, (0, 3, 4, 21)),
    (6, 1, 24, 40, 16, (70, 1)),
    (3, 3, 33, 33, 8, (9, 200)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    shape: tuple[Any, ...], dtype: torch.dtype, seed: int, window: int | None = None, cap: float | None = None
) -> tuple[Any, ...]:
    """Pages dealt out in random order, one of them to nobody; what nobody may read is NaN."""
    heads, kv_heads, width, channels, page, lengths = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    most = max(-(-n // page) for n in lengths) + 1
    order = torch.randperm(most * len(lengths) + 1, generator=generator)[1:]
    tables = order.view(len(lengths), most).int()
    keys, values = random(len(order) + 1, kv_heads, page, width), random(len(order) + 1, kv_heads, page, channels)
    for row, length in enumerate(lengths):
        for position in range(length, most * page):
            keys[tables[row, position // page], :, position % page] = float("nan")
            values[tables[row, position // page], :, position % page] = float("nan")
    q, k, v = random(len(lengths), heads, 1, width), random(len(lengths), kv_heads, 1, width), None
    v = random(len(lengths), 1, kv_heads, channels).transpose(1, 2)
    tensors = (q, k, v, keys, values, tables, torch.tensor(lengths, dtype=torch.int32))
    return (*(x.to(DEVICE) for x in tensors), 0.2, window, cap)


def eager(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor,
    scale: float, window: int | None, cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence after the other, by the formula."""
    outs, lses = [], []
    for row, length in enumerate(lengths.tolist()):

        def context(own: Tensor, pages: Tensor, row: int = row, length: int = length) -> Tensor:
            past = torch.cat([pages[page] for page in tables[row].tolist()], dim=1)[:, :length]
            whole = torch.cat([past, own[row]], dim=1)
            whole = whole if window is None else whole[:, -window:]
            return whole.repeat_interleave(q.shape[1] // whole.shape[0], 0)

        scores = q[row] @ context(k, keys).transpose(-1, -2) * scale
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        outs.append(
            torch.softmax(scores, -1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
            @ context(v, values)
        )
        lses.append(torch.logsumexp(scores.double(), -1))
    return torch.stack(outs), torch.stack(lses)


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _implementations(slices: int) -> dict[str, Any]:
    return {"reference": paged_attention.reference, "kernel": lambda *args: in_slices(slices, *args)}


@pytest.mark.parametrize(("window", "cap"), [(None, None), (5, None), (17, 1.5)])
@pytest.mark.parametrize("slices", [1, 3])
def test_accuracy(slices: int, window: int | None, cap: float | None) -> None:
    """Error relative to float64, median over seeds: at most 1.1 times eager's, or two roundings."""
    for dtype in DTYPES if slices == 1 else DTYPES[:2]:
        for shape in SHAPES:
            cases = [inputs(shape, dtype, seed, window, cap) for seed in range(3)]
            truths = [eager(*map(_wide, case)) for case in cases]
            eagers = median(_error(eager(*case)[0], truth[0]) for case, truth in zip(cases, truths, strict=True))
            for name, run in _implementations(slices).items():
                found = [run(*case) for case in cases]
                error = median(_error(out, truth[0]) for (out, _), truth in zip(found, truths, strict=True))
                bar = max(1.1 * eagers, 2 * torch.finfo(dtype).eps)
                assert error <= bar, f"{name}, {dtype}, {shape}: {error:.2e}, eager has {eagers:.2e}"
                torch.testing.assert_close(found[0][1].double(), truths[0][1], rtol=1e-5, atol=1e-5)


def _error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("slices", [1, 4])
def test_layouts_and_fresh_memory(slices: int) -> None:
    arguments = inputs(SHAPES[0], torch.float32, 0)
    expected, found = paged_attention.reference(*arguments), in_slices(slices, *arguments)
    assert_same_layout(found, expected)
    assert_fresh(found, [x for x in arguments if isinstance(x, Tensor)])


def test_pytorchs_own_checks() -> None:
    torch.library.opcheck(paged_attention.overload, inputs(SHAPES[0], torch.float32, 0, 5))


def test_sizes_may_be_symbolic() -> None:
    with symbolic(*inputs(SHAPES[2], torch.float32, 0), static=(-1, 1)) as fakes:
        assert paged_attention.supports(*fakes) is None
        paged_attention(*fakes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: (a[0].expand(-1, -1, 2, -1), *a[1:]), "one query for each sequence, not 2"),
        (lambda a: (*a[:5], a[5].long(), *a[6:]), "have to be int32"),
        (lambda a: (a[0][:, :3], *a[1:]), "3 query heads are no multiple of 2 key heads"),
        (lambda a: (a[0].half(), *a[1:]), "differ in dtype"),
        (lambda a: (*a[:9], 0.0), "have to be positive"),
    ],
)
def test_refusals(change: Any, reason: str) -> None:
    assert reason in str(paged_attention.supports(*change(inputs(SHAPES[0], torch.float32, 0))))


def test_the_compiler_takes_the_kernels() -> None:
    assert_compiles("""
from unsloth.kernels.paged_attention import in_slices

for slices, dtype, heads, kv_heads, width, window, cap in [
    (1, torch.bfloat16, 32, 8, 128, None, None), (8, torch.float16, 9, 3, 64, 512, 50.0),
    (1, torch.float32, 4, 4, 80, None, None), (4, torch.bfloat16, 8, 4, 256, 4096, None),
]:
    q = torch.zeros(2, heads, 1, width, dtype=dtype)
    k = torch.zeros(2, kv_heads, 1, width, dtype=dtype)
    pages = torch.zeros(8, kv_heads, 32, width, dtype=dtype)
    tables, lengths = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    in_slices(slices, q, k, k, pages, pages, tables, lengths, 0.1, window, cap)
""")
