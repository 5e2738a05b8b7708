"""The comparison of loss curves: what counts as noise, and that runs differ by their seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.curve import SMOOTHING, Setting, begin, compare, curve, smoothed
from unsloth.models import presets
from unsloth.models.adapters import add_lora
from unsloth.models.load import random_batch
from unsloth.runtime.causal_lm import causal_lm_step

FALLING = list(np.linspace(4, 2, 60))


def shifted(by: float) -> list[float]:
    return [loss + by for loss in FALLING]


@pytest.mark.parametrize(
    ("error", "within"), [(0.0, True), (0.01, True), (0.2, False)], ids=["the same", "nearly", "another curve"]
)
def test_noise_is_the_distance_between_seeds(error: float, within: bool) -> None:
    eager = {0: FALLING, 1: shifted(0.1)}
    found = compare({"eager": eager, "compiled": {s: [x + error for x in run] for s, run in eager.items()}})
    assert found["within_noise"] is within
    assert found["seed_from_seed"]["largest"] == pytest.approx(0.1)
    assert found["compiled_from_eager"]["rms"] == pytest.approx(error)


def test_one_bad_stretch_is_enough() -> None:
    bad = [*FALLING[:30], *(loss + 0.5 for loss in FALLING[30:34]), *FALLING[34:]]
    found = compare({"eager": {0: FALLING, 1: shifted(0.09)}, "compiled": {0: bad, 1: shifted(0.09)}})
    assert found["compiled_from_eager"]["rms"] < 0.09 < found["compiled_from_eager"]["largest"]
    assert not found["within_noise"]


def test_a_seed_decides_all() -> None:
    assert len(smoothed(FALLING)) == len(FALLING) - SMOOTHING + 1
    model = add_lora(presets.build("tiny-llama"), rank=4)
    rows = random_batch(model, 12, 16)["input_ids"]
    setting = Setting(steps=4, batch=2, seq=16, dtype="float32")
    first, again, other = (curve(causal_lm_step, model, rows, setting, seed) for seed in (0, 0, 1))
    assert first == again and first != other and len(first) == 4
    begin(model, 0)
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
