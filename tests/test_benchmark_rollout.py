"""The rollout benchmark: ours beside ``generate``, and held against the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import rollout, step
from unsloth.models.smollm2 import smollm2_gguf
from unsloth.models.source import ModelError

TINY = ["--shape", "tiny-llama", "--mode", "lora", "--dtype", "float32", "--sequences", "4", "--group", "2"]
TINY += ["--prompt", "5", "--new", "6", "--check", "6", "--runs", "1", "--device", "cpu"]


def test_rows_say_how_fast_and_how_right(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rollout.main([*TINY, "--out", str(path), "--systems", "ours:rows=3:fp32_head=true,transformers"])
    rows = step.read(path)
    assert [row.get("error") for row in rows] == [None, None], rows
    ours, theirs = rows
    assert ours["workload"]["options"] == {"rows": 3, "fp32_head": True} and theirs["system"] == "transformers"
    assert all(row["tokens_per_s"] > 0 and row["ms_per_token"] > 0 for row in rows)
    assert ours["greedy_is_argmax"] == ours["greedy_is_generate"] == 1.0
    assert ours["log_p_off"] < 1e-4 and ours["generate_log_p_off"] < 1e-4
    assert ours["stale_tokens"] == 0 and ours["tokens_after_update"] == 24
    assert ours["tokens_that_tell"] > 0
    assert "0 of 24" in rollout.table(rows)


def test_trained_weights_continue_text(tmp_path: Path) -> None:
    """In float32, every greedy token is the model's own and ``generate``'s, and no probability is another one."""
    try:
        weights = smollm2_gguf()
    except ModelError as error:
        pytest.skip(str(error))
    path = tmp_path / "rows.json"
    sizes = ["--sequences", "4", "--group", "2", "--prompt", "24", "--new", "16", "--check", "16", "--runs", "1"]
    given = ["--shape", "smollm2-135m", "--weights", str(weights), "--dtype", "float32", "--device", "cpu", *sizes]
    rollout.main([*given, "--out", str(path), "--systems", "ours"])
    (row,) = step.read(path)
    assert "error" not in row, row
    assert row["workload"]["weights"] == weights.name
    assert row["greedy_is_argmax"] == row["greedy_is_generate"] == 1.0
    assert row["log_p_off_largest"] < 1e-3 and row["stale_tokens"] == 0 and row["tokens_that_tell"] > 32


def test_what_cannot_be_measured_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="hf makes no completions here"):
        rollout.main(["--systems", "hf"])
    with pytest.raises(ValueError, match="takes no option 'speed=2'"):
        rollout.main(["--systems", "ours:speed=2"])
    with pytest.raises(SystemExit, match="there is no file"):
        rollout.main(["--weights", "nowhere.gguf"])
    with pytest.raises(SystemExit, match="4 bits already"):
        rollout.main(["--weights", __file__, "--mode", "qlora"])
    with pytest.raises(SystemExit, match="no multiple"):
        rollout.main(["--sequences", "8", "--group", "3"])
