"""One system, one workload, one process: measures training steps and writes the row as JSON.

Started by ``benchmarks.step`` as a script under ``python -P``, so that neither the repository's root nor our package is
importable unless the system asks for it (a peer has our import name, and others patch libraries globally).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _models(name: str) -> Any:
    """A file of models/ by its path: every system gets the same shapes and weights, without importing our package."""
    return _from(Path(__file__).parent.parent / "models" / f"{name}.py")


def _beside(name: str) -> Any:
    """A file that lies beside this one, which is no module of a package here."""
    return _from(Path(__file__).parent / f"{name}.py")


@functools.cache
def _from(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where typing looks for annotations
    spec.loader.exec_module(module)
    return module


Turns = _beside("turns").Turns
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""That get adapters; of a mixture of experts the first four, because PEFT would make one for each expert."""
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

    @property
    def of_images(self) -> bool:
        """Whether the shape is of ``benchmarks/vision_shapes.py``; ``seq`` then counts the text beside the image."""
        return self.shape in _beside("vision_shapes").SHAPES

    def config(self) -> Any:
        """The model's configuration."""
        return (_beside("vision_shapes") if self.of_images else _models("presets")).config(self.shape)

    def inputs(self) -> dict[str, Any]:
        """The batch of every step: random tokens, and an image in each row of a model that takes them."""
        if self.of_images:
            made = _beside("vision_shapes").batch(self.shape, self.batch, self.seq, _dtype(self))
            return {name: v.to(self.device) if isinstance(v, torch.Tensor) else v for name, v in made.items()}
        size = (self.batch, self.seq)
        ids = torch.randint(self.config().vocab_size, size, generator=torch.Generator().manual_seed(0)).to(self.device)
        return {"input_ids": ids, "labels": ids, "use_cache": False}

    def targets(self) -> Any:
        """Which layers get adapters, as PEFT takes them."""
        return _beside("vision_shapes").SHAPES[self.shape].adapted if self.of_images else LINEARS


Forward = Callable[[dict[str, Any]], torch.Tensor]
"""The loss of a batch. Where backward has run already, it has no gradient."""


# -- systems: each returns the model that owns the parameters, and how to get a loss from it --------------------------


def _plain(work: Workload) -> nn.Module:
    """A random model of the shape, with what the mode trains, on transformers, PEFT and bitsandbytes alone."""
    return _adapted(_base(work), work)


def _base(work: Workload) -> nn.Module:
    """The random model without adapters, its weights in 4 bits where the mode says so."""
    model = _models("presets").build(work.config(), dtype=_dtype(work), device=work.device)
    if work.mode == "qlora":
        _quantise(model, _beside("vision_shapes").SHAPES[work.shape].unquantised if work.of_images else ("lm_head",))
    return model


def _adapted(model: nn.Module, work: Workload) -> nn.Module:
    if work.checkpointing == "hf":
        now = hasattr(model, "activation_checkpointing_enable")  # transformers 5.2x has given it another name
        enable = model.activation_checkpointing_enable if now else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
    if work.mode == "full":
        return model.train()
    from peft import LoraConfig, get_peft_model

    names = work.targets()
    if names is LINEARS and getattr(model.config, "num_experts", None):
        names = LINEARS[:4]
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=work.regime == "peft")  # type: ignore[arg-type]
    _randomise(adapted)
    return adapted.train()


def _randomise(model: nn.Module) -> None:
    """The same adapters for every system. B is random instead of zero: only then has A a gradient, as in training."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if "lora_A" in name else 0.01)


def _quantise(model: nn.Module, kept: tuple[str, ...] = ("lm_head",)) -> None:
    """NF4 with double quantisation in every linear layer but those in ``kept``, in place."""
    _models("quantise").quantise_nf4(model, compute_dtype=model.dtype, skip=kept)


def hf(work: Workload) -> tuple[nn.Module, Forward]:
    """transformers and PEFT as they are."""
    model = _plain(work)
    return model, lambda batch: model(**batch).loss


def float32(work: Workload) -> tuple[nn.Module, Forward]:
    """The same weights in float32, what others are checked against: a step of it is not timed but for the record."""
    model = _plain(work).float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # of a packed weight
            module.compute_dtype = torch.float32
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
    if not work.of_images:
        return model, lambda batch: run(**batch).loss
    from unsloth.compiler.run import sizes_in_graph
    from unsloth.models.parts import unwrapped
    from unsloth.runtime.image_shapes import ImageShapes

    shapes = ImageShapes(unwrapped(model))

    def forward(batch: dict[str, Any]) -> torch.Tensor:
        with sizes_in_graph():
            return run(**shapes(batch)).loss

    return model, forward


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

    model = _base(work)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    adapted = _adapted(model, work)
    return adapted, lambda batch: adapted(**batch, fused_lm_head=True).loss


def liger(work: Workload) -> tuple[nn.Module, Forward]:
    """Liger's kernels, applied to the instance."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = _base(work)
    _apply_liger_kernel_to_instance(model)
    adapted = _adapted(model, work)
    return adapted, lambda batch: adapted(**batch).loss


