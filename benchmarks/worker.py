"""One system, one workload, one process: measures training steps and writes the row as JSON.

Started by ``benchmarks.step`` as a script under ``python -P``, so that neither the repository's root nor our package is
importable unless the system asks for it (a peer has our import name, and others patch libraries globally).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

SETTLING = 1.0
"""Seconds in which a stopped system's device finishes what was launched."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every system runs. ``regime``: "bf16" (bf16 adapters, no autocast) or "peft" (fp32 adapters, autocast)."""

    system: str
    options: dict[str, Any]
    shape: str
    mode: str
    batch: int
    seq: int
    steps: int
    warmup: int
    device: str
    regime: str
    checkpointing: str
    profile: str | None
    turns: str | None = None
    """A folder that workers at one time share, see :class:`Turns`; None for one after the other."""


Forward = Callable[[dict[str, Any]], torch.Tensor]
"""The loss of a batch. Where backward has run already, it has no gradient."""


# -- systems: each returns the model that owns the parameters, and how to get a loss from it --------------------------


def _plain(work: Workload) -> nn.Module:
    """A random model of the shape, with what the mode trains, on transformers, PEFT and bitsandbytes alone."""
    model = _models("presets").build(work.shape, dtype=_dtype(work), device=work.device)
    if work.mode == "qlora":
        _quantise(model)
    return _adapted(model, work)


def _adapted(model: nn.Module, work: Workload) -> nn.Module:
    if work.checkpointing == "hf":
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if work.mode == "full":
        return model.train()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=work.regime == "peft")  # type: ignore[arg-type]
    _randomise(adapted)
    return adapted.train()


def _randomise(model: nn.Module) -> None:
    """The same adapters for every system. B is random instead of zero: only then has A a gradient, as in training."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if "lora_A" in name else 0.01)


def _quantise(model: nn.Module) -> None:
    """NF4 with double quantisation in every linear layer of the blocks, in place."""
    _models("quantise").quantise_nf4(model, compute_dtype=model.dtype)


def hf(work: Workload) -> tuple[nn.Module, Forward]:
    """transformers and PEFT as they are."""
    model = _plain(work)
    return model, lambda batch: model(**batch).loss


def inductor(work: Workload) -> tuple[nn.Module, Forward]:
    """torch.compile with its own backend."""
    model = _plain(work)
    run = torch.compile(model)
    return model, lambda batch: run(**batch).loss


def ours(work: Workload) -> tuple[nn.Module, Forward]:
    """This project."""
    model = _plain(work)
    run = torch.compile(model, backend="unsloth", options=work.options)
    return model, lambda batch: run(**batch).loss


def recorded(work: Workload) -> tuple[nn.Module, Forward]:
    """This project's step as its trainer runs it: recorded as a CUDA graph."""
    from unsloth.compiler.run import guards_of
    from unsloth.runtime.recorded import Recorder

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        return model(**batch).loss

    model = _plain(work)
    run, recorder = torch.compile(loss_of, backend="unsloth", options=work.options), Recorder(model)
    last: list[dict[str, Any]] = []

    def step(batch: dict[str, Any]) -> tuple[torch.Tensor]:
        last[:] = [batch]
        loss = run(model, batch)
        loss.backward()
        return (loss.detach(),)

    def forward(batch: dict[str, Any]) -> torch.Tensor:
        return recorder.run(step, batch, lambda: guards_of(loss_of, {"model": model, "batch": last[0]}))[0]

    return model, forward


