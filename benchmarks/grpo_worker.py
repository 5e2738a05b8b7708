"""One system, one workload, one process: measures the training step of a policy and writes the row as JSON.

Started by ``benchmarks.grpo`` as ``benchmarks.worker`` is by ``benchmarks.step``, whose models it takes. Completions,
advantages and masks are given: nothing is generated, no reward is computed. What is timed is what a system's
``GRPOTrainer`` does with them, micro-batch by micro-batch, and the optimiser's step.
"""

from __future__ import annotations

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


@dataclasses.dataclass(frozen=True)
class Policy:
    """What every system runs.

    Attributes:
        generations: completions of one prompt, trained on in one optimiser step.
        micro: of them at a time.
        prompt, completion: tokens.
        beta: of the KL term, 0 for none; the reference's log-probabilities are given.
        loss_type: as in ``trl.GRPOConfig``.
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
        checkpointing={"ours": "none", "trl": "none", "unsloth": "unsloth"}[work.system],
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
    more = {"options": work.options} if work.system == "ours" else {}
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
    """A generation's completions as TRL hands them to the loss: of one length, the advantages of either sign."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (work.micro, length), generator=generator)

    found = []
    for _ in range(work.generations // work.micro):
        batch = {
            "prompt_ids": tokens(work.prompt),
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
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batches = micro_batches(work, worker._models("presets").config(work.shape).vocab_size)

    def step() -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=work.device)
        for batch in batches:
            with made.compute_loss_context_manager():
                loss = made.compute_loss(model, dict(batch))
            loss.backward()
            total += loss.detach()
        optimiser.step()
        made._metrics["train"].clear()
        return total

    started = time.perf_counter()
    losses = [float(step())]
    wait()
    first, seconds = time.perf_counter() - started, []
    for i in range(work.warmup + work.steps):
        if i == work.warmup and cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = step()
        wait()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    norms = [p.grad.float().norm() for p in trained if p.grad is not None]
    grad_norm = float(torch.stack(norms).norm()) if norms else 0.0
    if not grad_norm > 0:
        raise RuntimeError(f"grad_norm is {grad_norm}: the system is not training")
    median = statistics.median(seconds[work.warmup :])
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (None, None)
    return {
        "tokens_per_s": work.generations * (work.prompt + work.completion) / median,
        "ms_median": median * 1e3,
        "ms_min": min(seconds[work.warmup :]) * 1e3,
        "peak_allocated_gib": peaks[0] and peaks[0] / 2**30,
        "peak_reserved_gib": peaks[1] and peaks[1] / 2**30,
        "first_step_s": first,
        "losses": losses,
        "grad_norm": grad_norm,
        "trained_parameters": sum(p.numel() for p in trained),
    }


if __name__ == "__main__":
    worker.serve(Policy, measure)
