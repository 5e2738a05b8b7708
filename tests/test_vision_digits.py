"""The digits example: what it holds out, what it asks, and three steps of its way on a tinier model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="pip install scikit-learn")

from examples import vision_digits as example


def test_held_out_digits_are_not_trained_on() -> None:
    trained, held_out = example.digits(297, seed=0)
    assert (
        len(trained) == 1500 and len(held_out) == 297 and not {d.image for d in trained} & {d.image for d in held_out}
    )
    assert {d.value for d in held_out} == set(range(10))
    assert example.digits(297, seed=0) == (trained, held_out) != example.digits(297, seed=1)


def test_questions() -> None:
    asked = example.rows([example.Digit(b"png", 7), example.Digit(b"png", 8)])
    assert [row["messages"][1]["content"] for row in asked] == ["7", "odd", "8"]
    assert asked[1]["messages"][0]["content"][1]["text"] == example.PARITY


def test_its_way_in_three_steps(tmp_path: Path) -> None:
    words = ["--steps", "3", "--batch", "4", "--held-out", "4", "--folder", str(tmp_path), "--learning-rate", "0.002"]
    given = example.parser().parse_args([*words, "--lowering", "eager"])
    model, processor = example.small_model(hidden=32, layers=1)
    losses, held_out = example.train(model, processor, given)
    assert list(held_out) == [0, 1, 2, 3] and all(0 <= share <= 1 for share in held_out.values())
    assert json.dumps(losses)
    assert example.plot({1: 2.0}, held_out, tmp_path / "out" / "a.png").read_bytes().startswith(b"\x89PNG")
