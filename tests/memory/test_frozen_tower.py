"""A frozen vision tower costs no memory: nothing below the first trained parameter is kept for backward."""

from __future__ import annotations

import pytest

from benchmarks import sweep_worker
from unsloth.compiler.joint import trace
from unsloth.compiler.options import Options
from unsloth.passes.memory.plan import keep_plan
from unsloth.passes.rewrite import module_path

TOWER, LAYERS = "vision_tower", "language_model.layers."


@pytest.fixture(scope="module")
def llava():
    model, batch, _ = sweep_worker.runnable("llava", "vision")
    return model, batch


def _homes(llava, trained: str) -> list[str]:
    """Modules of the values that the plan which keeps all would keep, where only parameters so named are trained."""
    model, batch = llava
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    assert any(p.requires_grad for p in model.parameters())
    joint = trace(model, batch, Options()).joint
    kept = keep_plan(joint).kept
    assert kept
    nodes = {n.name: n for n in joint.forward}
    return [module_path(nodes[name]) for name in kept]


def test_a_trained_tower_is_kept(llava) -> None:
    assert any(TOWER in home for home in _homes(llava, ""))


def test_nothing_of_a_frozen_tower_is_kept(llava) -> None:
    homes = _homes(llava, LAYERS)
    assert not any(TOWER in home or "projector" in home for home in homes)
    assert any(f"{LAYERS}0" in home for home in homes)


def test_nothing_below_the_first_trained_layer_is_kept(llava) -> None:
    homes = _homes(llava, f"{LAYERS}1")
    assert not any(TOWER in home or "projector" in home for home in homes)
    assert sum(f"{LAYERS}0" in home for home in homes) <= 2, (
        homes
    )  # what it gives to the next one, whose norm is computed with it
    assert any(f"{LAYERS}1" in home for home in homes)


def test_a_trained_projector_needs_nothing_of_the_tower(llava) -> None:
    homes = _homes(llava, "projector")
    assert not any(f"{TOWER}.encoder" in home for home in homes)
