"""A run that is resumed is the one that was never stopped, bit for bit; and what stops it leaves a whole checkpoint."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from tests.runtime.test_trainer import EAGER, adapted, trainer
from tests.runtime.tiny import conversations, dataset
from unsloth.models import presets
from unsloth.runtime import checkpoints
from unsloth.runtime.checkpoints import CheckpointError, damage
from unsloth.runtime.finite import TrainingError
from unsloth.runtime.trainer import SFTTrainer

STEPS = 8
TIMES = ("_per_second", "_runtime", "train_loss")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(folder: Path, **changes: Any) -> Any:
    """A trainer whose every step draws random numbers (dropout) and which logs across checkpoints."""
    more = changes.pop("more", None) or {"compile": False}
    model = changes.pop("model", None) or adapted(dropout=0.1)
    settings = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        **changes,
    }
    return trainer(SFTTrainer, folder, model=model, more=more, **settings)


def ends(made: Any) -> dict[str, Any]:
    """All that a run ends with: parameters, moments, schedule, random numbers and log."""
    tensors = dict(made.model.state_dict())
    for i, state in made.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {i} {name}": value for name, value in state.items()}
    log = [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in made.state.log_history]
    return {
        "tensors": tensors,
        "schedule": made.lr_scheduler.state_dict(),
        "random": torch.random.get_rng_state(),
        "log": log,
        "position": (made._epoch, made._updates),
    }


def assert_same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["tensors"].keys() == other["tensors"].keys()
    differences = [float((a - other["tensors"][n]).abs().max()) for n, a in one["tensors"].items()]
    assert max(differences) == 0.0
    assert one["schedule"] == other["schedule"] and torch.equal(one["random"], other["random"])
    assert one["log"] == other["log"] and one["position"] == other["position"]


def only(folder: Path, step: int, to: Path) -> Path:
    """A run's folder as it was after a step."""
    to.mkdir(parents=True)
    shutil.copytree(folder / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to


def stream(rows: int = 14) -> Any:
    return IterableDataset.from_generator(lambda: iter(conversations(rows))).shuffle(seed=1, buffer_size=5)


CASES: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "mid-epoch": (dict, 2),  # 16 rows, 4 a step: an epoch has 4 steps
    "between two logs": (lambda: {"save_steps": 5}, 5),
    "at the end of an epoch": (dict, 4),
    "last step of an epoch shorter": (lambda: {"rows": dataset(14)}, 4),
    "second epoch": (lambda: {"rows": dataset(14)}, 6),
    "packed": (lambda: {"packing": True, "max_length": 64, "gradient_accumulation_steps": 1}, 3),
    "packed, wrapped": (lambda: {"packing": True, "packing_strategy": "wrapped", "max_length": 32}, 3),
    "padding-free": (lambda: {"padding_free": True, "max_length": None}, 5),
    "streaming": (lambda: {"rows": stream(64)}, 3),
    "streaming, second pass": (lambda: {"rows": stream(14)}, 5),  # 3 whole steps a pass
    "streaming, at the end of a pass": (lambda: {"rows": stream(14)}, 3),
    "evaluating": (lambda: {"eval_dataset": dataset(4), "eval_strategy": "steps", "eval_steps": 2}, 3),
    "full fine-tuning": (lambda: {"model": presets.build("tiny-llama").train()}, 3),
    "no clipping, sgd": (lambda: {"max_grad_norm": 0.0, "optim": "sgd", "optim_args": "momentum=0.9"}, 5),
    "neftune": (lambda: {"neftune_noise_alpha": 5}, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_and_uninterrupted_runs_are_the_same(tmp_path, case: str) -> None:
    changes, at = CASES[case]
    torch.manual_seed(0)
    whole = make(tmp_path / "whole", **changes())
    whole.train()
    torch.manual_seed(0)
    resumed = make(only(tmp_path / "whole", at, tmp_path / "resumed"), **changes())
    torch.rand(7)  # another process, other random numbers
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same_end(ends(resumed), ends(whole))


def test_the_compiled_step_resumes_exactly_as_well(tmp_path) -> None:
    whole = make(tmp_path / "whole", model=adapted(), more={"options": EAGER}, max_steps=4)
    whole.train()
    folder = only(tmp_path / "whole", 2, tmp_path / "resumed")
    resumed = make(folder, model=adapted(), more={"options": EAGER}, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(ends(resumed), ends(whole))


class At(TrainerCallback):
    """Does something at a point of a run."""

    def __init__(self, event: str, step: int, action: Callable[[], Any]) -> None:
        setattr(self, event, lambda args, state, control, **_: action() if state.global_step == step else None)


ACCUMULATING: dict[str, Any] = {"gradient_accumulation_steps": 3, "rows": dataset(24), "save_strategy": "no"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    """What a run of three micro-batches a step ends with."""
    whole = make(tmp_path_factory.mktemp("whole"), **ACCUMULATING)
    whole.train()
    return ends(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("event", "step"),
    [("on_substep_end", 2), ("on_substep_end", 4), ("on_substep_end", 0), ("on_step_end", 3), ("on_step_begin", 6)],
)
def test_a_signal_saves_and_ends_the_process_anywhere(tmp_path, undisturbed, number, event, step) -> None:
    stopped = make(tmp_path / "stopped", **ACCUMULATING)
    stopped.add_callback(At(event, step, lambda: os.kill(os.getpid(), number)))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as left:
        stopped.train()
    assert number == signal.SIGINT or left.value.code == 143
    assert signal.getsignal(number) == before
    (saved,) = checkpoints.checkpoints(tmp_path / "stopped")
    assert damage(saved) == [] and checkpoints.step_of(saved) == step
    resumed = make(tmp_path / "stopped", **ACCUMULATING)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(ends(resumed), undisturbed)


def test_damage_is_said_and_the_run_goes_on_from_before(tmp_path, caplog) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    for step, name in ((8, "optimizer.pt"), (7, "scheduler.pt"), (6, "rng_state.pth")):
        (tmp_path / "whole" / f"checkpoint-{step}" / name).unlink()
    resumed = make(tmp_path / "whole")
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-8: optimizer.pt: is missing" in caplog.text and "checkpoint-6: rng_state.pth" in caplog.text
    assert f"training goes on from {tmp_path / 'whole' / 'checkpoint-5'}" in caplog.text
    assert_same_end(ends(resumed), ends(whole))
    assert damage(tmp_path / "whole" / "checkpoint-8") == []  # written anew


def test_another_batch_size_is_said(tmp_path, caplog) -> None:
    make(tmp_path, max_steps=2).train()
    with caplog.at_level(logging.WARNING):
        make(tmp_path, max_steps=3, gradient_accumulation_steps=1).train(resume_from_checkpoint=True)
    assert "gradient_accumulation_steps was 2 in checkpoint-2 and is 1 now" in caplog.text


def test_how_often_to_log_and_save_is_what_the_resumed_run_says(tmp_path) -> None:
    make(tmp_path, max_steps=2, logging_steps=1, save_steps=1).train()
    resumed = make(tmp_path, max_steps=8, logging_steps=3, save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert [e["step"] for e in resumed.state.log_history if "loss" in e] == [1, 2, 3, 6]
    assert {c.name for c in checkpoints.checkpoints(tmp_path)} >= {"checkpoint-4", "checkpoint-8"}
    assert not (tmp_path / "checkpoint-5").exists()


def test_nothing_to_resume(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)
    make(tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="save_only_model"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_old_checkpoints_go_and_the_best_stays(tmp_path) -> None:
    made = make(
        tmp_path,
        save_total_limit=2,
        eval_dataset=dataset(4),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="mean_token_accuracy",
        greater_is_better=False,
    )
    made.train()
    best = Path(str(made.state.best_model_checkpoint))
    assert best.is_dir() and {p.name for p in checkpoints.checkpoints(tmp_path)} == {"checkpoint-8", best.name}
    assert all(damage(c) == [] for c in checkpoints.checkpoints(tmp_path))
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_no_pickle_of_the_settings_is_left(tmp_path) -> None:
    make(tmp_path, max_steps=1).train()
    names = {p.name for p in (tmp_path / "checkpoint-1").iterdir()}
    assert "training_args.json" in names and "training_args.bin" not in names


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "publish"])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch, caplog, place) -> None:
    made = make(tmp_path)
    full = [False]
    made.add_callback(At("on_step_begin", 4, lambda: full.__setitem__(0, True)))
    made.add_callback(At("on_step_begin", 6, lambda: full.__setitem__(0, False)))
    home = checkpoints if place == "publish" else made
    save = getattr(home, place)

    def saving(*args: Any, **kwargs: Any) -> Any:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(home, place, saving)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert caplog.text.count("could not be saved: [Errno 28] No space left on device") == 2
    assert "checkpoint-5 could not be saved" in caplog.text and "the newest is checkpoint-4" in caplog.text
    saved = checkpoints.checkpoints(tmp_path)
    assert [checkpoints.step_of(c) for c in saved] == [8, 7, 4, 3, 2, 1] and not any(map(damage, saved))
    assert not list(tmp_path.glob(".saving-*"))


def test_writes_that_the_system_refuses(tmp_path, caplog) -> None:
    """No monkeypatch: the kernel ends writes to files beyond a size, through whatever library they come."""
    made = make(tmp_path, max_steps=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    lower = (40_000, limits[1])  # the adapter is smaller, Adam's moments are larger
    made.add_callback(At("on_step_begin", 1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, lower)))
    try:
        with caplog.at_level(logging.WARNING):
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint-2 could not be saved" in caplog.text and "the newest is checkpoint-1" in caplog.text
    assert [c.name for c in checkpoints.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert damage(tmp_path / "checkpoint-1") == []


def test_a_bug_while_saving_is_no_full_disk(tmp_path, monkeypatch) -> None:
    made = make(tmp_path)
    monkeypatch.setattr(made, "_save_scaler", lambda _: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        made.train()
    assert not list(tmp_path.iterdir()) or checkpoints.checkpoints(tmp_path) == []


RUN = """
import sys
from pathlib import Path
from tests.runtime.test_sturdy import make
made = make(Path(sys.argv[1]), max_steps=10**6, save_steps=1, save_total_limit=2)
made.train(resume_from_checkpoint=len(sys.argv) > 2)
"""


def test_a_run_that_is_killed_goes_on(tmp_path) -> None:
    root = Path(__file__).resolve().parents[2]
    steps = []
    for again in ([], ["resume"]):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), *again], cwd=root)
        wanted = 3 + (steps[-1] if steps else 0)
        deadline = time.monotonic() + 120
        while max(map(checkpoints.step_of, checkpoints.checkpoints(tmp_path)), default=0) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found, notes = checkpoints.newest_whole(tmp_path)
        assert notes == []
        steps.append(checkpoints.step_of(found))
    assert steps[1] >= steps[0] + 3


# -- steps that are not finite -----------------------------------------------------------------------------------------


def poison(made: Any, steps: set[int], *, gradient: bool = False, value: float = math.nan) -> None:
    """Make the loss (or only the gradient) of some steps, counted from 1, not finite."""
    compute = made.compute_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        if made.state.global_step + 1 not in steps:
            return loss
        if gradient:
            loss.register_hook(lambda g: g * value)
            return loss
        return loss * value

    made.compute_loss = poisoned


@pytest.mark.parametrize("kind", ["loss", "gradient", "infinite"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tmp_path, caplog, kind, optim) -> None:
    made = make(tmp_path, optim=optim, max_steps=5, logging_steps=1, save_strategy="no")
    poison(made, {3}, gradient=kind == "gradient", value=math.inf if kind == "infinite" else math.nan)
    kept: dict[str, Any] = {}

    def state() -> dict[str, torch.Tensor]:
        tensors = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
        for i, entries in made.optimizer.state_dict()["state"].items():
            tensors |= {f"{i} {n}": torch.as_tensor(v).clone() for n, v in entries.items() if v is not None}
        return tensors

    made.add_callback(At("on_step_begin", 2, lambda: kept.update(before=state())))
    made.add_callback(At("on_step_end", 3, lambda: kept.update(after=state())))
    with caplog.at_level(logging.WARNING):
        made.train()
    assert kept["before"].keys() == kept["after"].keys()
    assert all(torch.equal(value, kept["after"][name]) for name, value in kept["before"].items())
    losses = {e["step"]: e["loss"] for e in made.state.log_history if "loss" in e}
    assert math.isnan(losses[3]) is (kind != "gradient")  # the true one
    assert all(math.isfinite(losses[s]) for s in (1, 2, 4, 5))
    assert next(e for e in made.state.log_history if e["step"] == 3)["skipped_steps"] == 1
    assert math.isfinite(made.state.log_history[-1]["train_loss"])
    assert all(torch.isfinite(p).all() for p in made.model.parameters())
    assert caplog.text.count("was skipped") == 1 and "step 3 was skipped: loss" in caplog.text


def test_the_rows_of_a_skipped_step_are_named(tmp_path, caplog) -> None:
    made = make(tmp_path, max_steps=7, save_strategy="no", rows=dataset(14))
    poison(made, {2, 6})
    seen: dict[int, list[str]] = {}
    draw = made.get_batch_samples

    def drawn(*args: Any) -> Any:
        batches, items = draw(*args)
        texts = [made.processing_class.decode(row) for batch in batches for row in batch["input_ids"].tolist()]
        seen[made.state.global_step + 1] = texts
        return batches, items

    made.get_batch_samples = drawn
    with caplog.at_level(logging.WARNING):
        made.train()
    said = [record.getMessage() for record in caplog.records if "was skipped" in record.getMessage()]
    assert [message.split(" was")[0] for message in said] == ["step 2", "step 6"]
    for message, step in zip(said, (2, 6), strict=True):
        lines = message.splitlines()[1:]
        assert len(lines) == 4
        for line, text in zip(lines, seen[step], strict=True):
            number = int(line.split(":")[0].removeprefix("  row "))
            trained = made.processing_class.decode(made.train_dataset[number]["input_ids"])
            assert text.startswith(trained)  # the batch is padded


def test_three_in_a_row_end_the_run(tmp_path, caplog) -> None:
    made = make(tmp_path, logging_steps=1)
    poison(made, {2, 3, 5, 6, 7})
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingError, match="step 7 was skipped") as error:
        made.train()
    assert "3rd step in a row" in str(error.value) and "row " in str(error.value)
    assert caplog.text.count("was skipped") == 4
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_a_log_is_the_mean_of_the_steps_that_have_a_loss(tmp_path) -> None:
    single = make(tmp_path, logging_steps=1, max_steps=4, save_strategy="no")
    poison(single, {2})
    single.train()
    together = make(tmp_path, logging_steps=4, max_steps=4, save_strategy="no")
    poison(together, {2})
    together.train()
    losses = [e["loss"] for e in single.state.log_history if "loss" in e and math.isfinite(e["loss"])]
    (entry,) = [e for e in together.state.log_history if "loss" in e]
    assert entry["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6) and entry["skipped_steps"] == 1


def test_trl_trains_on_after_a_bad_step_and_loses_everything(tmp_path) -> None:
    """What this is for: were it no longer so, the guard could go."""
    theirs = trainer(trl.SFTTrainer, tmp_path, max_steps=3)
    poison(theirs, {2})
    theirs.train()
    assert any(torch.isnan(p).any() for p in theirs.model.parameters())


def test_rows_of_tokens_can_be_streamed_without_a_tokenizer_in_the_report(tmp_path, caplog) -> None:
    rows = Dataset.from_list([{"input_ids": list(range(4, 20))} for _ in range(8)]).to_iterable_dataset()
    made = make(tmp_path, rows=rows, max_steps=2, save_strategy="no")
    poison(made, {1})
    with caplog.at_level(logging.WARNING):
        made.train()
    assert "row 1 of the batch" in caplog.text
