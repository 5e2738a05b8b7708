"""The policy benchmark: ours and TRL's train the same policy on the same completions."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import grpo, step

TINY = ["--shape", "tiny-llama@1", "--mode", "lora", "--generations", "4", "--micro", "2", "--prompt", "5"]
TINY += ["--completion", "9", "--device", "cpu", "--steps", "1", "--warmup", "1", "--beta", "0.1"]


def test_rows_are_equal_in_loss(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    grpo.main([*TINY, "--out", str(path), "--systems", "ours:lowering=eager,trl", "--parallel", "2"])
    rows = sorted(step.read(path), key=lambda row: row["system"])
    assert [row.get("error") for row in rows] == [None, None], rows
    assert [row["system"] for row in rows] == ["ours", "trl"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["command"].startswith("python -m benchmarks.grpo")
    ours, theirs = rows
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-4)
    assert ours["graphs"] == 1 and not ours["fallbacks"] and "graphs" not in theirs
    assert grpo.table(rows).count("→") == 4


def test_what_cannot_be_measured_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="hf trains no policies here"):
        grpo.main(["--systems", "hf"])
    with pytest.raises(SystemExit, match="no multiple"):
        grpo.main(["--generations", "8", "--micro", "3"])
    with pytest.raises(SystemExit, match="has to be at least 1"):
        grpo.main(["--warmup", "0"])
