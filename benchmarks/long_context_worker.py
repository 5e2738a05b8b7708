"""One whole step over a long context, in one process: its loss, memory and time, as JSON.

Started by ``benchmarks.long_context``. A step takes minutes, so the first one is the measured one. Compiling forward is
not counted (Dynamo's own time, in which the device has nothing to do). Backward compiles while the device is busy with
forward, and counts as far as it takes longer. Host memory is locked while the model is made and traced.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from unsloth.compiler import lower
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled
from unsloth.kernels import pinned
from unsloth.models.adapters import add_lora
from unsloth.models.presets import build, build_packed, config
from unsloth.models.quantise import quantise_nf4
from unsloth.passes.memory.joint import Joint, nbytes
from unsloth.passes.memory.partition import Partitioner, half_of_host_memory
from unsloth.passes.memory.plan import Plan

from .memory_worker import GIB, _norm
from .worker import _randomise, serve


@dataclasses.dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
        shape: a preset, perhaps with a number of layers: llama-8b@8.
        quantised: whether the base is in NF4.
        rank: of the adapters on all linear layers.
        batch, tokens: sequences, and tokens of each.
        budget: peak bytes that the plan may have.
        host: bytes of host memory that it may use; None for half of the machine's.
        card: bytes of memory that the process may allocate, as if the card had no more; None for all.
        rest: further steps, of which the last is timed in place of the first.
    """

    shape: str
    quantised: bool
    rank: int
    batch: int
    tokens: int
    budget: int
    host: int | None
    card: int | None
    rest: int
    device: str


