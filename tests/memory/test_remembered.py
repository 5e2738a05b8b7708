"""Plans that are written down come back whole, and a file that is no plan is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from unsloth.passes.memory import remembered
from unsloth.passes.memory.plan import Plan, Tag

PLAN = Plan(
    "mixed", {"y": Tag.KEEP, "z": Tag.OFFLOAD, "w": Tag.RECOMPUTE}, 12, "it fits", peak_bytes=99, seconds=0.5,
    parts={"weights": 9}, words="all", host_bytes=7, note="short", tokens=96, limit=128, rows=2048,
    stretches=((("a", "b"), ("c",)), (("d",),)), inner=("w",),
)  # fmt: skip


def test_a_plan_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "cache_dir", lambda: str(tmp_path))
    assert remembered.recall("ab12") is None
    remembered.remember("ab12", PLAN, 42)
    assert remembered.recall("ab12") == (PLAN, 42)
    (path,) = tmp_path.glob("unsloth-plans/ab/*")
    for text in ("{", "{}", '{"plan": {"tags": {"y": "burn"}}, "floor": 1}'):
        path.write_text(text)
        assert remembered.recall("ab12") is None


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(remembered, "cache_dir", lambda: str(tmp_path / "file"))
    remembered.remember("ab12", PLAN, 42)
    assert remembered.recall("ab12") is None
