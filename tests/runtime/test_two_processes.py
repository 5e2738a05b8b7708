"""Two processes on one machine train as one does on the batch of both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.runtime.test_trainer import EAGER, adapted, trainer
from tests.runtime.tiny import dataset
from unsloth.runtime import checkpoints
from unsloth.runtime.trainer import SFTTrainer

ROOT = Path(__file__).resolve().parents[2]
MODES = {"eager": {"compile": False}, "compiled": {"options": EAGER}}


def make(folder: Path, mode: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "rows": dataset(48),
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "sgd",
        **changes,
    }
    return trainer(SFTTrainer, folder, model=adapted(), more=MODES[mode], **settings)


def results(made: Any) -> dict[str, Any]:
    entries = [e for e in made.state.log_history if "loss" in e]
    return {
        "loss": [e["loss"] for e in entries],
        "norm": [e["grad_norm"] for e in entries],
        "weights": {n: p.flatten().tolist() for n, p in made.model.named_parameters() if "lora" in n},
        "graphs": len(made.explanation.graphs),
        "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }


def in_two_processes(folder: Path, mode: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(Path(__file__)), str(folder), mode, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("mode", MODES)
def test_as_one_process_on_the_batch_of_both(tmp_path, mode) -> None:
    torch._dynamo.reset()
    one = make(tmp_path / "one", mode, per_device_train_batch_size=4)
    one.train()
    wanted, found = results(one), in_two_processes(tmp_path / "two", mode)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-4)
    for name, weights in wanted["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weights), rtol=1e-4, atol=1e-6)
    assert found["breaks"] == 0 and found["graphs"] <= 2 * (mode == "compiled")
    torch._dynamo.reset()


def test_two_processes_resume_exactly(tmp_path) -> None:
    whole = in_two_processes(tmp_path / "two", "eager")
    saved = checkpoints.checkpoints(tmp_path / "two")
    assert [c.name for c in saved] == ["checkpoint-4", "checkpoint-2"] and not any(map(checkpoints.damage, saved))
    assert {"progress.json", "progress_1.json", "rng_state_0.pth", "rng_state_1.pth"} <= {
        p.name for p in saved[0].iterdir()
    }
    (saved[0] / "progress_1.json").unlink()
    resumed = in_two_processes(tmp_path / "two", "eager", "resume")
    assert resumed["weights"] == whole["weights"] and resumed["loss"] == whole["loss"]


def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path) -> None:
    whole = in_two_processes(tmp_path / "whole", "eager")
    in_two_processes(tmp_path / "two", "eager", "stop")
    left = [json.loads((tmp_path / "two" / f"left_{rank}.json").read_text()) for rank in (0, 1)]
    assert left == [{"code": 143, "step": 3}] * 2
    saved = checkpoints.checkpoints(tmp_path / "two")
    assert saved[0].name == "checkpoint-3" and checkpoints.damage(saved[0]) == []
    resumed = in_two_processes(tmp_path / "two", "eager", "resume")
    assert resumed["weights"] == whole["weights"] and resumed["loss"] == whole["loss"]


class StopSecond(TrainerCallback):
    """A signal to the second process, in the middle of its third step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    made = make(Path(sys.argv[1]), sys.argv[2], per_device_train_batch_size=2)
    if "stop" in sys.argv:
        made.add_callback(StopSecond())
        try:
            made.train()
        except SystemExit as left:
            found = {"code": left.code, "step": made.state.global_step}
            (Path(sys.argv[1]) / f"left_{made.args.process_index}.json").write_text(json.dumps(found))
    else:
        made.train(resume_from_checkpoint="resume" in sys.argv)
    if made.is_world_process_zero():
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results(made)))
    torch.distributed.destroy_process_group()
