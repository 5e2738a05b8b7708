"""linear_cross_entropy: kernel (interpreted where there is no GPU) and reference, against float64 and PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_compiles,
    assert_skips_unneeded,
    assert_symbolic,
    opcheck,
)
from unsloth.kernels import logit_chunks
from unsloth.kernels.linear_cross_entropy import linear_cross_entropy

IGNORED = -100
VOCABULARY = 1003  # odd: rows are padded, and the last block is not full
WIDTH = 24
ALL = [True, True, True]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have few rows: cut them into chunks as if they were many."""
    monkeypatch.setattr(logit_chunks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(logit_chunks, "MIN_ROWS", 16)


@dataclass
class Setting:
    """What an operator's call fixes besides its tensors."""

    mean: bool = True
    scale: float = 1.0
    softcap: float = 0.0
    statistics: bool = False
    wants: tuple[bool, bool, bool] = (True, True, True)
    ignore_index: int = IGNORED

    def arguments(self, *tensors: Any) -> tuple[Any, ...]:
        others = self.ignore_index, self.mean, self.scale, self.softcap, self.statistics, list(self.wants)
        return (*tensors, *others)


def make(
    rows: tuple[int, ...] = (2, 23),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    vocabulary: int = VOCABULARY,
    bias: bool = True,
    ignored: float = 0.3,
) -> tuple[Any, ...]:
    """hidden, weight, bias and labels, with logits of a standard deviation of about 2."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    hidden, weight = normal(*rows, WIDTH).to(dtype), (0.4 * normal(vocabulary, WIDTH)).to(dtype)
    labels = torch.randint(vocabulary, rows, generator=generator, device=DEVICE)
    labels[torch.rand(rows, generator=generator, device=DEVICE) < ignored] = IGNORED
    return hidden, weight, normal(vocabulary).to(dtype) if bias else None, labels


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if scale != 1.0:
        logits = logits * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    scale: float,
    softcap: float,
    *_: Any,
) -> Tensor:
    """As transformers computes it: logits in the model's dtype, their loss in float32."""
    logits = logits_of(hidden, weight, bias, scale, softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    reduction = "mean" if mean else "sum"
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction=reduction)


def run(implementation: str, *args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[implementation][0](linear_cross_entropy, *args)


def gradients(implementation: str, args: tuple[Any, ...], outputs: Any, upstream: float = 1.0) -> tuple[Any, ...]:
    """Of hidden, weight and, if there is one, bias."""
    grad = torch.tensor(upstream, device=DEVICE)
    found = IMPLEMENTATIONS[implementation][1](linear_cross_entropy, args, outputs, [grad])
    return tuple(g for g in found if g is not None)


def expected_gradients(args: tuple[Any, ...], upstream: float = 1.0, double: bool = False) -> tuple[Tensor, ...]:
    leaves = [x.double() if double else x.clone() for x in args[:3] if x is not None]
    leaves = [x.requires_grad_() for x in leaves]
    loss = eager(*leaves[:2], leaves[2] if len(leaves) > 2 else None, *args[3:])
    return torch.autograd.grad(upstream * loss, leaves)


# -- accuracy ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "mean": Setting(),
    "sum": Setting(mean=False),
    "scaled": Setting(scale=0.3),
    "softcapped": Setting(softcap=5.0),
    "everything": Setting(mean=False, scale=1.7, softcap=5.0, statistics=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_accuracy(setting: Setting, dtype: torch.dtype) -> None:
    def inputs(rows: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return setting.arguments(*make(rows, dtype, seed))

    # Many seeds: the error of one loss is a single number, and by chance eager's may be close to none.
    assert_accurate(linear_cross_entropy, inputs, eager, dtypes=[dtype], shapes=[(2, 23)], seeds=range(11))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(40,), (3, 2, 9)])
@pytest.mark.parametrize("vocabulary", [3, 4999])
def test_accuracy_of_other_shapes(rows: tuple[int, ...], vocabulary: int, dtype: torch.dtype) -> None:
    def inputs(rows: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return Setting().arguments(*make(rows, dtype, seed, vocabulary=vocabulary, bias=False, ignored=0.0))

    assert_accurate(linear_cross_entropy, inputs, eager, dtypes=[dtype], shapes=[rows])


@each_implementation
def test_one_row(implementation: str) -> None:
    """Two products with a vector: their libraries add in orders of their own, so the bar is not eager's error."""
    args = Setting().arguments(*make((1,), vocabulary=4999, bias=False, ignored=0.0))
    outputs = run(implementation, *args)
    torch.testing.assert_close(outputs[0], eager(*args))
    for value, truth in zip(
        gradients(implementation, args, outputs), expected_gradients(args, double=True), strict=True
    ):
        assert (value.double() - truth).norm() <= 5e-6 * truth.norm()


@each_implementation
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_large_logits(implementation: str, softcap: float) -> None:
    """Far beyond where exp overflows, and with differences that a logsumexp of that size could not represent."""
    hidden = torch.zeros(32, WIDTH, device=DEVICE)
    hidden[:, 0] = torch.linspace(-1e4, 1e4, 32, device=DEVICE)
    _, weight, _, labels = make((32,), ignored=0.0)
    weight = 1 + 1e-4 * weight
    args = Setting(softcap=softcap, statistics=True).arguments(hidden, weight, None, labels)
    outputs = run(implementation, *args)
    truth = eager(*(x.double() if x is not None and x.is_floating_point() else x for x in args[:4]), *args[4:])
    torch.testing.assert_close(outputs[0], truth.float(), rtol=1e-3, atol=1e-3)
    assert bool((outputs[2] >= 0).all()) and bool((outputs[2] <= math.log(VOCABULARY) + 1e-4).all())
    for gradient, expected in zip(gradients(implementation, args, outputs), expected_gradients(args), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


@each_implementation
def test_masked_vocabulary(implementation: str) -> None:
    """A token that cannot be: probability 0, and no NaN from 0 · log 0."""
    hidden, weight, bias, _ = make()
    bias[500:] = -math.inf
    bias[:7] = -math.inf
    labels = torch.full(hidden.shape[:-1], 8, device=DEVICE)
    args = Setting(statistics=True).arguments(hidden, weight, bias, labels)
    outputs = run(implementation, *args)
    torch.testing.assert_close(outputs[0], eager(*args))
    log_p = torch.log_softmax(F.linear(hidden, weight, bias)[..., 7:500], dim=-1)
    torch.testing.assert_close(outputs[2], -(log_p.exp() * log_p).sum(-1))
    for gradient, expected in zip(gradients(implementation, args, outputs), expected_gradients(args), strict=True):
        torch.testing.assert_close(gradient, expected)


@each_implementation
@pytest.mark.parametrize("mean", [True, False])
def test_float16_neither_overflows_nor_vanishes(implementation: str, mean: bool) -> None:
    """W's gradient of the sum is above 65504 here, hidden's of the mean would be subnormal before the loss scale."""
    rows = 512
    hidden, weight, _, _ = make((rows,), torch.float16)
    hidden[:, 0], weight[:, 0] = 200.0, 0.01
    labels = torch.full((rows,), 5, device=DEVICE)
    args = Setting(mean=mean).arguments(hidden, weight, None, labels)
    upstream = 128.0 if mean else 128.0 / rows
    ours = gradients(implementation, args, run(implementation, *args), upstream)
    for gradient, truth in zip(ours, expected_gradients(args, upstream, double=True), strict=True):
        assert (gradient.double() - truth).norm() <= 2e-3 * truth.norm()


# -- labels ------------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.9, 1.0], ids=["no row", "most rows", "all rows"])
def test_ignored_rows(implementation: str, mean: bool, ignored: float) -> None:
    args = Setting(mean=mean).arguments(*make(ignored=ignored))
    outputs = run(implementation, *args)
    torch.testing.assert_close(outputs[0], eager(*args), equal_nan=True)
    assert bool(outputs[0].isnan()) == (mean and ignored == 1.0), "the mean of nothing"
    for gradient, expected in zip(gradients(implementation, args, outputs), expected_gradients(args), strict=True):
        torch.testing.assert_close(gradient, expected)


@each_implementation
def test_another_ignore_index(implementation: str) -> None:
    """A label that is ignored is no class, even where it is one."""
    hidden, weight, bias, labels = make(ignored=0.0)
    labels[0] = 7
    args = Setting(ignore_index=7).arguments(hidden, weight, bias, labels)
    outputs = run(implementation, *args)
    torch.testing.assert_close(outputs[0], eager(*args))
    for gradient, expected in zip(gradients(implementation, args, outputs), expected_gradients(args), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("label", [VOCABULARY, -1, 1 << 40])
def test_a_label_outside_of_the_vocabulary_is_not_silent(label: int) -> None:
    hidden, weight, bias, labels = make()
    labels[1, 3] = label
    args = Setting().arguments(hidden, weight, bias, labels)
    loss, *rest = run("kernel", *args)
    assert bool(loss.isnan())
    for gradient in gradients("kernel", args, (loss, *rest)):
        assert bool(gradient.isnan().any())
    if DEVICE == "cpu":  # on CUDA PyTorch's assertion would end the process
        with pytest.raises(RuntimeError, match="out of bounds"):
            run("reference", *args)


def test_too_few_labels() -> None:
    hidden, weight, bias, labels = make()
    with pytest.raises(ValueError, match="45 labels for 46 rows"):
        linear_cross_entropy.reference(*Setting().arguments(hidden, weight, bias, labels.flatten()[1:]))


# -- statistics --------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", [Setting(), Setting(scale=0.3, softcap=5.0)], ids=["plain", "softcapped"])
def test_statistics(implementation: str, setting: Setting, dtype: torch.dtype) -> None:
    """Of every row, ignored ones included; loss and gradients do not change with them."""
    tensors = make(dtype=dtype, vocabulary=4999)
    setting.statistics = True
    args = setting.arguments(*tensors)
    outputs = run(implementation, *args)
    raw = F.linear(*tensors[:3]).double() * setting.scale  # rounded as logits are
    x = setting.softcap * torch.tanh(raw / setting.softcap) if setting.softcap else raw
    log_p = torch.log_softmax(x, dim=-1)
    torch.testing.assert_close(outputs[2].double(), -(log_p.exp() * log_p).sum(-1), rtol=2e-6, atol=2e-6)
    assert torch.equal(outputs[3], raw.argmax(-1))
    setting.statistics = False
    without = run(implementation, *setting.arguments(*tensors))
    assert without[2].numel() == without[3].numel() == 0
    for got, expected in zip([outputs[0], *outputs[4:]], [without[0], *without[4:]], strict=True):
        assert torch.equal(got, expected)


@each_implementation
def test_the_first_of_equal_logits_is_top(implementation: str) -> None:
    hidden, weight, _, labels = make(vocabulary=9001)
    weight[:] = 0
    weight[[70, 4500, 8999]] = 1.0
    hidden = hidden.abs()
    outputs = run(implementation, *Setting(statistics=True).arguments(hidden, weight, None, labels))
    assert bool((outputs[3] == 70).all())


# -- memory ------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest memory that any operator's result lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_never_whole(implementation: str, dtype: torch.dtype) -> None:
    """Nothing in forward or backward is larger than the float32 version of one chunk, for which the reference asks."""
    setting = Setting(statistics=True, softcap=5.0, wants=(True, False, True))
    args = setting.arguments(*make((3, 67), dtype))
    with LargestTensor() as seen:
        outputs = run(implementation, *args)
        IMPLEMENTATIONS[implementation][1](linear_cross_entropy, args, outputs, [outputs[0]], [True, False, True])
    assert seen.bytes <= max(16 * 1024 * 4, args[1].nbytes) < 201 * VOCABULARY * 2


@pytest.mark.skipif(DEVICE != "cuda", reason="measures the GPU's memory")
def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows, vocabulary = 4096, 128256
    hidden = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, 1024, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(*Setting(wants=(True, False, False)).arguments(hidden, weight, None, labels))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= logit_chunks.CHUNK_BYTES + 3 * hidden.nbytes + (64 << 20), f"{peak >> 20} MiB"


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 1024, 1047, 4096, 4097, 100_000])
@pytest.mark.parametrize("vocabulary", [2, 32_000, 128_256, 262_144])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks(rows: int, vocabulary: int, itemsize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    step = logit_chunks.chunk_rows(rows, vocabulary, itemsize)
    assert 1 <= step <= math.ceil(rows / 2), "never all rows at once"
    assert step <= 128 or step * vocabulary * itemsize <= logit_chunks.CHUNK_BYTES
    chunks = math.ceil(rows / step)
    assert step * chunks - rows < chunks, "chunks are of one size, give or take a row"
    assert step >= 128 or chunks <= 2, "no chunk is small for no reason"


def test_chunks_that_are_summed_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    frozen, trained = (logit_chunks.chunk_rows(8192, 128_256, 2, summed) for summed in (0, 2048))
    assert (frozen, trained) == (1024, 2048)
    assert trained * 128_256 * 2 <= 128_256 * 2048 * 4 // 2  # half of the float32 sum at most
    assert logit_chunks.chunk_rows(4096, 128_256, 2, 8192) == 2048  # two at least


@each_implementation
def test_chunks_make_no_difference(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Setting(statistics=True).arguments(*make((61,)))
    many = run(implementation, *args)
    monkeypatch.setattr(logit_chunks, "MIN_ROWS", 1000)
    for a, b in zip(many, run(implementation, *args), strict=True):
        torch.testing.assert_close(a, b)


# -- contract ----------------------------------------------------------------------------------------------------------


def test_unneeded_gradients_are_not_made() -> None:
    assert_skips_unneeded(linear_cross_entropy, *Setting().arguments(*make()))
    assert_skips_unneeded(linear_cross_entropy, *Setting().arguments(*make(bias=False)))


@each_implementation
@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_wanted_gradients_are_made(
    implementation: str, wants: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_chunks, "MIN_ROWS", WIDTH)  # the same chunks with and without W's gradient, to the bit
    tensors = make()
    everything = run(implementation, *Setting().arguments(*tensors))
    args = Setting(wants=wants).arguments(*tensors)
    outputs = run(implementation, *args)
    assert torch.equal(outputs[0], everything[0])
    for want, some, full in zip(wants, outputs[4:], everything[4:], strict=True):
        assert torch.equal(some, full if want else full.new_empty(0))
    backward = IMPLEMENTATIONS[implementation][1]
    backward(linear_cross_entropy, args, outputs, [outputs[0]], list(wants))
    for i, name in enumerate(("hidden", "weight", "bias")):
        if not wants[i]:
            with pytest.raises(RuntimeError, match=f"gradient of {name} is needed"):
                backward(linear_cross_entropy, args, outputs, [outputs[0]], [i == j for j in range(3)])


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    opcheck(linear_cross_entropy, *Setting(statistics=True).arguments(*make((2, 3), bias=bias)))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_autograd(frozen: bool) -> None:
    """Through the registered operator, with an upstream gradient that no format holds exactly."""
    wants = (True, not frozen, not frozen)
    args = Setting(wants=wants).arguments(*make())
    leaves = [x.clone().requires_grad_(want) for x, want in zip(args[:3], wants, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    ours = torch.autograd.grad(linear_cross_entropy(*leaves, *args[3:])[0] / 3, wanted)
    theirs = torch.autograd.grad(eager(*leaves, *args[3:]) / 3, wanted)
    torch.testing.assert_close(ours, theirs)


def test_layouts() -> None:
    """Inputs that are no contiguous matrices: a slice of the hidden states, a transposed weight, every other label."""
    hidden, weight, bias, labels = make((3, 9), ignored=0.0)
    sliced, transposed = hidden[:, :-1], weight.t().contiguous().t()
    every_other = torch.stack((labels, labels.flip(0)), dim=-1)[..., 0][:, 1:]
    contiguous = sliced.contiguous(), weight, bias, every_other.contiguous()
    for implementation in IMPLEMENTATIONS:
        expected = run(implementation, *Setting(statistics=True).arguments(*contiguous))
        ours = run(implementation, *Setting(statistics=True).arguments(sliced, transposed, bias, every_other))
        flat = run(implementation, *Setting(statistics=True).arguments(*contiguous[:3], every_other.flatten()))
        for a, b, c in zip(ours, expected, flat, strict=True):
            assert a.is_contiguous() and a.shape == c.shape
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(c, b)


def test_one_graph_serves_all_lengths() -> None:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(*Setting(wants=(True, False, False)).arguments(hidden, weight, None, labels))[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, dynamic=True)
    for length in (5, 6, 9, 41):
        hidden, weight, _, labels = make((2, length))
        hidden.requires_grad_()
        ours = torch.autograd.grad(compiled(hidden, weight, labels), hidden)
        torch.testing.assert_close(ours, torch.autograd.grad(loss(hidden, weight, labels), hidden))
    assert counter.frame_count == 1


@contextmanager
def _counted(op: Any, name: str, calls: list[int]) -> Iterator[None]:
    function = getattr(op, name)

    def counting(*args: Any) -> Any:
        calls.append(len(args))
        return function(*args)

    setattr(op, name, counting)
    try:
        yield
    finally:
        setattr(op, name, function)


def test_it_is_not_taken_apart_where_it_has_no_kernel() -> None:
    """Through the whole backend, on the CPU: the reference runs in chunks, and is not traced into the graph."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(*Setting(wants=(True, True, False)).arguments(hidden, weight, None, labels))[0]

    hidden, weight, _, labels = (x.cpu().requires_grad_(x.is_floating_point()) if x is not None else x for x in make())
    calls: list[int] = []
    torch._dynamo.reset()
    with _counted(linear_cross_entropy, "reference", calls):
        compiled = torch.compile(loss, backend="unsloth", options={"strict": True})
        ours = torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight))
    assert len(calls) == 1
    torch.testing.assert_close(ours, torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight)))


@pytest.mark.parametrize("bias", [True, False])
def test_symbolic_shapes(bias: bool) -> None:
    setting = Setting(statistics=True, softcap=5.0)
    assert_symbolic(linear_cross_entropy, *setting.arguments(*make((2, 7), bias=bias)))
    assert_symbolic(linear_cross_entropy, *setting.arguments(*make((2, 7), bias=bias)), static=())


def test_supports_says_why_not() -> None:
    def reason(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> str | None:
        return linear_cross_entropy.supports(*Setting().arguments(hidden, weight, bias, labels))

    hidden, weight, bias, labels = make()
    assert reason(hidden, weight, bias, labels) is None and reason(hidden, weight, None, labels.flatten()) is None
    assert "float64" in str(reason(hidden.double(), weight.double(), None, labels))
    assert "weight is torch.bfloat16" in str(reason(hidden, weight.bfloat16(), bias, labels))
    assert "bias is torch.bfloat16" in str(reason(hidden, weight, bias.bfloat16(), labels))
    assert "known to fit" in str(reason(hidden, weight[:, 1:], bias, labels))
    assert "int32" in str(reason(hidden, weight, bias, labels.int()))


def test_flops_are_registered() -> None:
    hidden, weight, _, labels = make()
    product = 2 * labels.numel() * VOCABULARY * WIDTH
    for wants, products in (((True, True, False), 3), ((True, False, False), 2), ((False,) * 3, 1)):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(*Setting(wants=wants).arguments(hidden, weight, None, labels))
        assert counter.get_total_flops() == products * product


def test_the_kernel_compiles_for_hopper() -> None:
    assert_compiles(
        """
from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
labels = torch.zeros(8, dtype=torch.int64)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    hidden, weight = torch.zeros(8, 16, dtype=dtype), torch.zeros(130, 16, dtype=dtype)
    for softcap in (0.0, 30.0):
        for statistics in (False, True):
            for want in (False, True):
                settings = (-100, True, 0.5, softcap, statistics, [want, want, False])
                linear_cross_entropy.forward(hidden, weight, None, labels, *settings)
"""
    )