def unsloth(work: Workload) -> tuple[nn.Module, Forward]:
    """The peer that has our import name, from its own target folder."""
    import unsloth  # before transformers, as it demands

    fast = unsloth.FastVisionModel if work.of_images else unsloth.FastLanguageModel  # pyright: ignore
    checkpointing = {"none": False, "hf": True, "unsloth": "unsloth"}[work.checkpointing]
    with tempfile.TemporaryDirectory() as folder:
        _checkpoint(work, folder)
        model, _ = fast.from_pretrained(
            folder,
            max_seq_length=_longest(work),
            dtype=_dtype(work),
            load_in_4bit=work.mode == "qlora",
            full_finetuning=work.mode == "full",
            use_gradient_checkpointing=checkpointing,
        )
    if work.mode != "full":
        model = fast.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0,
            target_modules=work.targets(),
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

    model = _models("presets").build(work.config(), dtype=_dtype(work), device=work.device)
    model.save_pretrained(folder)
    words = ["a", "<eos>", "<pad>", "<unk>"]
    if work.of_images:
        words += _beside("vision_shapes").write_processor(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    special: dict[str, Any] = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special["additional_special_tokens"] = words[4:]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    del model
    if work.device == "cuda":
        torch.cuda.empty_cache()


SYSTEMS = {f.__name__: f for f in (ours, recorded, inductor, hf, float32, trl, liger, unsloth)}


# -- the measurement ---------------------------------------------------------------------------------------------------


def measure(work: Workload) -> dict[str, Any]:
    """Run the workload and return its row."""
    cuda = work.device == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    if work.system == "float32":
        work = dataclasses.replace(work, steps=1, warmup=1)
    model, forward = SYSTEMS[work.system](work)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batch = work.inputs()
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
    first_grad_norm, compiling = _grad_norm(trained), _compiling()
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
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (None, None)
        profile = _profile(step, model, work) if work.profile and cuda else {}
    grad_norm = _grad_norm(trained)
    if not grad_norm > 0:
        raise RuntimeError(f"grad_norm is {grad_norm}: the system is not training")
    median = statistics.median(seconds)
    return {
        "tokens_per_s": batch["input_ids"].numel() / in_a_row,  # an image counts as the tokens that stand for it
        "ms_in_a_row": in_a_row * 1e3,
        "ms_median": median * 1e3,  # of steps that were waited for one by one
        "ms_min": min(seconds) * 1e3,
        "ms_launching": statistics.median(launching) * 1e3,  # of which Python needs so long; nearly all: it holds us up
        "peak_allocated_gib": peaks[0] and peaks[0] / 2**30,
        "peak_reserved_gib": peaks[1] and peaks[1] / 2**30,
        "first_step_s": first,
        "compiling_s": compiling,
        "losses": losses,
        "grad_norm": grad_norm,
        "first_grad_norm": first_grad_norm,
        "trained_parameters": sum(p.numel() for p in trained),
        **profile,
    }


def _compiling() -> dict[str, float]:
    """Seconds by PyTorch's own timers, which nest: of what it has compiled, where that took a second or more."""
    timers = getattr(sys.modules.get("torch._dynamo.utils"), "compilation_time_metrics", {})
    return {name: round(total, 1) for name, times in timers.items() if (total := sum(times)) >= 1}


def _grad_norm(trained: list[nn.Parameter]) -> float:
    norms = [p.grad.float().norm() for p in trained if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _profile(step: Callable[[], Any], model: nn.Module, work: Workload) -> dict[str, Any]:
    """Where one step's time goes, and the floor under it; the kernels go into the file that the workload names."""
    profiled = _beside("profiled")
    kernels = profiled.profiled(step)
    Path(work.profile or os.devnull).write_text(f"{profiled.streams(kernels)}\n\n{profiled.listed(kernels)}")
    found = {"profile": profiled.split(kernels)}
    # The floor's products are all of one length, and a tower sees more patches than the text has tokens.
    return found if work.of_images else {**found, "floor": profiled.floor(model, work.batch, work.seq)}


def environment(device: str) -> dict[str, Any]:
    """Device and versions, as they belong into a row."""
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger_kernel", "unsloth")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions["torch"] = torch.__version__
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "versions": versions}


def _longest(work: Workload) -> int:
    """A length that every row keeps within."""
    return work.seq + (4096 if work.of_images else 0)


def _dtype(work: Workload) -> torch.dtype:
    return torch.bfloat16 if work.device == "cuda" else torch.float32


def serve(kind: Callable[..., Any], measure: Callable[[Any], dict[str, Any]]) -> None:
    """Measure the workload of the command line's first argument, JSON, and write the row to its second, a file."""
    work = kind(**json.loads(sys.argv[1]))
    if getattr(work, "system", None) == "unsloth":
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