class Locked(Partitioner):
    """Waits for host memory that is being locked, before anything uses it, and locks what a plan wants beside it."""

    ahead: threading.Thread | None = None
    seconds = 0.0

    @classmethod
    def start(cls, step: Step) -> None:
        """Lock memory for what every layer but the last hands on, as far as it may be used."""
        settings = config(step.shape)
        size = step.batch * step.tokens * settings.hidden_size * 2
        room = step.host if step.host is not None else half_of_host_memory()
        count = min(settings.num_hidden_layers - 1, room // pinned.whole_pages(size))
        cls.ahead = threading.Thread(target=_lock, args=([size] * count,))
        cls.ahead.start()

    def choose(self, joint: Joint, gradients: Sequence[Any]) -> Plan:
        plan = super().choose(joint, gradients)
        started, away = time.perf_counter(), set(plan.offloaded)
        if self.ahead is not None:
            self.ahead.join()
            with _disable_current_modes():  # this is called while tensors are fake
                _lock([nbytes(n) for n in joint.forward if n.name in away])
        Locked.seconds = time.perf_counter() - started
        tell(f"{plan} { ({name: f'{size / GIB:.2f} GiB' for name, size in plan.parts.items()}) }")
        return plan


def _lock(sizes: Sequence[int]) -> None:
    """Have a buffer for each, all at one time."""
    held = [pinned.empty_like(torch.empty(size, dtype=torch.uint8, device="meta")) for size in sizes]
    tell(f"{len(held)} buffers, {pinned.held() / GIB:.2f} GiB locked")


STARTED = time.perf_counter()


def tell(text: str) -> None:
    """Print what has happened, and when."""
    print(f"[{time.perf_counter() - STARTED:7.1f} s] {text}", file=sys.stderr, flush=True)


def model_of(step: Step) -> nn.Module:
    """A random model with random adapters; quantised layer by layer."""
    dtype = torch.bfloat16 if step.device == "cuda" else torch.float32
    given: dict[str, Any] = {"dtype": dtype, "device": step.device}
    if step.quantised:
        pack = functools.partial(quantise_nf4, compute_dtype=dtype)
        model: nn.Module = build_packed(step.shape, lambda model, make: pack(model, make=make), **given)
    else:
        model = build(step.shape, **given)
    adapted = add_lora(model, rank=step.rank, autocast_adapter_dtype=False)
    _randomise(adapted)
    return adapted.train()


def compiling() -> float:
    """Seconds that Dynamo and the backend have spent in this process, backward's compilation included."""
    totals = torch._dynamo.utils.compilation_time_metrics
    outer = ("_compile.compile_inner", "backward._backward_impl")
    return sum(sum(totals.get(name, [])) for name in outer)


def measure(step: Step) -> dict[str, Any]:
    """Run the step in this process."""
    cuda = step.device == "cuda"
    # A plan that comes out of a cache has no prediction with it.
    torch._functorch.config.enable_autograd_cache = False  # type: ignore[attr-defined]
    lower.Partitioner = Locked  # type: ignore[misc]
    if cuda and step.card is not None:
        torch.cuda.set_per_process_memory_fraction(step.card / torch.cuda.get_device_properties(0).total_memory)

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    if cuda:
        Locked.start(step)
    model, reports = model_of(step), []
    loading = now() - started
    tell(f"weights made in {loading:.1f} s")
    weights = torch.cuda.max_memory_allocated() if cuda else 0
    # A step that could not be planned would run for minutes into the end of the card's memory.
    options = {"logits": "drop", "memory_budget": step.budget, "host_memory_budget": step.host, "strict": True}
    run = compiled(model, Options.parse(options), reports)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
    vocabulary = config(step.shape).vocab_size
    ids = torch.randint(vocabulary, (step.batch, step.tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(step.device)

    def once() -> dict[str, Any]:
        optimiser.zero_grad(set_to_none=True)
        start, before = now(), compiling()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        for begin in events[:1]:
            begin.record()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        of_forward, forward = compiling() - before, time.perf_counter() - start
        tell(f"forward compiled in {of_forward:.1f} s and launched")
        for middle in events[1:]:
            middle.record()
        loss.backward()
        of_backward = compiling() - before - of_forward
        tell(f"backward compiled in {of_backward:.1f} s and launched")
        optimiser.step()
        seconds = now() - start - of_forward
        if events:
            forward = events[0].elapsed_time(events[1]) / 1e3
        forward -= of_forward
        found = {"loss": float(loss.detach()), "grad_norm": _norm(trained), "seconds": seconds, "forward_s": forward}
        return {**found, "backward_s": seconds - forward, "compile_s": of_forward, "compile_backward_s": of_backward}

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = once()
    if not (first["grad_norm"] > 0 and math.isfinite(first["loss"])):
        raise RuntimeError(f"grad_norm is {first['grad_norm']}, loss {first['loss']}: nothing is trained")
    tell("done")
    measured = torch.cuda.max_memory_allocated() if cuda else None
    reserved = torch.cuda.max_memory_reserved() if cuda else None
    rest = [once() for _ in range(step.rest)]
    timed = rest[-1] if rest else first
    plans = [r.partitioner for r in reports if r.partitioner and r.partitioner.last_plan]
    if len(plans) != 1:
        raise RuntimeError(f"{len(plans)} graphs were planned, expected one")
    plan = plans[0].last_plan
    assert plan is not None
    return {
        **first,
        **{name: timed[name] for name in ("seconds", "forward_s", "backward_s")},
        "tokens_per_s": step.batch * step.tokens / timed["seconds"],
        "predicted_gib": plan.peak_bytes / GIB,
        "measured_gib": measured and measured / GIB,
        "ratio": measured and plan.peak_bytes / measured,
        "reserved_gib": reserved and reserved / GIB,
        "parts_gib": {name: size / GIB for name, size in plan.parts.items()},
        "host_gib": plan.host_bytes / GIB,
        "locked_gib": pinned.held() / GIB,
        "policy": plan.policy,
        "plan": plan.words,
        "predicted_extra_s": plan.seconds,
        "waited_for_locking_s": Locked.seconds,
        "loading_s": loading,
        "loading_peak_gib": weights / GIB,
        "first_step_s": first["seconds"],
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }


def main() -> None:
    """Measure the step of the first argument, JSON, and write the row to the second, a file."""
    serve(Step, measure)
    sys.stderr.flush()
    os._exit(0)  # there is nothing to save, and unlocking a hundred gigabytes takes its time


if __name__ == "__main__":
    main()
