"""A checkpoint is whole or not there, whatever kills the process; damage is named, and an older one is used."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unsloth.runtime import checkpoints
from unsloth.runtime.checkpoints import MANIFEST, CheckpointError, damage, newest_whole, publish, recover, rotate, stage


def save(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    staged = stage(folder)
    (staged / "model.safetensors").write_bytes(random.Random(step).randbytes(5000))
    (staged / "optimizer.pt").write_bytes(random.Random(-step).randbytes(3000))
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (staged / "inner").mkdir()
    (staged / "inner" / "scheduler.pt").write_bytes(b"x")
    publish(staged, folder)
    return folder


def assert_holds(folder: Path, step: int) -> None:
    assert damage(folder) == []
    assert json.loads((folder / "trainer_state.json").read_text()) == {"global_step": step}
    assert (folder / "model.safetensors").read_bytes() == random.Random(step).randbytes(5000)


def test_what_was_saved_is_whole_and_the_newest_is_found(tmp_path) -> None:
    for step in (5, 10, 100):  # not in the order of the alphabet
        save(tmp_path, step)
    folder, notes = newest_whole(tmp_path)
    assert folder.name == "checkpoint-100" and notes == []
    assert_holds(folder, 100)
    assert newest_whole(tmp_path, tmp_path / "checkpoint-5")[0].name == "checkpoint-5"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def relisted(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGES = {
    "no manifest": (lambda c: (c / MANIFEST).unlink(), "has no manifest.json: it was not finished"),
    "half a manifest": (lambda c: truncate(c / MANIFEST), "manifest.json cannot be read"),
    "an empty manifest": (lambda c: (c / MANIFEST).write_text("[]"), "manifest.json cannot be read: it lists no files"),
    "another format": (lambda c: relisted(c, lambda m: m.update(format=9)), "its format is 9, this version reads 1"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors: is missing"),
    "half an optimizer": (lambda c: truncate(c / "optimizer.pt"), "optimizer.pt: has 2,993 bytes instead of 3,000"),
    "a flipped bit": (lambda c: flip(c / "optimizer.pt"), "optimizer.pt: its content changed"),
    "an emptied state": (lambda c: (c / "trainer_state.json").write_text(""), "trainer_state.json: has 0 bytes"),
    "a missing inner file": (lambda c: shutil.rmtree(c / "inner"), "inner/scheduler.pt: is missing"),
    "a folder for a file": (
        lambda c: ((c / "optimizer.pt").unlink(), (c / "optimizer.pt").mkdir()),
        "optimizer.pt: is a folder",
    ),
    "an empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), "is empty"),
    "a file for a folder": (lambda c: (shutil.rmtree(c), c.write_text("")), "is a file, not a folder"),
    "planted weights": (lambda c: (c / "pytorch_model.bin").write_text("x"), "pytorch_model.bin: is not listed"),
    "a way out": (
        lambda c: relisted(c, lambda m: m["files"].update({"../x": m["files"]["optimizer.pt"]})),
        "'../x', which is outside",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_survived(tmp_path, kind: str) -> None:
    harm, message = DAMAGES[kind]
    save(tmp_path, 5)
    broken = save(tmp_path, 10)
    harm(broken)
    for named in (None, broken):
        folder, notes = newest_whole(tmp_path, named)
        assert_holds(folder, 5)
        assert len(notes) == 1 and notes[0].startswith(f"{broken}: ") and message in notes[0]
    save(tmp_path, 10)  # the run comes by there again
    assert_holds(newest_whole(tmp_path)[0], 10)


def test_nothing_to_resume_from(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        newest_whole(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="checkpoint-7: there is no such folder"):
        newest_whole(tmp_path, tmp_path / "checkpoint-7")
    truncate(save(tmp_path, 5) / "optimizer.pt")
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"checkpoint-5: optimizer\.pt: has"):
        newest_whole(tmp_path, tmp_path / "checkpoint-5")  # a newer one is not what was asked for


def test_rotation_keeps_what_it_must(tmp_path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    rotate(tmp_path, None, [])
    assert len(checkpoints.checkpoints(tmp_path)) == 4
    rotate(tmp_path, 2, [paths[0], paths[2]])
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-1"]


# -- killed ------------------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Nothing that the code could catch as an error."""


CALLS = [(os, n) for n in ("rename", "replace", "fsync", "mkdir", "open", "unlink", "rmdir")]
CALLS += [(builtins, "open"), (io, "open")]


def cut_at(monkeypatch, count: int) -> Callable[[], int]:
    """Have the ``count``-th call that touches the disk end the process, as it were; returns how many were made."""
    made = [0]

    def counting(call: Callable) -> Callable:
        def run(*args, **kwargs):
            made[0] += 1
            if made[0] >= count:  # a dead process does not tidy up either
                raise PowerCut
            return call(*args, **kwargs)

        return run

    for module, name in CALLS:
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return lambda: made[0]


@pytest.mark.parametrize("again", [False, True], ids=["new", "replacing"])
def test_a_power_cut_at_every_point(tmp_path, monkeypatch, again: bool) -> None:
    with monkeypatch.context() as patches:
        calls = cut_at(patches, 10**9)
        save(tmp_path / "count", 5)
        if again:
            save(tmp_path / "count", 5)
        total = calls()
    assert total > 20
    for count in range(1, total + 1):
        place = tmp_path / str(count)
        save(place, 5)
        with monkeypatch.context() as patches, contextlib.suppress(PowerCut):
            cut_at(patches, count)
            save(place, 10)
            if again:
                save(place, 10)
        recover(place)
        folder, notes = newest_whole(place)
        assert notes == []
        assert_holds(folder, checkpoints.step_of(folder))
        save(place, 10)  # and the next run gets on
        assert_holds(newest_whole(place)[0], 10)
        assert sorted(p.name for p in place.iterdir()) == ["checkpoint-10", "checkpoint-5"]


SAVER = """
import sys
from pathlib import Path
from tests.runtime.test_checkpoints import save
from unsloth.runtime.checkpoints import newest_whole, recover, rotate, step_of
place = Path(sys.argv[1])
recover(place)
step = step_of(newest_whole(place)[0])
while True:
    step += 1
    folder = save(place, step)
    print(step, flush=True)
    rotate(place, 2, [folder])
"""


def test_fifty_kills_inside_of_saves(tmp_path) -> None:
    save(tmp_path, 0)
    root = Path(__file__).resolve().parents[2]
    delays = random.Random(0)
    inside = 0
    for _ in range(50):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()  # it saves
        started = time.perf_counter()
        process.stdout.readline()
        time.sleep(delays.uniform(0, time.perf_counter() - started))  # somewhere in the next one, on a busy machine too
        os.kill(process.pid, signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
        inside += any(p.name.startswith(".saving-") for p in tmp_path.iterdir())
        recover(tmp_path)
        folder, notes = newest_whole(tmp_path)
        assert notes == []
        assert checkpoints.step_of(folder) >= max(map(int, said), default=0)
        assert_holds(folder, checkpoints.step_of(folder))
    assert inside >= 10  # else the test tests nothing


def test_leftovers_of_another_step_go(tmp_path) -> None:
    save(tmp_path, 5)
    stage(tmp_path / "checkpoint-6")
    (tmp_path / ".deleting-checkpoint-1").mkdir()
    recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
