"""The picture of the loss: what it shows, and that it is there whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from unsloth.runtime.curves import plot_loss, smoothed

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def falling(steps: int = 60) -> list[dict[str, float]]:
    return [{"step": i, "loss": 2 + math.exp(-i / 10) + 0.1 * math.sin(9 * i), "lr": 1e-4} for i in range(1, steps + 1)]


HELD_OUT = [{"step": 0, "eval_loss": 3.1, "eval_runtime": 2.0}, {"step": 60, "eval_loss": 2.2}]
SUMMARY = {"step": 60, "train_loss": 2.3, "train_runtime": 50.0}


def pixels(path: Path, color: tuple[int, int, int]) -> int:
    """How many pixels are of a colour, edges not counted."""
    picture = np.rint(image.imread(path)[..., :3] * 255)
    return int((abs(picture - color) <= 2).all(-1).sum())


def test_picture(tmp_path) -> None:
    path = plot_loss([*falling(), *HELD_OUT, SUMMARY], tmp_path / "new" / "loss.png")
    assert path == tmp_path / "new" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = image.imread(path).shape
    assert (width, height) == (1050, 600)
    assert pixels(path, BLUE) > 500 and pixels(path, ORANGE) > 100
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Calls ``plot_loss`` and returns its curves by label, and the texts beside its points."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))

    def draw(history):
        plot_loss(history, tmp_path / "loss.png")
        (axes,) = figures.pop().axes
        curves = {line.get_label(): tuple(map(list, line.get_data())) for line in axes.lines}
        return curves, sorted(text.get_text() for text in axes.texts)

    return draw


def test_points_in_the_order_of_steps_without_what_is_not_finite(drawn) -> None:
    noise = [{"step": 7, "loss": math.nan}, {"step": 8, "eval_loss": math.inf}, {"loss": 9.0}, {"step": 9}]
    curves, texts = drawn([*reversed(falling()), *HELD_OUT, *noise, SUMMARY])
    steps, losses = curves["training"]
    assert steps == list(range(1, 61))
    assert losses == [entry["loss"] for entry in falling()]
    assert np.std(np.diff(curves["training, smoothed"][1])) < np.std(np.diff(losses)) / 2
    assert curves["held out"] == ([0, 60], [3.1, 2.2])
    assert texts == ["2.200", "3.100"]


def test_few_points_are_not_smoothed(drawn) -> None:
    curves, texts = drawn([{"step": 5, "loss": 2.5}, {"step": 5, "eval_loss": 2.25}])
    assert curves == {"training": ([5], [2.5]), "held out": ([5], [2.25])}
    assert texts == ["2.250"]


def test_a_run_too_short_to_log_has_its_mean(drawn) -> None:
    assert drawn([SUMMARY])[0] == {"training": ([60], [2.3])}


def test_held_out_rows_alone(drawn) -> None:
    assert drawn(HELD_OUT)[0] == {"held out": ([0, 60], [3.1, 2.2])}


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    values = [1.0, 2.0, 6.0, 4.0]
    assert smoothed(values, 1).tolist() == [1.5, 3.0, 4.0, 5.0]
    assert smoothed(values, 9).tolist() == [3.25] * 4


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": math.nan}], [{"step": 1, "grad_norm": 1.0}]])
def test_nothing_to_plot(tmp_path, history) -> None:
    with pytest.raises(ValueError, match=rf"no loss to plot: none of the history's {len(history)} entries"):
        plot_loss(history, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    path = plot_loss(falling(), tmp_path / "loss.png")
    before = path.read_bytes()

    def full(self, file, **_):
        Path(file).write_bytes(b"\x89PNG half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plot_loss(falling(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_folder_is_no_place_for_it(tmp_path) -> None:
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(OSError, match=r"loss\.png"):
        plot_loss(falling(), tmp_path / "loss.png")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
