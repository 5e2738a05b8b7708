"""The memory of one step as the allocator tells it, beside the plan."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runtime.test_trainer import EAGER, trainer
from unsloth.passes.memory.timeline import Standing, Timeline
from unsloth.runtime import memory_trace
from unsloth.runtime.config import ConfigError, TrainConfig, read_config
from unsloth.runtime.memory_trace import MemoryTrace
from unsloth.runtime.train import train
from unsloth.runtime.trainer import SFTTrainer

MIB = 1 << 20
TIMELINE = Timeline(Standing(10 * MIB, MIB, 2 * MIB, 0), ["a", "b", "c"], 2, [0, MIB, MIB], [0, 0, MIB], [MIB] * 3)


class Allocator:
    """Takes and gives back blocks, and keeps a history as PyTorch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[dict[str, Any]] = [{"action": "alloc", "size": 99}]  # of before
        self.recording: list[Any] = []
        monkeypatch.setattr(memory_trace, "_events", lambda: list(self.events))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 13 * MIB)
        monkeypatch.setattr(
            torch.cuda.memory, "_record_memory_history", lambda enabled, **_: self.recording.append(enabled)
        )

    def __call__(self, action: str, size: int) -> None:
        self.events.append({"action": action, "size": size})


def test_one_step_is_followed_and_drawn_over_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, trace = Allocator(monkeypatch), MemoryTrace()
    reports: Any = [
        SimpleNamespace(partitioner=None),
        SimpleNamespace(partitioner=SimpleNamespace(last_timeline=TIMELINE, budget=20 * MIB)),
    ]

    def step() -> str:
        allocator("alloc", 2 * MIB)
        allocator("free_requested", 2 * MIB)
        allocator("free_completed", 2 * MIB)
        trace.turn()
        allocator("alloc", 3 * MIB)
        allocator("segment_alloc", 20 * MIB)
        return "loss"

    trace.write(tmp_path)
    assert "not recorded" in str(trace) and not list(tmp_path.iterdir())
    assert [trace.run(step, reports) for _ in range(4)] == ["loss"] * 4
    assert allocator.recording == ["all", None]
    assert trace.taken is not None and trace.taken.peak == 16 * MIB
    assert trace.taken.forward == [15 * MIB, 15 * MIB, 13 * MIB] and trace.taken.backward == [16 * MIB, 16 * MIB]
    assert "16.0 MiB at the peak of the recorded step, 16.0 MiB predicted (+0.0%)" in str(trace)
    trace.write(tmp_path)
    facts = json.loads((tmp_path / "memory.json").read_text())
    assert facts["measured"]["peak"] == facts["predicted"]["peak"] == 16 * MIB and facts["predicted"]["turn"] == 2
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_that_fails_ends_the_history_and_long_ones_keep_their_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, trace = Allocator(monkeypatch), MemoryTrace()

    def fail() -> None:
        raise torch.OutOfMemoryError("full")

    def long() -> None:
        for i in range(5000):
            allocator("alloc" if i % 2 == 0 else "free_completed", MIB * (7 if i in (700, 701) else 1))

    trace.run(long, [])
    with pytest.raises(torch.OutOfMemoryError):
        trace.run(fail, [])
    assert allocator.recording == ["all", None] and trace.taken is None
    trace.run(long, [])
    assert trace.taken is not None and len(trace.taken.backward) == memory_trace.POINTS and not trace.taken.forward
    assert trace.taken.peak == 20 * MIB and "an earlier process's" in str(trace)


def test_the_trainer_hands_over_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    made = trainer(SFTTrainer, tmp_path, max_steps=2, more={"options": EAGER})
    made.memory_trace = MemoryTrace()
    compute = made.compute_loss

    def allocating(*args: Any, **kwargs: Any) -> Any:
        allocator("alloc", MIB)
        return compute(*args, **kwargs)

    made.compute_loss = allocating
    made.train()
    taken = made.memory_trace.taken
    assert taken is not None and taken.forward == [14 * MIB] and not taken.backward


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no GPU")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    config = read_config(
        None, {"model_name_or_path": "x", "dataset_name": "x", "trace_memory": True, "output_dir": tmp_path / "out"}
    )
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    config.dataset_name = str(tmp_path / "rows.txt")
    with pytest.raises(ConfigError, match=r"--trace-memory: trace_memory needs a CUDA device.*unsloth plan --png"):
        train(config)


def test_it_needs_steps_that_are_planned() -> None:
    given = {"model_name_or_path": "x", "dataset_name": "x", "trace_memory": True}
    assert isinstance(read_config(None, given), TrainConfig)
    for more in ({"compile": False}, {"method": "dpo"}):
        with pytest.raises(ConfigError, match="trace_memory needs method sft and compile: true"):
            read_config(None, {**given, **more})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs the CUDA allocator")
def test_pytorchs_history_has_what_is_read() -> None:
    trace = MemoryTrace()

    def step() -> None:
        x = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        del x
        trace.turn()
        torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")

    trace.run(step, [])
    trace.run(step, [])
    taken = trace.taken
    assert taken is not None
    assert max(taken.forward) - taken.before == 8 * MIB and max(taken.backward) - taken.before == 4 * MIB
