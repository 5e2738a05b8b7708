"""Steps that repeat, recorded once as a CUDA graph and replayed.

Launching a step of a 1B model one kernel at a time takes the host longer than the device needs for it. A recording is
launched as one. It is the same kernels in the same order on the same numbers, random numbers included, so nothing about
training changes but the time.

What a recording cannot see is Python. It is replayed only while the guards hold under which Dynamo compiled the step
(module flags, the scale of an adapter, autocast, ...), and while parameters and inputs are where and what they were.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import offload

logger = logging.getLogger(__name__)

LAUNCHES = 3
"""So often a step is launched before it is recorded: kernels are compiled and libraries have chosen theirs by then."""
RECORDINGS = 2
"""At most so many shapes are recorded. Recordings share memory, but not all of it."""
GRADIENT_SHARE = 0.02
"""Share of the device's memory up to which gradients may be there twice (what a micro-batch adds, and the sum)."""

Step = Callable[[dict[str, Any]], tuple[Any, ...]]
"""Forward and backward of (inputs by name). Leaves gradients on the parameters; returns tensors and other values."""
Guards = Callable[[], bool]
"""Whether the compiled step would run as it ran when it was recorded."""


class _State:
    """Where a model's parameters and buffers are. Asked at each replay: a walk over modules would take milliseconds."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [
            (held, name, tensor, tensor.data_ptr(), tensor.requires_grad)
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def is_there(self) -> bool:
        """Whether all of it is still in the same place, and trained if it was."""
        return all(
            held.get(name) is tensor and tensor.data_ptr() == place and tensor.requires_grad == trained
            for held, name, tensor, place, trained in self._tensors
        )


@dataclass(frozen=True)
class _Recording:
    graph: Any
    inputs: dict[str, Any]
    outputs: tuple[Any, ...]
    gradients: dict[nn.Parameter, Tensor]
    state: _State
    guards: Guards


class Recorder:
    """Runs forward and backward of micro-batches: launched at first, replayed where they repeat.

    Args:
        model: whose parameters and buffers a step reads and whose gradients it leaves.
        enabled: otherwise every step is launched.

    Attributes:
        recording: whether a step is being recorded right now.
        replayed: number of steps that were replayed.
        reason: why nothing is recorded any more, or None.
    """

    def __init__(self, model: nn.Module, *, enabled: bool = True) -> None:
        self.model = model
        self.recording = False
        self.replayed = 0
        self.reason: str | None = None if enabled else "switched off"
        self._recordings: dict[Hashable, _Recording] = {}
        self._launched: Counter[Hashable] = Counter()
        self._pool: Any = None

    def run(
        self,
        step: Step,
        inputs: Mapping[str, Any],
        guards: Callable[[], Guards | None],
        key: Hashable = None,
        *,
        alone: bool = True,
    ) -> tuple[Any, ...]:
        """Forward and backward of one micro-batch; gradients are added to what the parameters have.

        Args:
            step: does it.
            inputs: what changes from batch to batch: tensors on the device, and values that are compared.
            guards: called after ``step`` was recorded; gives what has to hold for a replay, None if nothing says so.
            key: whatever else the step depends on and no guard covers.
            alone: whether the optimiser reads the gradients before the next call. Otherwise they are moved to memory
                of their own.

        Returns:
            what ``step`` returned, in memory of its own.
        """
        if self.reason is not None:
            return step(dict(inputs))
        signature = (key, *_described(inputs))
        recording = self._recordings.get(signature)
        if recording is not None and not (recording.state.is_there() and recording.guards()):
            del self._recordings[signature]  # the model has changed: launched again, and recorded as it is now
            self._launched[signature] = 0
            recording = None
        if recording is None:
            if self._launched[signature] < LAUNCHES or len(self._recordings) >= RECORDINGS or not self._fits(alone):
                self._launched[signature] += 1
                return self._launch(step, inputs)
            recording = self._record(step, inputs, guards)
            if recording is None:
                return step(dict(inputs))
            self._recordings[signature] = recording
        return self._replay(recording, inputs, alone)

    def _launch(self, step: Step, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        before = offload.launched()
        result = step(dict(inputs))
        if offload.launched() != before:
            self.stop("values wait in host memory")
        return result

    def forget(self) -> bool:
        """Give back the memory of all recordings; returns whether there was one."""
        found = bool(self._recordings)
        self._recordings.clear()
        self._launched.clear()
        self._pool = None
        if found:
            torch.cuda.empty_cache()
        return found

    def stop(self, reason: str) -> bool:
        """Record nothing any more; returns whether that has freed memory."""
        self.reason = reason
        return self.forget()

    def _fits(self, alone: bool) -> bool:
        if alone:
            return True
        nbytes = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return nbytes <= GRADIENT_SHARE * torch.cuda.get_device_properties().total_memory

    def _record(self, step: Step, inputs: Mapping[str, Any], guards: Callable[[], Guards | None]) -> _Recording | None:
        copies = {id(value): value.clone() for value in inputs.values() if isinstance(value, Tensor)}
        own = {name: copies.get(id(value), value) for name, value in inputs.items()}  # one tensor stays one
        before = {p: p.grad for p in self.model.parameters() if p.requires_grad}
        for parameter in before:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        # Another stream's memory would not be given back for it, and what was launched until now is not needed again.
        torch.cuda.empty_cache()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self.recording = True
        try:
            # Threads that load data go on pinning memory meanwhile, which the stricter modes forbid.
            with (
                torch.compiler.set_stance("fail_on_recompile"),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                outputs = step(dict(own))
            gradients = {p: p.grad for p in before if p.grad is not None}
            holds = guards()
            if holds is None:
                self.stop("the compiled step has no guards to ask")
                return None
            return _Recording(graph, own, outputs, gradients, _State(self.model), holds)
        except RuntimeError as error:
            _leave_capture()
            self.stop(str(error).splitlines()[0])
            logger.warning("steps are launched, not recorded as a CUDA graph: %s", self.reason)
            return None
        finally:
            self.recording = False
            for parameter, gradient in before.items():
                parameter.grad = gradient

    def _replay(self, recording: _Recording, inputs: Mapping[str, Any], alone: bool) -> tuple[Any, ...]:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                recording.inputs[name].copy_(value, non_blocking=True)
        recording.graph.replay()
        self.replayed += 1
        self._add(recording.gradients, alone)
        return tuple(o.clone() if isinstance(o, Tensor) else o for o in recording.outputs)

    @torch.no_grad()
    def _add(self, gradients: Mapping[nn.Parameter, Tensor], alone: bool) -> None:
        there = [p for p in gradients if p.grad is not None]
        for parameter, gradient in gradients.items():
            if parameter.grad is None:
                parameter.grad = gradient if alone else gradient.clone()
        if there:
            torch._foreach_add_([p.grad for p in there], [gradients[p] for p in there])  # type: ignore[arg-type]


def _leave_capture() -> None:
    """After a recording that failed, the random generator believes that it goes on, and refuses to draw."""
    with contextlib.suppress(RuntimeError, AssertionError, IndexError):  # without a device there is none
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())


def _described(inputs: Mapping[str, Any]) -> Iterable[Hashable]:
    """What has to be the same for a replay: everything about the inputs but the numbers in tensors."""
    first: dict[int, str] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, value.shape, value.dtype, value.device, first.setdefault(id(value), name)
        else:
            yield name, value
