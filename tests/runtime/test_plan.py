"""`unsloth.plan`: a deep model from a shallow trace, budgets, and what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import unsloth
from unsloth.compiler.options import OptionError
from unsloth.models import presets
from unsloth.models.source import ModelError
from unsloth.passes.memory.costs import ceilings
from unsloth.passes.memory.repeated import Deep
from unsloth.passes.memory.within import Plans, fastest_within
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


@pytest.fixture(scope="module")
def asked(folder: Path) -> tuple[_Question, Deep, Deep]:
    """A question, and its answers from a few layers and from all."""
    question = _Question(str(folder), presets.AutoConfig.from_pretrained(folder), 4, False, ceilings("H100"))
    assert question.traced == 5 and question.depth == 6
    repeated = question.ask(BATCH, SEQ)
    question.traced = 6
    return question, repeated, question.ask(BATCH, SEQ)


@pytest.mark.parametrize("host", [0, 1 << 40], ids=["on the device", "by way of the host"])
def test_repeated_layers_plan_like_traced_ones(asked: tuple[_Question, Deep, Deep], host: int) -> None:
    question, repeated, traced = asked
    planner: Any = traced.planner
    if host:
        repeated, planner = repeated.offloading(host), planner.offloading(host)  # type: ignore[assignment]
        assert len(repeated.gone) == len(planner.away) == 5
        assert repeated.smallest[0].peak_bytes < traced.smallest[0].peak_bytes
    for ours, rank in ((repeated.fastest[0], -1), (repeated.smallest[0], 0)):
        whole = planner.price(planner.assembled([rank] * 6))[0]
        counted = whole.peak_bytes - planner.liveness.standing.total
        assert ours.peak_bytes - question.standing.total == pytest.approx(counted, rel=0.01)
        assert ours.seconds == pytest.approx(whole.seconds, rel=0.02) and ours.host_bytes == whole.host_bytes


@pytest.mark.parametrize("host", [0, 1 << 40], ids=["on the device", "by way of the host"])
def test_repeated_pairs_of_layers_plan_like_traced_ones(asked: tuple[_Question, Deep, Deep], host: int) -> None:
    question, repeated, traced = asked
    spanned: Any = repeated.spanning(2)
    planner: Any = traced.planner.spanning(2)
    assert repeated.pairs() == traced.planner.pairs() == 2 and spanned.inner == {1, 3}
    assert spanned.residual_sizes() == planner.residual_sizes() and len(spanned.residual_sizes()) == 3
    if host:
        spanned, planner = spanned.offloading(host), planner.offloading(host)
        assert len(spanned.gone) == len(planner.away) == 3
    for ours, whole in ((spanned.fastest[0], planner.fastest[0]), (spanned.smallest[0], planner.smallest[0])):
        counted = whole.peak_bytes - planner.liveness.standing.total
        assert ours.peak_bytes - question.standing.total == pytest.approx(counted, rel=0.01)
        assert ours.seconds == pytest.approx(whole.seconds, rel=0.02) and ours.host_bytes == whole.host_bytes
    assert spanned.smallest[0].seconds > repeated.smallest[0].seconds
    whole = traced.spanning(2)
    assert whole is not None and whole.smallest[0].peak_bytes == pytest.approx(spanned.smallest[0].peak_bytes, rel=0.1)
    assert "compute residuals of 2 of 6 layers (1, 3) again" in spanned.smallest[0].words


@pytest.mark.parametrize("host", [0, 1 << 18, 1 << 40], ids=["none", "a little", "ample"])
@pytest.mark.parametrize("deep", [True, False], ids=["repeated", "traced"])
def test_more_memory_is_never_slower(asked: tuple[_Question, Deep, Deep], deep: bool, host: int) -> None:
    """Every plan is within its budget, and what is predicted of it is what its own timeline says."""
    planner: Any = asked[1] if deep else asked[2].planner
    other = planner.offloading(host) or planner
    least, most = other.smallest[0].peak_bytes, planner.fastest[0].peak_bytes
    assert least < most
    budgets = [least + (most - least) * i // 40 for i in range(42)]
    planned = [fastest_within(planner, budget, host) for budget in budgets]
    assert all(plan.peak_bytes == timeline.peak for plan, timeline in planned)
    found = [plan for plan, _ in planned]
    assert [p.seconds for p in found] == sorted((p.seconds for p in found), reverse=True)
    assert all(p.peak_bytes <= budget for p, budget in zip(found, budgets, strict=True))
    assert len({p.seconds for p in found}) > 3 and found[-1].policy == "keep" and not found[-1].host_bytes


def test_host_memory_that_is_too_small_is_said(asked: tuple[_Question, Deep, Deep]) -> None:
    residual = asked[1].residual_sizes()[0]
    planners: list[Plans] = [asked[1], asked[2].planner]
    for planner in planners:
        plan, _ = fastest_within(planner, 1, 2 * residual)
        # Two of five residuals are computed again, so that three are left.
        assert "holds the residuals of 2 layers, and those of 3 take" in plan.note
        plan, _ = fastest_within(planner, 1, residual - 1)
        assert "holds the residuals of 0 layers" in plan.note and "computed again instead" in plan.note
        assert not plan.host_bytes
        assert not fastest_within(planner, 1, 0)[0].note and not fastest_within(planner, 1 << 50, 1)[0].note


def test_a_plan_from_a_configuration(folder: Path, tmp_path: Path) -> None:
    found = unsloth.plan(
        str(folder / "config.json"), batch=BATCH, seq=SEQ, budget="80MiB", lora_r=4, quantization="nf4", host_memory=0
    )
    assert found.fits and found.plan.policy == "keep"
    assert sum(found.plan.parts.values()) == found.plan.peak_bytes == found.timeline.peak
    assert found.smallest <= found.fastest <= found.budget
    assert found.longest_sequence > SEQ and found.largest_batch >= BATCH
    question = _Question(str(folder), presets.AutoConfig.from_pretrained(folder), 4, True, ceilings("H100"))
    deep = question.ask(BATCH, found.longest_sequence)
    floor = min(d.smallest[0].peak_bytes for d in (deep, deep.spanning(2)) if d is not None)
    assert 0.9 * found.budget < floor <= found.budget
    text = str(found)
    assert "adapters" in text and "all 6 layers keep everything" in text
    found.draw(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(found.to_dict())


def test_a_plan_that_waits_in_host_memory(folder: Path, asked: tuple[_Question, Deep, Deep]) -> None:
    other = asked[1].offloading(1 << 30)
    assert other is not None
    floor = other.smallest[0].peak_bytes
    found = unsloth.plan(str(folder), batch=BATCH, seq=SEQ, lora_r=4, budget=floor, host_memory="1GiB")
    assert found.fits and found.smallest == floor and found.host_memory == 1 << 30 and found.plan.host_bytes > 0
    assert "offload residuals of 5 of 6 layers (0–4)" in str(found) and "of 1.00 GiB hold residuals" in str(found)
    assert found.to_dict()["offloaded"] == found.plan.host_bytes
    assert found.longest_sequence == pytest.approx(SEQ, abs=64) and found.largest_batch in (BATCH - 1, BATCH)
    with pytest.raises(OptionError, match="host_memory '1 Gibs' has an unknown unit, did you mean 1 GiB"):
        unsloth.plan(str(folder), host_memory="1 Gibs")


def test_bad_questions(folder: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'llama-8b'"):
        unsloth.plan("lama-8b")
    with pytest.raises(OptionError, match="did you mean 24 GiB"):
        unsloth.plan(str(folder), budget="24 Gibs")
    with pytest.raises(ModelError, match="give lora_r"):
        unsloth.plan(str(folder), quantization="nf4", lora_r=None)
    with pytest.raises(ModelError, match="'nf4' or 'none'"):
        unsloth.plan(str(folder), quantization="int8")  # type: ignore[arg-type]
