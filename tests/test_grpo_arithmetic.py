"""The arithmetic example: what it pays for, what it holds out, and two steps of its way on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import grpo_arithmetic as example
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.presets import build


@pytest.mark.parametrize(
    ("said", "form", "number"),
    [
        ("6 + 3 = 9", 0.5, 0.5),
        ("6 + 3 = 9\n", 0.5, 0.5),
        ("6 + 3 = 8", 0.5, 0.0),
        ("6 + 3 = 9, because", 0.2, 0.5),
        ("6 + 3 = 91", 0.5, 0.0),
        ("The answer is 6 + 3 = 9", 0.0, 0.0),
        ("3 + 6 = 9", 0.0, 0.0),
        ("9", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_what_is_paid_for(said: str, form: float, number: float) -> None:
    for completion in (said, [{"role": "assistant", "content": said}]):
        assert example.form([completion], problem=["6 + 3"]) == [form]
        assert example.number([completion], problem=["6 + 3"], result=[9]) == [number]


def test_held_out_problems_are_not_trained_on() -> None:
    trained, held_out = example.problems(9, "+-*", 16, seed=0)
    assert len(trained) + len(held_out) == 3 * 81 and len(held_out) == 16 and not set(trained) & set(held_out)
    assert example.problems(9, "+-*", 16, seed=0) == (trained, held_out) != example.problems(9, "+-*", 16, seed=1)
    (row,) = example.rows([example.Problem(7, "-", 9)])
    assert row["prompt"][-1]["content"] == "What is 7 - 9?" and row["result"] == -2


def test_its_way_in_two_steps(tmp_path: Path) -> None:
    given = example.parser().parse_args(
        ["--steps", "2", "--prompts", "1", "--held-out", "2", "--samples", "1", "--folder", str(tmp_path)]
    )
    training, held_out = example.train(build("tiny-llama"), byte_tokenizer(), tmp_path, given)
    assert list(training) == [1, 2] and list(held_out) == [0, 1, 2]
    assert all(0 <= reward <= 1 for reward in (*training.values(), *held_out.values()))
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        facts = {"seed": seed, "training": training, "held_out": held_out}
        (folder / "reward.json").write_text(json.dumps(facts))
    picture = example.draw_together([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "out" / "rewards.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1] and runs[0]["held_out"]["2"] == held_out[2]
