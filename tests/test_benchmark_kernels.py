"""The kernels' benchmark without a GPU: every case and peer runs and agrees, bytes and verdicts are right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import kernels
from benchmarks.kernel_cases import SIZES, Case, Size
from benchmarks.more_kernel_cases import CASES

TINY = Size(64, 128, 4, 2, 16, vocabulary=96, sequences=((2, 8), (1, 32)), device="cpu")
CARD = {"copy TB/s": 3.0, "square product TFLOP/s": 700.0}
ALL = [case for cases in CASES.values() for case in cases(TINY)]
each_case = pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.name} {case.shape}")


def finite(values: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """In place of the timer: every state once, results finite, and 2 ms."""

    def once(run: Any, states: Any, calls: int, prepare: Any = None) -> float:
        for state in [prepare(*s) for s in states] if prepare else states:
            assert finite(run(*state))
        return 2.0

    monkeypatch.setattr(kernels, "median_ms", once)
    return once


def measured(case: Case, size: str = "8b", **options: Any) -> list[dict[str, Any]]:
    return kernels.rows_of(case, size, **{"calls": 1, "l2_bytes": 1, "card": CARD, "compiled": False} | options)


def row(case: Case, direction: str) -> dict[str, Any]:
    return next(r for r in measured(case) if r["direction"] == direction)


@each_case
def test_every_case_runs_in_each_direction(case: Case, timer: Any) -> None:
    rows = measured(case)
    assert not [r for r in rows if "error" in r], rows
    totals = ["both"] if case.arithmetic or case.products("forward", *case.arguments()) else []
    assert [r["direction"] for r in rows] == (["forward", "backward", *totals] if case.wanted else ["forward"])
    for r in rows:
        assert r["ms"] == (4.0 if r["direction"] == "both" else 2.0)
        assert r["bytes"] > 0 and r["flops"] > 0 and r["share"] > 0 and isinstance(r["bytes"], int)
        assert {name for name, time in r["peers"].items() if isinstance(time, str)} <= {"cudnn"}, r["peers"]


@each_case
def test_peers_compute_what_the_operator_computes(case: Case) -> None:
    torch.manual_seed(0)
    args = case.arguments()
    results = case.op(*args)
    named = dict(zip(case.op.outputs, results if isinstance(results, tuple) else (results,), strict=True))
    expected = [named[name] for name in case.op.gradients_of or case.op.outputs]
    for name, peer in case.peers.items():
        if name in ("cudnn", "liger"):  # run on CUDA only
            continue
        actual = [y for y in tree_leaves(peer(*args)) if isinstance(y, Tensor)]
        assert len(actual) == len(expected), name
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.float(), e.float(), atol=0.05, rtol=0.05, msg=lambda m, n=name: f"{n}: {m}")


@each_case
def test_data_is_random_and_gradients_are_those_wanted(case: Case) -> None:
    args = case.arguments()
    assert all(x.float().std() > 0 for x in args if isinstance(x, Tensor) and x.numel() > 1)
    if case.wanted:
        result = case.op.overload_backward(*kernels.backward_arguments(case, args))
        grads = dict(zip(case.op.differentiable, result if isinstance(result, tuple) else (result,), strict=True))
        assert {name for name, grad in grads.items() if grad.numel()} == set(case.wanted)
        assert all(float(grads[name].float().abs().sum()) > 0 for name in case.wanted)


def test_bytes_are_each_tensor_once(timer: Any) -> None:
    (norm,), (glu,), (nf4,) = (list(CASES[name](TINY)) for name in ("rms_norm", "swiglu", "nf4_dequantize"))
    x, weight, rstd = 32 * 64 * 2, 64 * 2, 32 * 4
    assert row(norm, "forward")["bytes"] == 2 * x + weight + rstd
    assert row(norm, "backward")["bytes"] == 3 * x + weight + rstd
    assert [row(glu, way)["bytes"] for way in ("forward", "backward")] == [n * 32 * 128 * 2 for n in (3, 5)]
    blocks = 64 * 128 // 64
    assert row(nf4, "forward")["bytes"] == 64 * 128 * 2 + 64 * 128 // 2 + blocks + 4 * (256 + 1 + 1)


def test_ceilings_are_the_copy_or_the_products(timer: Any) -> None:
    card = kernels.ceilings(1, elements=300, square=4, device="cpu")
    assert card == pytest.approx({"copy TB/s": 2 * 600 / 2e9, "square product TFLOP/s": 2 * 4**3 / 2e9})
    (lora,), (norm,) = CASES["lora_linear"](TINY), CASES["rms_norm"](TINY)
    assert row(lora, "both")["ceiling"] == "base products" and row(lora, "both")["ceiling_ms"] == 4.0
    forward = row(norm, "forward")
    assert forward["ceiling"] == "copy" and forward["ceiling_ms"] == pytest.approx(forward["bytes"] / 3e9)
    frozen, trained = CASES["linear_cross_entropy"](TINY)
    for case, count in ((frozen, 2), (trained, 3)):
        pairs = case.products("forward", *case.arguments())
        assert sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairs) == row(case, "forward")["flops"]
        assert len(pairs) == count and row(case, "backward")["ceiling"] == "copy"


def test_inputs_exceed_the_l2_four_times() -> None:
    (case,) = CASES["swiglu"](TINY)
    size = kernels.nbytes(case.arguments())
    for l2_bytes, copies in ((1, 1), (size, 4), (size + 1, 5)):
        sets = kernels.inputs(case, l2_bytes)
        assert len(sets) == copies and kernels.nbytes(sets) >= 4 * l2_bytes
        assert len({tensor.data_ptr() for tensor in tree_leaves(sets)}) == 2 * copies


def test_real_shapes_are_those_of_the_targets() -> None:
    shapes = {name: [case.shape for case in cases(SIZES["8b"])] for name, cases in CASES.items()}
    assert shapes["rms_norm"] == ["8192×4096"] and shapes["swiglu"] == shapes["geglu"] == ["8192×14336"]
    assert shapes["rope"] == ["2×2048, 32+8 heads of 128"] * 2
    assert shapes["attention"] == ["2×2048, 32/8 heads of 128", "1×8192, 32/8 heads of 128"]
    assert shapes["lora_linear"] == ["8192×4096 → 14336, r=16"]
    assert shapes["linear_cross_entropy"] == ["4096×4096×128256"] * 2
    assert next(CASES["nf4_dequantize"](SIZES["70b"])).shape == "8192×28672"
    names = {case.name for case in ALL}
    without = {"capped_attention", "masked_attention", "packed_attention", "sink_attention", "paged_attention"}
    without |= {"lora_up_backward_3", "lora_down_backward_1", "glu_lora_backward", "token_cross_entropy"}
    assert {name for name, _ in kernels.TARGETS} | without == names and len(names) == len(without) + 10


def judge(operator: str, direction: str, size: str = "8b", **figures: Any) -> Any:
    base = {"ms": 1.0, "bytes": 1, "flops": 1, "ceiling_ms": 1.0, "peers": {}}
    return kernels.judged({"operator": operator, "direction": direction, "size": size, **base, **figures}).get("met")


def test_targets_are_met_or_not() -> None:
    assert judge("rms_norm", "forward", bytes=2.7e9) is True
    assert judge("rms_norm", "forward", bytes=2.6e9) is False
    assert judge("rms_norm", "forward", "1b", bytes=2.6e9) is None  # the target names another shape
    assert judge("nf4_dequantize", "forward", "70b", bytes=2.7e9) is True
    assert judge("linear_cross_entropy, frozen head", "both", ms=14.0) is True
    assert judge("linear_cross_entropy, trained head", "both", ms=20.1) is False
    assert judge("linear_cross_entropy, trained head", "forward") is None
    assert judge("lora_linear", "both", ms=1.06) is True and judge("lora_linear", "both", ms=1.07) is False
    assert judge("attention", "forward", peers={"cudnn": 0.998}) is True
    assert judge("attention", "forward", peers={"cudnn": 0.98}) is False
    assert judge("attention", "forward", peers={"cudnn": "RuntimeError: no"}) is None


def test_calls_take_turns_and_only_warm_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    def waited(cycles: int) -> None:
        clock[0] += 1000

    log: list[Any] = []

    def prepare(name: str) -> tuple[str]:
        log.append(f"prepare {name}")
        clock[0] += 100
        return (name,)

    def run(name: str) -> None:
        log.append(name)
        clock[0] += 50 if len(log) <= 8 else {"a": 1, "b": 2}[name]  # the first call compiles

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", waited)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels.median_ms(run, [("a",), ("b",)], 3, prepare) == 1.5
    assert log == ["prepare a", "prepare b", "a", "b"] * 4  # two turns to warm up, two that count


def test_both_directions_add_up_unless_a_peer_failed() -> None:
    one = {"direction": "forward", "ms": 1.0, "bytes": 1, "flops": 2, "ceiling_ms": 1.0, "ceiling": "base products"}
    other = {**one, "direction": "backward", "ms": 3.0, "peers": {"a": 5.0, "b": "error"}}
    total = kernels.together({**one, "peers": {"a": 1.0, "b": 1.0}}, other)
    assert total["direction"] == "both" and total["ms"] == 4.0 and total["flops"] == 4
    assert total["peers"] == {"a": 6.0, "b": "error"}


def test_failures_are_rows(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(CASES["rope"](TINY))
    monkeypatch.setattr(case.op, "disabled", "it broke")  # the reference ran instead: no figure of the kernel
    rows = measured(case)
    assert len(rows) == 2 and all("it broke" in r["error"] for r in rows)
    assert "failed: RuntimeError" in kernels.table(rows)


def test_a_failing_peer_is_named_and_the_rest_measured(timer: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    (case,) = CASES["swiglu"](TINY)
    case = Case(case.op, case.shape, case.arguments, case.wanted, {**case.peers, "broken": broken})
    rows = measured(case)
    assert [r["peers"]["broken"] for r in rows] == ["RuntimeError: no such kernel"] * 2
    assert "broken failed" in kernels.table(rows) and "eager 2 (1.00×)" in kernels.table(rows)


def test_compiled_stands_beside_eager(timer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    (case,) = CASES["geglu"](TINY)
    assert all(r["peers"].keys() >= {"eager", "compiled"} for r in measured(case, compiled=True))


def test_the_table_says_what_was_measured() -> None:
    figures = {"ms": 0.05, "bytes": int(0.134e9), "flops": 1, "ceiling": "copy", "ceiling_ms": 0.045}
    label = {"operator": "rms_norm", "direction": "forward", "shape": "8192×4096", "size": "8b"}
    product = {**label, "operator": "lora_linear", "direction": "both", "ceiling": "base products", "flops": 600e9}
    rows = [kernels.judged({**label, **figures, "peers": {"eager": 0.3}})]
    rows.append(kernels.judged({**figures, **product, "ms": 1.0, "peers": {}}))
    header, first, second = kernels.table(rows).splitlines()
    assert header.split()[:4] == ["operator", "direction", "shape", "ms"]
    for part in ("0.05", "2.68 TB/s", "90% copy", "≥ 2.7 TB/s: not met", "eager 0.3 (6.00×)"):
        assert part in first, (part, first)
    assert "600 TFLOP/s" in second and "4% base products" in second


def test_rows_are_written_with_where_they_are_from(timer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "8b", TINY)
    monkeypatch.setattr(kernels, "ceilings", lambda _: CARD)
    path = tmp_path / "folder" / "kernels.json"
    args = kernels.parser().parse_args(["--quick", "--operators", "rms_norm,lora_linear", "--out", str(path)])
    kernels.run(args, kernels.environment("cpu"), l2_bytes=1)
    rows = json.loads(path.read_text())["rows"]
    assert [r["operator"] for r in rows] == ["rms_norm"] * 2 + ["lora_linear"] * 3
    for r in rows:
        assert r["device"] == "cpu" and r["versions"]["torch"] and r["date"] and r["card"] == CARD
        assert r["command"].startswith("python -m benchmarks.kernels") and math.isfinite(r["share"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "9b"], "unknown 9b; there are 1b, 8b, 70b"),
        (["--operators", "rope,rop"], "unknown rop; there are rms_norm"),
        ([], "no CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_said(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        kernels.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
