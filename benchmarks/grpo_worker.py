"""One system, one workload, one process: measures the training step of a policy and writes the row as JSON.

Started by ``benchmarks.grpo`` as ``benchmarks.worker`` is by ``benchmarks.step``, whose models it takes. Completions,
advantages and masks are given: nothing is generated, no reward is computed. What is timed is what a system's
``GRPOTrainer`` does with them, micro-batch by micro-batch, and the optimiser's step. What comes before the first timed
step changes no weight: loss and gradient norm of that step are those of the same policy in every system.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _beside(name: str) -> Any:
    """A file of this folder: neither the repository's root nor our package is on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _beside("worker")
LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Policy:
    """What every system runs.

    Attributes:
        generations: completions of one prompt, trained on in one optimiser step.
        micro: of them at a time.
        prompt, completion: tokens.
        beta: of the KL term, 0 for none; the reference's log-probabilities are given.
        loss_type: as in ``trl.GRPOConfig``.
        steps: optimiser steps that are timed.
        warmup: micro-batches before them, at least one: it compiles.
        turns: a folder that workers at one time share, see ``worker.Turns``; None for one after the other.
    """

    system: str
    options: dict[str, Any]
    shape: str
    mode: str
    generations: int
    micro: int
    prompt: int
    completion: int
    beta: float
    loss_type: str
    steps: int
    warmup: int
    device: str
    turns: str | None = None


def _as_step(work: Policy) -> Any:
    """The workload as ``benchmarks.worker`` knows it. Ours recomputes within its budget, the others by layers."""
    return worker.Workload(
        system=work.system,
        options=work.options,
        shape=work.shape,
        mode=work.mode,
        batch=work.micro,
        seq=work.prompt + work.completion,
        steps=work.steps,
        warmup=work.warmup,
        device=work.device,
        regime="bf16",
        checkpointing={"ours": "none", "trl": "hf", "unsloth": "unsloth"}[work.system],
        profile=None,
    )


def trainer_of(work: Policy, folder: str) -> Any:
    """The system's trainer on a random model, ready to compute a loss."""
    if work.system == "unsloth":
        model, _ = worker.unsloth(_as_step(work))
        from trl import GRPOConfig, GRPOTrainer  # patched by the import above
    else:
        model = worker._plain(_as_step(work))
        from trl import GRPOConfig, GRPOTrainer

        if work.system == "ours":
            from unsloth import GRPOTrainer
    from datasets import Dataset

    settings = {
        "per_device_train_batch_size": work.micro,
        "gradient_accumulation_steps": work.generations // work.micro,
        "num_generations": work.generations,
        "max_completion_length": work.completion,
        "loss_type": work.loss_type,
        "beta": work.beta,
        "bf16": work.device == "cuda",
        "use_cpu": work.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
    }
    options = dict(work.options)
    more = {"shared_prompts": options.pop("shared_prompts", True), "options": options} if work.system == "ours" else {}
    made = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(folder, **settings),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * work.generations),
        processing_class=worker._models("byte_tokenizer").byte_tokenizer(),
        **more,
    )
    made.current_gradient_accumulation_steps = work.generations // work.micro
    return made


def micro_batches(work: Policy, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Completions of one prompt as TRL hands them to the loss: of one length, the advantages of either sign."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (work.micro, length), generator=generator)

    found, prompt = [], tokens(work.prompt)[:1].expand(work.micro, -1)
    for _ in range(work.generations // work.micro):
        batch = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones(work.micro, work.prompt, dtype=torch.int64),
            "completion_ids": tokens(work.completion),
            "completion_mask": torch.ones(work.micro, work.completion, dtype=torch.int64),
            "advantages": torch.randn(work.micro, generator=generator),
            "num_items_in_batch": torch.tensor(work.generations * work.completion),
        }
        if work.beta:
            batch["ref_per_token_logps"] = torch.full((work.micro, work.completion), -12.0)
        found.append({name: value.to(work.device) for name, value in batch.items()})
    return found


def measure(work: Policy) -> dict[str, Any]:
    """Run the workload and return its row."""
    cuda = work.device == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        made = trainer_of(work, folder)
    model: nn.Module = made.model.to(work.device)
    model.train()
    if work.system == "unsloth":  # as its trainer's train() begins; without it all activations are kept
        model.for_training(use_gradient_checkpointing=_as_step(work).checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    batches = micro_batches(work, worker._models("presets").config(work.shape).vocab_size)

    def micro_step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with made.compute_loss_context_manager():
            loss = made.compute_loss(model, dict(batch))
        loss.backward()
        made._metrics["train"].clear()
        return loss.detach()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; the sum of the micro-batches' losses, and the norm of the gradient."""
        optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=work.device)
        for batch in batches:
            total += micro_step(batch)
        norms = [p.grad.float().norm() for p in trained if p.grad is not None]
        optimiser.step()
        return total, torch.stack(norms).norm() if norms else torch.zeros(())

    turns = worker.Turns(Path(work.turns)) if work.turns else None
    seconds = []
    for i in range(work.warmup):
        started = time.perf_counter()
        micro_step(batches[i % len(batches)])
        wait()
        ended = time.perf_counter()
        seconds.append(ended - started - (turns.stopped(started, ended) if turns is not None else 0.0))
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    optimiser.step()  # makes what it holds, and no change
    for group in optimiser.param_groups:
        group["lr"] = LEARNING_RATE
    warmup, seconds, found = seconds, [], []
    with turns.alone() if turns is not None else contextlib.nullcontext():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(work.steps):
            started = time.perf_counter()
            found.append(step())
            wait()
            seconds.append(time.perf_counter() - started)
    losses, grad_norms = ([float(x) for x in column] for column in zip(*found, strict=True))
    if not min(grad_norms) > 0:
        raise RuntimeError(f"grad_norm is {grad_norms}: the system is not training")
    median = statistics.median(seconds)
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (None, None)
    return {
        "tokens_per_s": work.generations * (work.prompt + work.completion) / median,
        "ms_median": median * 1e3,
        "ms_min": min(seconds) * 1e3,
        "peak_allocated_gib": peaks[0] and peaks[0] / 2**30,
        "peak_reserved_gib": peaks[1] and peaks[1] / 2**30,
        "first_micro_batch_s": warmup[0],
        "micro_batch_s": warmup[-1],
        "losses": losses,
        "grad_norms": grad_norms,
        "trained_parameters": sum(p.numel() for p in trained),
        **(planned(made) if work.system == "ours" else {}),
    }


def planned(made: Any) -> dict[str, Any]:
    """What our compiler made of the step: how many graphs, and how each is kept within its budget."""
    explanation = made.explanation
    return {
        "graphs": len(explanation.graphs),
        "fallbacks": [g.fallback for g in explanation.graphs if g.fallback],
        "predicted_peak_gib": max((plan.peak_bytes / 2**30 for plan in explanation.plans), default=None),
        "plans": [str(plan) for plan in explanation.plans],
    }


if __name__ == "__main__":
    worker.serve(Policy, measure)
