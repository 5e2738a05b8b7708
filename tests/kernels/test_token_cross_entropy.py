"""token_cross_entropy: kernel (interpreted where there is no GPU) and reference, against float64 and PyTorch's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
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
from tests.kernels.test_linear_cross_entropy import DTYPES, IGNORED, LargestTensor, logits_of, make
from unsloth.kernels import logit_chunks
from unsloth.kernels.token_cross_entropy import token_cross_entropy

VOCABULARY = 1003
FROZEN, TRAINED = (True, False, False), (True, True, True)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(logit_chunks, "MIN_ROWS", 16)


@dataclass
class Setting:
    """What an operator's call fixes besides its tensors."""

    scale: float = 1.0
    softcap: float = 0.0
    statistics: bool = False
    trained_entropy: bool = False
    wants: tuple[bool, bool, bool] = TRAINED

    def arguments(self, *tensors: Any) -> tuple[Any, ...]:
        others = IGNORED, self.scale, self.softcap, self.statistics, self.trained_entropy, list(self.wants)
        return (*tensors, *others)


def eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    statistics: bool,
    trained_entropy: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor]:
    """Logits in the model's dtype, the rest in float32."""
    logits = logits_of(hidden, weight, bias, scale, softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    if not trained_entropy:
        entropy = entropy.new_zeros(0) * hidden.sum()
    return losses.view(labels.shape), entropy


def run(implementation: str, *args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[implementation][0](token_cross_entropy, *args)


def grads_of(outputs: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, device=DEVICE) for x in (outputs[0], outputs[2])]


SETTINGS = {
    "plain": Setting(),
    "everything": Setting(scale=1.7, softcap=5.0, trained_entropy=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_accuracy_of_a_trained_head(setting: Setting, dtype: torch.dtype) -> None:
    def inputs(rows: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return setting.arguments(*make(rows, dtype, seed))

    assert_accurate(token_cross_entropy, inputs, eager, dtypes=[dtype], shapes=[(2, 23)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@each_implementation
def test_accuracy_of_a_frozen_head(implementation: str, softcap: float, dtype: torch.dtype) -> None:
    """Made in forward, only multiplied in backward; and no further from float64 than eager is."""
    forward, backward = IMPLEMENTATIONS[implementation]
    args = Setting(scale=0.6, softcap=softcap, wants=FROZEN).arguments(*make((2, 23), dtype))
    outputs = forward(token_cross_entropy, *args)
    assert outputs[3].shape == args[0].shape
    grads = grads_of(outputs)
    (ours, *others) = backward(token_cross_entropy, args, outputs, grads, list(FROZEN))
    assert others == [None, None] and ours is not None and ours.dtype == dtype
    by_dtype = {}
    for kind in (dtype, torch.float64):
        hidden = args[0].to(kind).requires_grad_()
        others = [x if x is None or not x.is_floating_point() else x.to(kind) for x in args[1:4]]
        losses, _ = eager(hidden, *others, *args[4:])
        by_dtype[kind] = torch.autograd.grad(losses, hidden, grads[0].to(losses.dtype))[0].double()
    truth = by_dtype[torch.float64]
    errors = [float((x.double() - truth).norm() / truth.norm()) for x in (ours, by_dtype[dtype])]
    assert errors[0] <= max(1.1 * errors[1], 2 * torch.finfo(dtype).eps), errors


@each_implementation
@pytest.mark.parametrize("wants", [FROZEN, TRAINED], ids=["frozen head", "trained head"])
def test_statistics_have_no_gradient_and_cost_none(implementation: str, wants: tuple[bool, bool, bool]) -> None:
    tensors = make()
    with_them = run(implementation, *Setting(statistics=True, wants=wants).arguments(*tensors))
    without = run(implementation, *Setting(wants=wants).arguments(*tensors))
    log_p = torch.log_softmax(F.linear(*tensors[:3]), dim=-1)
    torch.testing.assert_close(with_them[1], -(log_p.exp() * log_p).sum(-1))
    assert without[1].shape == with_them[2].shape == (0,)
    assert torch.equal(with_them[0], without[0]) and torch.equal(with_them[3], without[3])
    assert (with_them[3].numel() > 0) == (wants == FROZEN)


@each_implementation
def test_masked_vocabulary_and_ignored_rows(implementation: str) -> None:
    """A token that cannot be has no entropy and no NaN; rows that are ignored have a loss of 0, but an entropy."""
    hidden, weight, bias, _ = make()
    bias[500:] = -math.inf
    labels = torch.full(hidden.shape[:-1], 8, device=DEVICE)
    labels[0, :9] = IGNORED
    args = Setting(trained_entropy=True).arguments(hidden, weight, bias, labels)
    outputs = run(implementation, *args)
    assert bool((outputs[0][0, :9] == 0).all()) and bool((outputs[2] > 0).all())
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[:500], bias[:500])]
    losses, entropy = eager(*leaves, labels, *args[4:])
    grads = grads_of(outputs)
    expected = torch.autograd.grad((losses, entropy), leaves, grads)
    found = IMPLEMENTATIONS[implementation][1](token_cross_entropy, args, outputs, grads)
    torch.testing.assert_close(outputs[2], entropy)
    torch.testing.assert_close(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[:500], theirs)
        assert bool((ours[500:] == 0).all())


@each_implementation
@pytest.mark.parametrize("upstream", [2.0**-30, 0.0, 2.0**6])
def test_float16_neither_overflows_nor_vanishes(implementation: str, upstream: float) -> None:
    """What a token counts, before a loss scale or after it, is no matter of the logits' gradient."""
    args = Setting().arguments(*make((40,), torch.float16, ignored=0.0))
    outputs = run(implementation, *args)
    ones, scaled = (
        IMPLEMENTATIONS[implementation][1](
            token_cross_entropy, args, outputs, [torch.full((40,), g, device=DEVICE), outputs[2]]
        )
        for g in (1.0, upstream)
    )
    for one, other in zip(ones, scaled, strict=True):
        truth, tiniest = one.double() * upstream, 6e-8 * one.numel() ** 0.5
        assert (other.double() - truth).norm() <= 2e-3 * truth.norm() + tiniest


@each_implementation
@pytest.mark.parametrize("wants", [FROZEN, TRAINED], ids=["frozen head", "trained head"])
def test_logits_are_never_whole(implementation: str, wants: tuple[bool, bool, bool]) -> None:
    args = Setting(statistics=True, wants=wants).arguments(*make((3, 35), torch.bfloat16))
    with LargestTensor() as seen:
        outputs = run(implementation, *args)
        IMPLEMENTATIONS[implementation][1](token_cross_entropy, args, outputs, grads_of(outputs), list(wants))
    assert seen.bytes <= max(16 * 1024 * 4, 2 * args[1].nbytes) < 105 * VOCABULARY * 2


# -- contract ----------------------------------------------------------------------------------------------------------


def test_what_backward_is_given() -> None:
    """A frozen head keeps the slopes in hidden's place."""
    for wants, spared in ((FROZEN, True), (TRAINED, False)):
        args = Setting(wants=wants).arguments(*make())
        values = dict(zip(token_cross_entropy.inputs, args, strict=True))
        values |= dict(zip(token_cross_entropy.outputs, token_cross_entropy(*args), strict=True))
        assert (token_cross_entropy.saved(values)[0] is None) == spared


def test_unneeded_gradients_are_not_made() -> None:
    assert_skips_unneeded(token_cross_entropy, *Setting(trained_entropy=True).arguments(*make((2, 2))))
    args = Setting(wants=FROZEN).arguments(*make((2, 2)))
    for forward, backward in IMPLEMENTATIONS.values():
        outputs = forward(token_cross_entropy, *args)
        assert backward(token_cross_entropy, args, outputs, grads_of(outputs), [False] * 3) == (None,) * 3
        with pytest.raises(RuntimeError, match="gradient of weight is needed"):
            backward(token_cross_entropy, args, outputs, grads_of(outputs), [True, True, False])


@pytest.mark.parametrize("setting", [Setting(statistics=True, wants=FROZEN), Setting(trained_entropy=True)])
def test_opcheck(setting: Setting) -> None:
    args = setting.arguments(*make((2, 3), bias=setting.trained_entropy))
    if setting.wants == FROZEN:  # opcheck wants every gradient that the schema allows
        outputs = token_cross_entropy(*args)
        backward = (*grads_of(outputs), None, *args[1:4], outputs[3], *args[4:], list(FROZEN))
        torch.library.opcheck(token_cross_entropy.overload, args, test_utils=("test_schema", "test_faketensor"))
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(token_cross_entropy.overload_backward, backward, test_utils=checks)
    else:
        opcheck(token_cross_entropy, *args)


@pytest.mark.parametrize("setting", [Setting(wants=FROZEN), Setting(trained_entropy=True)], ids=["frozen", "trained"])
def test_one_graph_serves_all_lengths(setting: Setting) -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        others = (IGNORED, 1.0, 0.0, False, setting.trained_entropy, list(setting.wants))
        losses, _, entropy, _ = token_cross_entropy(hidden, weight, None, labels, *others)
        return (losses**2).sum() + (entropy**2).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, dynamic=True)
    for length in (5, 41):
        hidden, weight, _, labels = make((2, length))
        leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if setting.trained_entropy else [])]
        ours = torch.autograd.grad(compiled(hidden, weight, labels), leaves)
        losses, entropy = eager(hidden, weight, None, labels, *setting.arguments())
        theirs = torch.autograd.grad((losses**2).sum() + (entropy**2).sum(), leaves)
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("wants", [FROZEN, (True, True, False)], ids=["frozen head", "trained head"])
def test_it_is_not_taken_apart_where_it_has_no_kernel(wants: tuple[bool, bool, bool]) -> None:
    """Through the whole backend, on the CPU and for any length: chunks are a loop that no graph could hold."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return token_cross_entropy(hidden, weight, None, labels, IGNORED, 1.0, 0.0, False, False, list(wants))[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="unsloth", options={"strict": True})
    for rows in ((2, 23), (2, 9)):
        hidden, weight, _, labels = (x.cpu() if x is not None else x for x in make(rows, vocabulary=37))
        torch._dynamo.mark_dynamic(hidden, 1)
        torch._dynamo.mark_dynamic(labels, 1)
        leaves = [x.requires_grad_() for x, want in zip((hidden, weight), wants, strict=False) if want]
        upstream = torch.linspace(-1, 1, labels.numel()).view(labels.shape)
        ours = torch.autograd.grad(compiled(hidden, weight, labels), leaves, upstream)
        torch.testing.assert_close(ours, torch.autograd.grad(loss(hidden, weight, labels), leaves, upstream))


@pytest.mark.skipif(DEVICE != "cuda", reason="measures the GPU's memory")
def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows, vocabulary = 4096, 128256
    hidden = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 1024, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_cross_entropy(*Setting(wants=FROZEN).arguments(hidden, weight, None, labels))[0].sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= logit_chunks.CHUNK_BYTES + 3 * hidden.nbytes + (64 << 20), f"{peak >> 20} MiB"


def test_symbolic_shapes() -> None:
    setting = Setting(trained_entropy=True, softcap=5.0)
    assert_symbolic(token_cross_entropy, *setting.arguments(*make((2, 7), bias=False)))


def test_too_few_labels() -> None:
    hidden, weight, bias, labels = make()
    with pytest.raises(ValueError, match="45 labels for 46 rows"):
        token_cross_entropy.reference(*Setting().arguments(hidden, weight, bias, labels.flatten()[1:]))


def test_flops_are_registered() -> None:
    hidden, weight, _, labels = make()
    product = 2 * labels.numel() * VOCABULARY * hidden.shape[-1]
    for wants, forward, both in (((False,) * 3, 1, 1), (FROZEN, 2, 2), ((True, True, False), 1, 4)):
        leaves = [x.requires_grad_(want) for x, want in zip((hidden, weight), wants, strict=False)]
        with FlopCounterMode(display=False) as counter:
            losses = token_cross_entropy(*Setting(wants=wants).arguments(*leaves, None, labels))[0]
            assert counter.get_total_flops() == forward * product
            if wants[0]:
                losses.sum().backward()
        assert counter.get_total_flops() == pytest.approx(both * product, rel=1e-2)


def test_the_kernel_compiles_for_hopper() -> None:
    assert_compiles(
        """
from unsloth.kernels.token_cross_entropy import token_cross_entropy as op
labels, grad = torch.zeros(8, dtype=torch.int64), torch.zeros(8)
for dtype in (torch.bfloat16, torch.float32):
    hidden, weight = torch.zeros(8, 16, dtype=dtype), torch.zeros(130, 16, dtype=dtype)
    settings = (-100, 0.5, 30.0 * (dtype is torch.float32), False, True, [True, True, False])
    slopes = op.forward(hidden, weight, None, labels, *settings)[-1]
    op.backward(grad, grad, hidden, weight, None, labels, slopes, *settings, [True, True, False])
"""
    )
