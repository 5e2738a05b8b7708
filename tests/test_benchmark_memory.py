"""The memory benchmark: its points, what it resumes, what it prints and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory, memory_worker, pareto
from unsloth.compiler.options import OptionError

ROW = {
    "name": "llama-8b:lora:2x2048", "budget": "half", "predicted_gib": 10.3, "measured_gib": 10.0, "ratio": 1.03,
    "reserved_gib": 11.0, "host_gib": 0.5, "ms": 250.0, "tokens_per_s": 16_000.0, "policy": "mixed",
    "losses": [2.5, 2.4], "grad_norm": 1.25, "device": "NVIDIA H100 80GB HBM3",
}  # fmt: skip
FAILED = {"name": "b:lora:1x2", "budget": "most", "error": "OutOfMemoryError: CUDA out of memory", "device": "x"}


def test_points_are_read_and_chosen() -> None:
    name, budget, where = memory.parse_point("llama-8b:qlora:1x512@16.7GiB")
    assert (name, budget) == ("llama-8b:qlora:1x512", "16.7GiB")
    assert where == {"shape": "llama-8b", "mode": "qlora", "batch": 1, "seq": 512}
    for point, told in (
        ("llama-8b:qlora@most", "is not SHAPE:MODE:BATCHxSEQ@BUDGET"),
        ("a:dora:1x2@most", "'dora' is none of lora"),
        ("a:lora:1x2", "has no budget"),
    ):
        with pytest.raises(ValueError, match=told):
            memory.points(point, None)
    every = memory.points(None, None)
    assert len(every) == len(set(every)) >= 12
    assert set(memory.points(None, "1b:qlora,16.7")) < set(every)
    assert all("1b:qlora" in p or "16.7" in p for p in memory.points(None, "1b:qlora,16.7"))
    with pytest.raises(ValueError, match="fits none of"):
        memory.points(None, "70b")


def test_budgets_become_options() -> None:
    for point in memory.points(None, None):
        assert "memory_budget" in memory_worker.options_of(point.partition("@")[2])
    assert memory_worker.options_of("least") == {"memory_budget": 0}
    assert memory_worker.options_of("recompute") == {"memory_budget": 0, "host_memory_budget": 0}
    assert memory_worker.options_of("2GiB") == {"memory_budget": 2 << 30}
    with pytest.raises(OptionError, match="did you mean 2 GiB"):
        memory_worker.options_of("2Gibs")


def test_tables_show_errors_and_failures_and_numbers_that_differ() -> None:
    text = memory.table([ROW, FAILED])
    assert "+3.0%" in text and "10.30" in text and "failed: OutOfMemoryError" in text
    assert "| llama-8b:lora:2x2048 | half | 10.30 | 10.00 | +3.0% |" in memory.markdown([ROW])
    assert memory.judged([ROW, {**ROW, "budget": "most"}]) == "2 measured points, off by +3.0% to +3.0%"
    assert "differ between budgets" in memory.judged([ROW, {**ROW, "grad_norm": 1.5}])


def test_what_is_there_is_not_measured_again_and_what_was_crowded_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, asked = tmp_path / "rows.json", []

    def measured(point: str, args: Any, turns: str | None) -> dict[str, Any]:
        asked.append((point, turns is not None))
        name, budget, _ = memory.parse_point(point)
        crowd = {"error": "OutOfMemoryError: CUDA out of memory"} if budget == "most" and turns else {}
        return {**ROW, "name": name, "budget": budget, "measured_gib": 10.0 + len(asked), **crowd}

    monkeypatch.setattr(memory, "measure", measured)
    words = ["--points", "a:lora:1x2@most,a:lora:1x2@half", "--out", str(path), "--parallel", "2"]
    memory.main(words)
    assert sorted(asked) == [("a:lora:1x2@half", True), ("a:lora:1x2@most", False), ("a:lora:1x2@most", True)]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "a:lora:1x2" in capsys.readouterr().out
    assert path.with_suffix(".md").read_text().count("a:lora:1x2") == 2
    memory.main(words)
    assert len(asked) == 3
    with pytest.raises(SystemExit):
        memory.main(["--points", "nonsense"])


def test_peers_are_those_of_committed_rows(tmp_path: Path) -> None:
    work = {"shape": "a", "mode": "lora", "batch": 1, "seq": 2, "checkpointing": "unsloth"}
    rows = [
        {"system": "hf", "workload": work, "peak_allocated_gib": 3.0, "tokens_per_s": 5.0, "device": "card"},
        {"system": "ours", "workload": work, "peak_allocated_gib": 2.0, "tokens_per_s": 9.0, "device": "card"},
        {"system": "trl", "workload": work, "error": "failed", "device": "card"},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    found = pareto.peers(tmp_path)
    assert found == {"a:lora:1x2 on card": [{"label": "hf, offloading", "gib": 3.0, "tokens_per_s": 5.0}]}
    assert "llama-8b:lora:2x2048 on NVIDIA H100 80GB HBM3" in pareto.peers()
    with pytest.raises(ValueError, match="no workload has two measured points"):
        pareto.draw([ROW], found, tmp_path / "p.png")
