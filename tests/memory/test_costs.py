"""What values cost: FLOPs and bytes over a device's ceilings, at the traced sizes or at others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from unsloth.kernels.attention import attention
from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth.passes.memory import costs, measured
from unsloth.passes.memory.costs import ATTENTION_EFFICIENCY, DEVICES, LAUNCH_SECONDS, Ceilings, Sizes, ceilings

H100 = DEVICES["H100"]


def nodes(function: Any, *args: Tensor, symbolic: bool = False) -> dict[str, fx.Node]:
    gm = make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*args)
    return {n.target._opname: n for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}


def test_products_are_bound_by_arithmetic_and_sums_by_traffic() -> None:
    x, w = (torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta") for _ in range(2))
    found = nodes(lambda x, w: (x @ w) + x, x, w)
    sizes = Sizes(H100)
    assert sizes.seconds(found["mm"]) == pytest.approx(2 * 4096**3 / H100.flops)
    assert sizes.seconds(found["add"]) == pytest.approx(3 * 4096**2 * 2 / H100.bandwidth)
    assert sizes.bytes(found["mm"]) == 4096**2 * 2
    small = nodes(lambda x: x + 1, torch.empty(8, device="meta"))
    assert sizes.seconds(small["add"]) == LAUNCH_SECONDS


def test_other_sizes_of_a_symbolic_graph() -> None:
    found = nodes(lambda x, w: x @ w, torch.empty(6, 16), torch.empty(16, 32), symbolic=True)["mm"]
    rows = str(found.meta["val"].shape[0].node.expr)
    assert Sizes(H100).bytes(found) == 6 * 32 * 4
    assert Sizes(H100, {rows: 1000}).bytes(found) == 1000 * 32 * 4
    at_most = Sizes(H100, {rows: 10**9}).seconds(found)
    assert at_most > 1e3 * Sizes(H100, {rows: 10**6}).seconds(found) * 0.99


def test_our_operators_declare_their_price_and_workspace() -> None:
    q, k = (torch.empty(2, heads, 2048, 128, dtype=torch.bfloat16) for heads in (32, 8))
    found = nodes(lambda q, k: attention(q, k, k, True, 0.1, None), q, k)["attention"]
    scores = 2 * 32 * 2048 * 2048 * 128
    assert Sizes(H100).seconds(found) == pytest.approx(2 * scores / (H100.flops * ATTENTION_EFFICIENCY), rel=0.05)
    hidden, head = torch.empty(4096, 64, dtype=torch.bfloat16), torch.empty(128256, 64, dtype=torch.bfloat16)
    labels = torch.empty(4096, dtype=torch.int64)

    def loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Any:
        return linear_cross_entropy(hidden, head, None, labels, -100, True, 1.0, 0.0, False, [True, False, False])

    node = nodes(loss, hidden, head, labels)["linear_cross_entropy"]
    chunk = Sizes(H100).workspace(node)
    assert 0.9 * (256 << 20) < chunk < 1.1 * (256 << 20)  # the chunk of logits, never all of them


def test_an_unknown_card_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card, runs = SimpleNamespace(total_memory=10 << 30), []

    def measure() -> dict[str, float]:
        runs.append(1)
        return {"flops": 123.456e12, "bandwidth": 0.5e12, "link": 20e9}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 9000")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(measured, "_measure", measure)
    for _ in range(2):  # the second time as in another process
        measured.measured_ceilings.cache_clear()
        assert ceilings() == Ceilings("Abacus 9000", 1.2e14, 0.5e12, 2e10, 10 << 30)
    assert runs == [1]
    (path,) = (tmp_path / "unsloth").iterdir()
    path.write_text("{")  # torn
    measured.measured_ceilings.cache_clear()
    assert ceilings().flops == 1.2e14 and len(runs) == 2

    def fail() -> dict[str, float]:
        raise torch.OutOfMemoryError("full")

    path.unlink()
    monkeypatch.setattr(measured, "_measure", fail)
    measured.measured_ceilings.cache_clear()
    with pytest.warns(UserWarning, match="Abacus 9000 could not be measured and is taken for H100"):
        assert ceilings().flops == H100.flops
    measured.measured_ceilings.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_reaches_plausible_figures() -> None:
    found = measured._measure()
    assert 1e13 < found["flops"] < 1e16 and 1e11 < found["bandwidth"] < 2e13 and 1e9 < found["link"] < 1e12


def test_devices_are_found_by_a_part_of_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ceilings("NVIDIA H100 80GB HBM3") is H100 and ceilings("4090").memory == 24 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ceilings() is H100 and ceilings("abacus") is H100


def test_a_patch_embedding_has_a_price_where_its_pixels_want_no_gradient() -> None:
    """PyTorch's formula finds the weight's gradient by its place, behind the None of the pixels'."""
    pixels, weight, grad = torch.empty(2, 3, 8, 8), torch.empty(16, 3, 4, 4), torch.empty(2, 16, 2, 2)
    target = torch.ops.aten.convolution_backward.default
    rest = ([16], [4, 4], [0, 0], [1, 1], False, [0, 0], 1)
    once = 2 * grad.numel() * 3 * 4 * 4
    of_weight = costs._flops(target, (grad, pixels, weight, *rest, [False, True, True]), {}, [weight, torch.empty(16)])
    both = [pixels, weight, torch.empty(16)]
    of_both = costs._flops(target, (grad, pixels, weight, *rest, [True, True, True]), {}, both)
    assert of_both - of_weight > 0 and of_weight >= once
