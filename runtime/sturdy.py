"""Training that survives: checkpoints that are whole, exact resumption, signals, steps that are not finite.

:class:`Sturdy` stands before a trainer of transformers or TRL in a class's bases. What is saved is theirs, weights,
optimiser, schedule, random numbers; ours is how it reaches the disk (:mod:`.checkpoints`) and what they forget: the
place in the data of streams, sums and metrics between two logs, and the middle of an accumulated step. A resumed run is
the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from . import checkpoints
from .batches import rows_of
from .finite import FiniteGuard
from .signals import stop_signals
from .standing import Progress, random_numbers, random_state

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # transformers reads it by this name
MUST_AGREE = ("train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "rows", "max_length", "packing")
"""Settings without which a place in the data means another one."""


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class Sturdy(_Base):
    """Mixin for a ``transformers.Trainer``; see the module."""

    _asked: int | None = None  # the signal that asks to stop
    _stop = False  # all processes have heard of it
    _saved: int | None = None  # the step of the last checkpoint of this run
    _resumed: Progress | None = None
    _in_step = False
    _at_start: tuple[Any, Progress] | None = None  # random numbers and progress where the running step began
    _batch: Sequence[Any] = ()  # the micro-batches of the running step
    _epoch = _updates = _logged_at = 0  # passes before this one, steps in it, and the step of the last log
    _first_pass = True

    def row_name(self, index: int) -> str:
        """What a row of the training data is called in messages, by its position counted from 0."""
        return f"row {index}"

    # -- resuming ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint; SIGTERM and SIGINT save one and end the process.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest. A damaged one is named in a warning, and the
                newest whole one before it taken instead.

        Raises:
            CheckpointError: when there is none to resume from.
            TrainingError: when the loss or the gradient is not finite three steps in a row.
            KeyboardInterrupt, SystemExit: after SIGINT and SIGTERM (143), when the checkpoint is written.
        """
        self._asked, self._stop, self._saved, self._resumed = None, False, None, None
        self._in_step, self._at_start = False, None
        output_dir = Path(str(self.args.output_dir))
        if resume_from_checkpoint:
            named = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            self._tidy(output_dir if named is None else named.parent)
            found, notes = checkpoints.newest_whole(output_dir, named)
            for note in notes:
                logger.warning("damaged, not used: %s", note)
            if notes:
                logger.warning("training goes on from %s", found)
            self._resumed = self._read_progress(found)
            self._saved = checkpoints.step_of(found)
            resume_from_checkpoint = str(found)
        else:
            self._tidy(output_dir)
        self.guard = FiniteGuard(self.args.device)
        callback = _Follow(self)
        self.add_callback(callback)
        try:
            with stop_signals(self._ask):
                return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self.remove_callback(callback)

    def _tidy(self, output_dir: Path) -> None:
        """Before anybody looks: what a process that died while it saved has left."""
        if self.args.should_save:
            checkpoints.recover(output_dir)
        self._wait()

    def _read_progress(self, checkpoint: Path) -> Progress:
        path = checkpoint / _of_process("progress{}.json", self.args.process_index)
        if not path.is_file():
            raise checkpoints.CheckpointError(
                f"{checkpoint} has no {path.name}: it was saved by {self.args.process_index} processes or fewer, or "
                "with save_only_model, and cannot be resumed"
            )
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        now = self._settings()
        for name, value in progress.settings.items():
            if name in now and now[name] != value:
                logger.warning(
                    "%s was %s in %s and is %s now: the run goes on, but not with the rows that it would have had",
                    *(name, value, checkpoint.name, now[name]),
                )
        return progress

    def _settings(self) -> dict[str, Any]:
        known = {name: getattr(self.args, name) for name in MUST_AGREE if hasattr(self.args, name)}
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None  # type: ignore[arg-type]
        return {**known, "rows": rows}

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(*args, **kwargs)
        if (progress := self._resumed) is not None and not self.args.ignore_data_skip:
            per_epoch = kwargs.get("num_update_steps_per_epoch", args[1] if len(args) > 1 else None)
            streams = per_epoch == self.state.max_steps and not _sized(self.train_dataset)
            if streams:  # of which transformers takes all passes for one
                epoch, batches = progress.epoch, progress.updates * self.args.gradient_accumulation_steps
        self._epoch, self._updates = epoch, batches // self.args.gradient_accumulation_steps
        self._first_pass = True
        return epoch, batches

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._note_start()

    def _note_start(self) -> None:
        """Remember the state in which a step begins, for a checkpoint in its middle."""
        self._at_start = (random_state(), self._progress())

    def _begin(self) -> None:
        """After transformers has set up its own sums."""
        sums: Any = self
        if (progress := self._resumed) is not None:
            sums._tr_loss.fill_(progress.losses)
            sums._total_loss_scalar = -progress.losses  # train_loss is the mean of this call's steps
            sums._globalstep_last_logged = progress.logged_at
            self.state.total_flos = progress.flos
            # transformers has read from the checkpoint how often to log, evaluate and save: what is asked now wins.
            self.state.compute_steps(self.args, self.state.max_steps)
            if hasattr(sums, "_metrics"):
                sums._metrics["train"].update({name: list(values) for name, values in progress.metrics.items()})
                sums._total_train_tokens = progress.tokens
        self._logged_at = sums._globalstep_last_logged
        self.guard.begin(sums._tr_loss)

    # -- a step --------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if 0 < len(batches) < num_batches:  # the end of a stream; transformers would add these to the next pass's step
            logger.warning(
                "a pass over the stream ends with %d of %d batches of a step, left out", len(batches), num_batches
            )
            batches, items = [], None
        self._batch = batches
        return batches, items

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batch, place, sums = self._batch, (self._epoch, self._updates), self
        self.guard.judge(
            getattr(self.optimizer, "optimizer", self.optimizer),
            sums._tr_loss,  # type: ignore[attr-defined]
            norm,
            self.state.global_step + 1,
            lambda: rows_of(self, batch, *place),
            stop=self._asked is not None,
            scaled=getattr(self.accelerator, "scaler", None) is not None,
        )
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.is_in_train):  # else evaluating would change the training
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            self._hear(all_steps=True)
            skipped, steps = self.guard.skipped, self.state.global_step - self._logged_at
            logs["loss"] = self.guard.mean(logs["loss"], steps)
            if skipped:
                logs["skipped_steps"] = skipped
            self._logged_at = self.state.global_step
        super().log(logs, start_time)

    def _hear(self, *, all_steps: bool = False) -> None:
        """Read what the device says about the last steps."""
        if any(verdict.stop for verdict in self.guard.read(all_steps=all_steps)):
            self._stop = True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        leaving = self._stop  # what is heard only while logging is for the next step
        if leaving:
            self.control.should_evaluate, self.control.should_save = False, True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if leaving:
            self._leave()

    def _ask(self, number: int) -> None:
        self._asked = number

    def _leave(self) -> None:
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self._asked or signal.SIGTERM))

    # -- saving --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if step == self._saved:
            return
        self._hear(all_steps=True)
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"checkpoint-{step}"
        best_before = self.state.best_model_checkpoint
        failure = None
        try:
            self._write(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            failure = error
        if self._anyone(failure is not None):
            self.state.best_model_checkpoint = best_before
            self._report_failure(folder, failure)
            return
        self._saved = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoints.rotate(output_dir, self.args.save_total_limit, {folder, *([Path(best)] if best else [])})

    def _write(self, folder: Path) -> None:
        staged = folder.with_name(f".saving-{folder.name}")
        if self.args.should_save:
            staged = checkpoints.stage(folder)
        self._wait()
        try:
            self._fill(staged, folder)
        except Exception:
            if self.args.should_save:
                checkpoints.discard(staged)
            raise
        self._wait()
        if self.args.should_save:
            try:
                checkpoints.publish(staged, folder)
            except Exception:
                checkpoints.discard(staged)
                raise

    def _fill(self, staged: Path, folder: Path) -> None:
        """Everything that a run goes on with, by transformers' own means."""
        self.save_model(str(staged), _internal_call=True)
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == folder or best.exists():
                self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staged))
            self._save_scaler(str(staged))
            # In the middle of a step its first micro-batches are done again, with the random numbers they had.
            drawn, progress = self._at_start if self._in_step and self._at_start else (None, None)
            with random_numbers(drawn):
                self._save_rng_state(str(staged))
            path = staged / _of_process("progress{}.json", self.args.process_index)
            path.write_text(json.dumps((progress or self._progress()).plain()), encoding="utf-8")
        if self.args.should_save:
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self._note_state(type(callback).__name__, callback.state())
            self.state.save_to_json(str(staged / STATE))

    def _note_state(self, name: str, state: dict[str, Any]) -> None:
        states: Any = self.state.stateful_callbacks
        if isinstance(states.get(name), list):
            states[name].append(state)
        else:
            states[name] = state

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save and (pickled := folder / "training_args.bin").exists():
            pickled.unlink()  # nobody needs a pickle in order to read what the settings were
            (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _progress(self) -> Progress:
        sums: Any = self
        metrics = sums._metrics["train"] if hasattr(sums, "_metrics") else {}
        return Progress(
            epoch=self._epoch,
            updates=self._updates,
            losses=sums._tr_loss.clone(),
            logged_at=sums._globalstep_last_logged,
            tokens=getattr(sums, "_total_train_tokens", 0),
            flos=self.state.total_flos + self.current_flos,
            metrics={name: list(values) for name, values in metrics.items()},
            settings=self._settings(),
        )

    def _report_failure(self, folder: Path, error: BaseException | None) -> None:
        left = [c for c in checkpoints.checkpoints(folder.parent) if not checkpoints.damage(c)]
        reason = "another process failed" if error is None else str(error).strip().splitlines()[0]
        stays = f"the newest is {left[0].name}" if left else "there is none yet"
        logger.warning(
            "%s could not be saved: %s; earlier checkpoints are as they were, %s", folder.name, reason, stays
        )

    def _anyone(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.args.world_size <= 1:
            return here
        flag = torch.tensor(float(here), device=self.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _wait(self) -> None:
        self.accelerator.wait_for_everyone()


class _Follow(TrainerCallback):
    """Keeps a trainer's place, and stops it when it was asked to."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        if not trainer._first_pass:
            trainer._epoch, trainer._updates = trainer._epoch + 1, 0
        trainer._first_pass = False
        trainer._note_start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.trainer._updates:  # the first step of a pass begins with it: making its iterator draws a number
            self.trainer._note_start()
        self.trainer._in_step = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer._asked is not None and args.world_size <= 1:
            self.trainer._stop = control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._in_step = False
        self.trainer._updates += 1
        self.trainer._hear()
        if self.trainer._asked is not None and args.world_size <= 1:
            self.trainer._stop = True
        if self.trainer._stop:
            control.should_training_stop = control.should_save = True


def _of_process(name: str, index: int) -> str:
    return name.format(f"_{index}" if index else "")


def _sized(dataset: Any) -> bool:
    return hasattr(dataset, "__len__")


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether an error of saving is the disk's: torch and safetensors do not raise OSError for it."""
    words = ("PytorchStreamWriter", "file write failed", "unexpected pos", "I/O error", "os error")
    return isinstance(error, OSError) or any(word in str(error) for word in words)
