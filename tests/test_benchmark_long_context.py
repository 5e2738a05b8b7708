"""The benchmark of long contexts: what it asks for, what it compares, and a whole step of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import long_context, long_context_worker
from benchmarks.long_context_worker import Step

ROW: dict[str, Any] = {
    "step": {"shape": "llama-8b@8", "rank": 32, "batch": 1, "tokens": 32768, "budget": 0}, "seconds": 2.0,
    "forward_s": 0.5, "backward_s": 1.5, "tokens_per_s": 16384.0, "predicted_gib": 9.5, "measured_gib": 9.25,
    "ratio": 1.027, "reserved_gib": 10.0, "host_gib": 1.75, "locked_gib": 1.75, "loading_s": 5.0, "compile_s": 30.0,
    "loss": 12.5, "grad_norm": 0.25, "policy": "recompute", "plan": "layers keep their inputs",
}  # fmt: skip


def test_two_plans_are_compared() -> None:
    other = {**ROW, "plan": "everything is kept", "grad_norm": 0.2500025}
    assert long_context.compared(ROW, other) == pytest.approx({"loss": 0.0, "grad_norm": 1e-5})
    with pytest.raises(ValueError, match="nothing is compared"):
        long_context.compared(ROW, {**other, "plan": ROW["plan"]})
    for wrong in ({"loss": 12.5002}, {"grad_norm": 0.2504}):
        with pytest.raises(ValueError, match="differ in what they compute"):
            long_context.compared(ROW, {**other, **wrong})


def test_rows_in_words() -> None:
    assert "predicted 9.50, measured 9.25 (+2.7%), reserved 10.00; in host memory 1.75" in long_context.told(ROW)
    assert "| llama-8b@8 | 32,768 | 2.0 | 16,384 | 9.50 | 9.25 | 10.00 | 1.75 |" in long_context.table([ROW])
    failed = {"step": ROW["step"], "error": "OutOfMemoryError: CUDA out of memory"}
    assert "failed: OutOfMemoryError" in long_context.told(failed) and "llama" not in long_context.table([failed])


def test_what_is_asked_for_is_run_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Step] = []

    def measured(step: Step, limit: int, log: Path | None) -> dict[str, Any]:
        asked.append(step)
        where = {**ROW["step"], "budget": step.budget}
        return {**ROW, "step": where, "plan": f"for {step.budget}"}

    monkeypatch.setattr(long_context, "measure", measured)
    words = ["--shape", "llama-8b", "--layers", "8", "--tokens", "32768", "--rank", "32", "--device", "cuda"]
    words += ["--budget", "9GiB", "--host", "20GiB", "--card", "47GB", "--check", "40GiB", "--out"]
    long_context.main([*words, str(tmp_path / "rows.json")])
    first, second = asked
    assert first == Step("llama-8b@8", True, 32, 1, 32768, 9 << 30, 20 << 30, 47 * 10**9, 0, "cuda")
    assert second.budget == 40 << 30 and second.card == first.card
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["step"]["budget"] for row in rows] == [40 << 30, 9 << 30]
    assert rows[1]["check"]["apart"] == {"loss": 0.0, "grad_norm": 0.0}
    assert "the same under another plan: loss off by 0.0e+00" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        long_context.main([*words[:-4], "--check", "40Gibs"])


def test_a_whole_step() -> None:
    """Two plans, one step: forward, backward and optimiser."""
    steps = [Step("tiny-llama", True, 4, 1, 48, budget, 0, None, 0, "cpu") for budget in (0, 1 << 30)]
    rows = [long_context_worker.measure(step) for step in steps]
    assert long_context.compared(*rows)["loss"] < 1e-6
    assert all(row["grad_norm"] > 0 and row["compile_s"] > 0 and row["seconds"] > row["forward_s"] > 0 for row in rows)
    assert rows[0]["predicted_gib"] < rows[1]["predicted_gib"]