def trl(work: Workload) -> tuple[nn.Module, Forward]:
    """TRL's fused head, with the statistics that its SFTTrainer asks for."""
    from trl.trainer.utils import add_fused_lm_head

    model = _models("presets").build(work.shape, dtype=_dtype(work), device=work.device)
    if work.mode == "qlora":
        _quantise(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    adapted = _adapted(model, work)
    return adapted, lambda batch: adapted(**batch, fused_lm_head=True).loss


def liger(work: Workload) -> tuple[nn.Module, Forward]:
    """Liger's kernels, applied to the instance."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = _models("presets").build(work.shape, dtype=_dtype(work), device=work.device)
    if work.mode == "qlora":
        _quantise(model)
    _apply_liger_kernel_to_instance(model)
    adapted = _adapted(model, work)
    return adapted, lambda batch: adapted(**batch).loss


def unsloth(work: Workload) -> tuple[nn.Module, Forward]:
    """The peer that has our import name, from its own target folder."""
    from unsloth import FastLanguageModel  # before transformers, as it demands

    with tempfile.TemporaryDirectory() as folder:
        _checkpoint(work, folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=work.seq,
            dtype=_dtype(work),
            load_in_4bit=work.mode == "qlora",
            full_finetuning=work.mode == "full",
        )
    if work.mode != "full":
        checkpointing = {"none": False, "hf": True, "unsloth": "unsloth"}[work.checkpointing]
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0,
            target_modules=LINEARS,
            use_gradient_checkpointing=checkpointing,
        )
        _randomise(model)
        if work.regime == "bf16":
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    return model, lambda batch: model(**batch).loss


def _checkpoint(work: Workload, folder: str) -> None:
    """A random model and a tokenizer of one word, as a folder to load from."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = _models("presets").build(work.shape, dtype=_dtype(work), device=work.device)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3}, unk_token="<unk>"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    del model
    if work.device == "cuda":
        torch.cuda.empty_cache()


SYSTEMS = {f.__name__: f for f in (ours, recorded, inductor, hf, trl, liger, unsloth)}


# -- the measurement ---------------------------------------------------------------------------------------------------


def measure(work: Workload) -> dict[str, Any]:
    """Run the workload and return its row."""
    cuda = work.device == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    model, forward = SYSTEMS[work.system](work)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    vocabulary = _models("presets").config(work.shape).vocab_size
    ids = torch.randint(vocabulary, (work.batch, work.seq), generator=torch.Generator().manual_seed(0))
    ids = ids.to(work.device)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    autocast = work.regime == "peft" and work.mode != "full"

    def step() -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(work.device, dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = forward(batch)
        if loss.requires_grad:
            loss.backward()
        optimiser.step()
        return loss.detach()

    turns = Turns(Path(work.turns)) if work.turns else None
    started = time.perf_counter()
    losses = [float(step())]
    wait()
    first = time.perf_counter() - started
    if turns is not None:
        first -= turns.stopped(started, started + first)
    seconds, launching = [], []
    with turns.alone() if turns is not None else contextlib.nullcontext():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        losses += [float(step()) for _ in range(max(work.warmup, 5 if work.system == "recorded" else 0))]
        wait()
        if cuda and work.system != "recorded":  # whose memory is laid out once, while it warms up
            torch.cuda.reset_peak_memory_stats()
        for _ in range(work.steps):
            started = time.perf_counter()
            loss = step()
            launching.append(time.perf_counter() - started)
            wait()
            seconds.append(time.perf_counter() - started)
            losses.append(float(loss))
        # As in training, where nobody waits for a step before the next one is launched.
        started = time.perf_counter()
        for _ in range(work.steps):
            loss = step()
        wait()
        in_a_row = (time.perf_counter() - started) / work.steps
        losses.append(float(loss))
        if work.profile and cuda:
            _profile(step, Path(work.profile))
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (None, None)
    norms = [p.grad.float().norm() for p in trained if p.grad is not None]
    grad_norm = float(torch.stack(norms).norm()) if norms else 0.0
    if not grad_norm > 0:
        raise RuntimeError(f"grad_norm is {grad_norm}: the system is not training")
    median = statistics.median(seconds)
    return {
        "tokens_per_s": work.batch * work.seq / in_a_row,
        "ms_in_a_row": in_a_row * 1e3,
        "ms_median": median * 1e3,  # of steps that were waited for one by one
        "ms_min": min(seconds) * 1e3,
        "ms_launching": statistics.median(launching) * 1e3,  # of which Python needs so long; nearly all: it holds us up
        "peak_allocated_gib": peaks[0] and peaks[0] / 2**30,
        "peak_reserved_gib": peaks[1] and peaks[1] / 2**30,
        "first_step_s": first,
        "losses": losses,
        "grad_norm": grad_norm,
        "trained_parameters": sum(p.numel() for p in trained),
    }


class Turns:
    """Lets systems load and compile at one time, and each be timed alone: the others are stopped meanwhile.

    In the folder lies a file per running worker, named by its process, and the log of who was alone when.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / f"{os.getpid()}.pid").touch()
        self.log.touch()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self.log.open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            started = time.perf_counter()
            self._signal(signal.SIGSTOP)
            try:
                time.sleep(SETTLING)
                yield
            finally:
                self._signal(signal.SIGCONT)
                log.write(f"{started} {time.perf_counter()}\n")

    def stopped(self, start: float, end: float) -> float:
        """Seconds between two times during which another worker was alone. The clock is the same in all processes."""
        spans = [tuple(map(float, line.split())) for line in self.log.read_text().splitlines()]
        return sum(max(0.0, min(end, b) - max(start, a)) for a, b in spans)

    def _signal(self, which: signal.Signals) -> None:
        for path in self.folder.glob("*.pid"):
            if int(path.stem) != os.getpid():
                with contextlib.suppress(ProcessLookupError):  # it is done
                    os.kill(int(path.stem), which)


def _profile(step: Callable[[], Any], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = profiler.profiler.kineto_results.events() if profiler.profiler is not None else []
    spans = [
        (e.device_resource_id(), e.name(), e.start_ns() / 1e6, (e.start_ns() + e.duration_ns()) / 1e6)
        for e in found
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90)
    path.write_text(f"{streams(spans)}\n{table}")


def streams(spans: Iterable[tuple[int, str, float, float]]) -> str:
    """What each stream of a device did in a step, and what copies were under way while the busiest one did nothing.

    Args:
        spans: of kernels and copies: stream, name, start and end in ms.
    """
    by_stream: dict[int, list[tuple[float, float, str]]] = {}
    for stream, name, start, end in spans:
        if end > start:
            by_stream.setdefault(stream, []).append((start, end, name))
    if not by_stream:
        return "no device events"
    busy = {stream: sum(end - start for start, end, _ in found) for stream, found in by_stream.items()}
    main = max(busy, key=busy.__getitem__)
    begin = min(start for found in by_stream.values() for start, _, _ in found)
    gaps, last, before = [], begin, "the beginning"
    for start, end, name in sorted(by_stream[main]):
        if start > last:
            gaps.append((last, start, before, name))
        last, before = max(last, end), name if end >= last else before
    lines = [
        f"stream {main}: busy {busy[main]:.1f} of {last - begin:.1f} ms, idle {sum(b - a for a, b, *_ in gaps):.1f}"
    ]
    for stream in sorted(by_stream.keys() - {main}):
        copies = sorted(by_stream[stream])
        beside = sum(max(0.0, min(b, end) - max(a, start)) for a, b, *_ in gaps for start, end, _ in copies)
        what = max({name for *_, name in copies}, key=[name for *_, name in copies].count)
        span = f"{copies[0][0] - begin:.1f} to {max(end for _, end, _ in copies) - begin:.1f}"
        told = f"stream {stream}: busy {busy[stream]:.1f} ms ({what}) from {span}, {beside:.1f} of it beside idle gaps"
        lines.append(told)
    for a, b, before, after in sorted(gaps, key=lambda g: g[0] - g[1])[:12]:
        lines.append(f"  idle {b - a:8.2f} ms at {a - begin:8.1f}: after {before[:60]}, before {after[:60]}")
    return "\n".join(lines)


def environment(device: str) -> dict[str, Any]:
    """Device and versions, as they belong into a row."""
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger_kernel", "unsloth")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions["torch"] = torch.__version__
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "versions": versions}


def _dtype(work: Workload) -> torch.dtype:
    return torch.bfloat16 if work.device == "cuda" else torch.float32


def _models(name: str) -> Any:
    """A file of models/ by its path: every system gets the same shapes and weights, without importing our package."""
    path = Path(__file__).parent.parent / "models" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(kind: Callable[..., Any], measure: Callable[[Any], dict[str, Any]]) -> None:
    """Measure the workload of the command line's first argument, JSON, and write the row to its second, a file."""
    work = kind(**json.loads(sys.argv[1]))
    if work.system == "unsloth":
        with contextlib.suppress(ImportError):
            import unsloth as _  # noqa: F401  it has to come before transformers
    try:
        row = measure(work)
    except Exception as error:  # noqa: BLE001  a failure is a result
        traceback.print_exc()
        row = {"error": f"{type(error).__name__}: {error}"[:2000]}
    Path(sys.argv[2]).write_text(json.dumps(row | environment(work.device)))


if __name__ == "__main__":
    serve(Workload, measure)
