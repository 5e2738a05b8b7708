"""`unsloth.plan`: a deep model from a shallow trace, budgets, and what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import unsloth
from unsloth.compiler.options import OptionError
from unsloth.models import presets
from unsloth.models.source import ModelError
from unsloth.passes.memory.costs import ceilings
from unsloth.runtime.plan import _Question

BATCH, SEQ = 2, 256


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of six layers without weights."""
    config = presets.config("tiny-llama")
    config.num_hidden_layers = 6
    path = tmp_path_factory.mktemp("six")
    config.save_pretrained(path)
    return path


def test_repeated_layers_plan_like_traced_ones(folder: Path) -> None:
    question = _Question(str(folder), presets.AutoConfig.from_pretrained(folder), 4, False, ceilings("H100"))
    assert question.traced == 3 and question.depth == 6
    repeated = question.ask(BATCH, SEQ)
    question.traced = 6
    traced = question.ask(BATCH, SEQ)
    budgets = []
    for ours, rank in ((repeated.fastest[0], -1), (repeated.smallest[0], 0)):
        planner = traced.planner
        whole = planner.price(planner.assembled([rank] * 6))[0]
        counted = whole.peak_bytes - planner.liveness.standing.total
        assert ours.peak_bytes - question.standing.total == pytest.approx(counted, rel=0.01)
        assert ours.seconds == pytest.approx(whole.seconds, rel=0.02)
        budgets.append(ours.peak_bytes)
    most, least = budgets
    assert least < most
    # More budget is never slower, and every plan is within its budget.
    found = [repeated.within(least + (most - least) * i // 8)[0] for i in range(9)]
    assert [p.seconds for p in found] == sorted((p.seconds for p in found), reverse=True)
    assert all(p.peak_bytes <= least + (most - least) * i // 8 for i, p in enumerate(found))
    assert len({p.seconds for p in found}) > 3 and found[0].seconds > found[-1].seconds


def test_a_plan_from_a_configuration(folder: Path, tmp_path: Path) -> None:
    found = unsloth.plan(
        str(folder / "config.json"), batch=BATCH, seq=SEQ, budget="80MiB", lora_r=4, quantization="nf4"
    )
    assert found.fits and found.plan.policy == "keep"
    assert sum(found.plan.parts.values()) == found.plan.peak_bytes == found.timeline.peak
    assert found.smallest <= found.fastest <= found.budget
    assert found.longest_sequence > SEQ and found.largest_batch >= BATCH
    question = _Question(str(folder), presets.AutoConfig.from_pretrained(folder), 4, True, ceilings("H100"))
    floor = question.ask(BATCH, found.longest_sequence).smallest[0].peak_bytes
    assert 0.9 * found.budget < floor <= found.budget
    text = str(found)
    assert "adapters" in text and "all 6 layers keep everything" in text
    found.draw(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(found.to_dict())


def test_bad_questions(folder: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'llama-8b'"):
        unsloth.plan("lama-8b")
    with pytest.raises(OptionError, match="did you mean 24 GiB"):
        unsloth.plan(str(folder), budget="24 Gibs")
    with pytest.raises(ModelError, match="give lora_r"):
        unsloth.plan(str(folder), quantization="nf4", lora_r=None)
    with pytest.raises(ModelError, match="'nf4' or 'none'"):
        unsloth.plan(str(folder), quantization="int8")  # type: ignore[arg-type]
