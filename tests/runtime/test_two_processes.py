"""Two processes on one machine train as one does on the batch of both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.runtime.test_smaller import Memory
from tests.runtime.test_trainer import EAGER, adapted, trainer
from tests.runtime.tiny import dataset
from unsloth.runtime import checkpoints
from unsloth.runtime.trainer import SFTTrainer

ROOT = Path(__file__).resolve().parents[2]
MODES = {"eager": {"compile": False}, "compiled": {"options": EAGER}}


def make(folder: Path, more: dict[str, Any], **changes: Any) -> Any:
    """A trainer whose two processes see what one with twice the rows sees; ``more`` are our trainer's own arguments."""
    settings: dict[str, Any] = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 2,
        "rows": dataset(48),
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "sgd",
        **changes,
    }
    return trainer(SFTTrainer, folder, model=adapted(), more=more, **settings)


def results(made: Any) -> dict[str, Any]:
    entries = [e for e in made.state.log_history if "loss" in e]
    return {
        "loss": [e["loss"] for e in entries],
        "norm": [e["grad_norm"] for e in entries],
        "weights": {n: p.flatten().tolist() for n, p in made.model.named_parameters() if "lora" in n},
        "graphs": len(made.explanation.graphs),
        "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }


def launch(script: str, folder: Path, *command: str, **environment: str) -> dict[str, Any]:
    """What a script, run in one process or by ``command``, leaves in the folder's results.json."""
    done = subprocess.run(
        [sys.executable, *command, script, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


TWO = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Everything that two processes do here, in one start of them: the folder, and by scenario what came of it."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(__file__, folder, *TWO)


def assert_weights(found: dict[str, Any], wanted: dict[str, Any], rtol: float, atol: float) -> None:
    for name, weights in wanted["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weights), rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Any]:
    made = make(tmp_path_factory.mktemp("one"), MODES["eager"], per_device_train_batch_size=4)
    made.train()
    return results(made)


@pytest.mark.parametrize("mode", MODES)
def test_as_one_process_on_the_batch_of_both(one, two, mode) -> None:
    found = two[1][mode]
    assert found["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert found["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert_weights(found, one, 1e-4, 1e-6)
    assert found["breaks"] == 0 and found["graphs"] <= 2 * (mode == "compiled")


def test_two_processes_resume_exactly(two) -> None:
    """From the checkpoint before the newest, of which one process's part is gone."""
    folder, found = two
    saved = checkpoints.checkpoints(folder / "eager")
    assert [c.name for c in saved] == ["checkpoint-4", "checkpoint-2"] and not any(map(checkpoints.damage, saved))
    assert {"progress.json", "progress_1.json", "rng_state_0.pth", "rng_state_1.pth"} <= {
        p.name for p in saved[0].iterdir()
    }
    assert found["damaged"]["from"] == "checkpoint-2"
    assert found["damaged"]["weights"] == found["eager"]["weights"]
    assert found["damaged"]["loss"] == found["eager"]["loss"]


def test_memory_short_in_one_makes_both_halve(two) -> None:
    """In the middle of backward, where the other one would wait for its gradients."""
    found = two[1]["short"]
    assert found["parts"] == [2, 2] and found["refused"] == [[], [2]]
    assert found["loss"] == pytest.approx(two[1]["eager"]["loss"], rel=1e-5)
    assert_weights(found, two[1]["eager"], 1e-5, 1e-7)


def test_a_signal_to_one_stops_both_at_the_same_step(two) -> None:
    folder, found = two
    assert found["stop"]["left"] == [{"code": 143, "step": 3}] * 2
    (saved, *_) = checkpoints.checkpoints(folder / "stop")
    assert saved.name == "checkpoint-4" and found["stop"]["from"] == "checkpoint-3"
    assert found["stop"]["weights"] == found["eager"]["weights"] and found["stop"]["loss"] == found["eager"]["loss"]


class StopSecond(TrainerCallback):
    """A signal to the second process, in the middle of its third step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def of_both(value: Any) -> list[Any]:
    """A value of each process, in all of them."""
    values: list[Any] = [None, None]
    torch.distributed.all_gather_object(values, value)
    return values


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    """Go on from the newest whole checkpoint."""
    newest = checkpoints.newest_whole(folder, None)[0].name if rank == 0 else ""
    made = make(folder, MODES["eager"])
    made.train(resume_from_checkpoint=True)
    return {**results(made), "from": of_both(newest)[0]}


def main(folder: Path) -> None:
    """One of two processes."""
    found: dict[str, Any] = {}
    for mode in MODES:
        made = make(folder / mode, MODES[mode])
        made.train()
        found[mode] = results(made)
    rank = made.args.process_index

    if rank == 0:
        shutil.copytree(folder / "eager", folder / "damaged")
        (folder / "damaged" / "checkpoint-4" / "progress_1.json").unlink()
    torch.distributed.barrier()
    found["damaged"] = resumed(folder / "damaged", rank)

    # The second process cannot do two rows, from the second micro-batch of the first step on.
    made = make(folder / "short", MODES["eager"])
    memory = Memory(made.model, 1 if rank == 1 else 9, backward=True, after=1)
    made.train()
    found["short"] = {**results(made), "parts": of_both(made._smaller.parts), "refused": of_both(memory.refused)}

    made = make(folder / "stop", MODES["eager"])
    made.add_callback(StopSecond())
    try:
        made.train()
        left = None
    except SystemExit as error:
        left = {"code": error.code, "step": made.state.global_step}
    torch.distributed.barrier()
    found["stop"] = {"left": of_both(left), **resumed(folder / "stop", rank)}
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
