"""One system, one workload, one process: times completions, checks ours, and writes the row as JSON.

Started by ``benchmarks.rollout`` as ``benchmarks.worker`` is by ``benchmarks.step``, whose models it takes. Weights are
random, so the two likeliest tokens are often as likely as rounding leaves them: two roundings of one bfloat16 model
agree less here than with weights that have learnt something, and once a token differs all that follow do. Hence two
numbers of greedy tokens: how many are the model's own choice after the tokens before them, and how many are
``generate``'s. Trained weights, from a GGUF file, continue text.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DOCUMENTATION = Path(__file__).parent.parent / "docs"
ROWS = 4
"""Sequences whose logits the checks hold at a time."""


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
class Rollout:
    """What every system runs.

    Attributes:
        sequences: completions at a time, ``group`` of each prompt.
        prompt, new: tokens.
        check: greedy tokens of each sequence that are compared; 0 for none.
        runs: timed.
        weights: a GGUF file; None for random weights of the shape.
    """

    system: str
    options: dict[str, Any]
    shape: str
    mode: str
    dtype: str
    sequences: int
    group: int
    prompt: int
    new: int
    check: int
    runs: int
    device: str
    weights: str | None = None


def _as_step(work: Rollout) -> Any:
    """The workload as ``benchmarks.worker`` knows it."""
    return worker.Workload(
        system=work.system,
        options=work.options,
        shape=work.shape,
        mode=work.mode,
        batch=work.sequences,
        seq=work.prompt + work.new,
        steps=0,
        warmup=0,
        device=work.device,
        regime="bf16",
        checkpointing="none",
        profile=None,
    )


def model_of(work: Rollout) -> tuple[nn.Module, list[list[int]]]:
    """The model with what the mode trains, and a prompt for each sequence."""
    dtype = getattr(torch, work.dtype)
    if work.weights is not None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = Path(work.weights)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return worker._adapted(model.to(work.device), _as_step(work)).eval(), _of_text(work, tokenizer)
    generator = torch.Generator().manual_seed(0)
    vocabulary = worker._models("presets").config(work.shape).vocab_size
    prompts = torch.randint(vocabulary, (work.sequences // work.group, work.prompt), generator=generator).tolist()
    if work.system == "unsloth":
        model, _ = worker.unsloth(_as_step(work))
        from unsloth import FastLanguageModel

        return FastLanguageModel.for_inference(model), _grouped(work, prompts)
    model = worker._models("presets").build(work.shape, dtype=dtype, device=work.device)
    if work.mode == "qlora":
        worker._quantise(model)
    return worker._adapted(model, _as_step(work)).eval(), _grouped(work, prompts)


class _Float32Head(nn.Module):
    """A head whose logits are float32, as TRL's ``cast_lm_head_to_fp32`` has it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight)


def _of_text(work: Rollout, tokenizer: Any) -> list[list[int]]:
    """Prompts from the documentation, one behind the other."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCUMENTATION.glob("*.md")))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = work.sequences // work.group
    if len(ids) < count * work.prompt:
        raise ValueError(f"the documentation has {len(ids)} tokens, not {count} prompts of {work.prompt}")
    return _grouped(work, [ids[i * work.prompt : (i + 1) * work.prompt] for i in range(count)])


def _grouped(work: Rollout, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt as often as it is completed."""
    return [ids for ids in prompts for _ in range(work.group)]


def by_generate(model: Any, work: Rollout, prompts: list[list[int]], new: int, sample: bool) -> Tensor:
    """transformers' own: completions [sequences, new]."""
    from transformers import GenerationConfig

    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=new, pad_token_id=0, **settings)
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device=work.device)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[:, ids.shape[1] :].cpu()


def drawn_by_generate(model: Any, work: Rollout, prompts: list[list[int]], new: int) -> tuple[Tensor, Tensor]:
    """Completions that transformers draws, and the log-probabilities with which it drew them."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=new, pad_token_id=0, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device=work.device)
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    chosen = made.sequences[:, ids.shape[1] :]
    log_p = torch.stack(made.logits, dim=1).float().log_softmax(2).gather(2, chosen.unsqueeze(2)).squeeze(2)
    return chosen.cpu(), log_p.cpu()


def by_ours(model: Any, work: Rollout, prompts: list[list[int]], new: int, sample: bool) -> tuple[Tensor, Tensor]:
    """Completions [sequences, new] and their log-probabilities."""
    from unsloth.runtime.generation.engine import complete
    from unsloth.runtime.generation.sampling import Sampling

    sampling = Sampling(new, sample=sample, seed=1)
    options = {name: value for name, value in work.options.items() if name != "fp32_head"}
    made = complete(model, prompts, sampling, **options)
    return torch.tensor([c.ids for c in made]), torch.tensor([c.log_p for c in made])


def by_training(model: Any, work: Rollout, prompts: list[list[int]], completions: Tensor) -> tuple[Tensor, Tensor]:
    """Of a forward pass as training makes it: log-probability of each token, and which would be the likeliest."""
    log_p, likeliest = [], []
    for start in range(0, len(prompts), ROWS):
        targets = completions[start : start + ROWS].to(work.device)
        ids = torch.cat([torch.tensor(prompts[start : start + ROWS], device=work.device), targets], dim=1)
        with torch.no_grad():
            kept = {"logits_to_keep": targets.shape[1] + 1}
            logits = model(input_ids=ids, use_cache=False, **kept).logits[:, :-1].float()
        log_p.append((logits.gather(2, targets.unsqueeze(2)).squeeze(2) - logits.logsumexp(2)).cpu())
        likeliest.append(logits.argmax(2).cpu())
    return torch.cat(log_p), torch.cat(likeliest)


def checks(model: Any, work: Rollout, prompts: list[list[int]]) -> dict[str, Any]:
    """Hold ours against the model: greedy tokens, log-probabilities, and both after the weights have changed."""
    greedy, log_p = by_ours(model, work, prompts, work.check, sample=False)
    theirs = by_generate(model, work, prompts[:: work.group], work.check, sample=False)
    trained, likeliest = by_training(model, work, prompts, greedy)
    _, likeliest_of_theirs = by_training(model, work, prompts[:: work.group], theirs)
    drawn, drawn_log_p = by_ours(model, work, prompts, work.check, sample=True)
    drawn_trained, _ = by_training(model, work, prompts, drawn)
    of_theirs, their_log_p = drawn_by_generate(model, work, prompts[:: work.group], work.check)
    their_trained, _ = by_training(model, work, prompts[:: work.group], of_theirs)
    found = {
        "greedy_is_argmax": float((greedy == likeliest).double().mean()),
        "generate_is_argmax": float((theirs == likeliest_of_theirs).double().mean()),
        "greedy_is_generate": float((greedy[:: work.group] == theirs).double().mean()),
        "log_p_off": float((drawn_log_p - drawn_trained).abs().mean()),
        "log_p_off_largest": float((drawn_log_p - drawn_trained).abs().max()),
        "greedy_log_p_off": float((log_p - trained).abs().mean()),
        "generate_log_p_off": float((their_log_p - their_trained).abs().mean()),
    }
    norms = [p for p in model.parameters() if p.dim() == 1]
    before = [p.detach().clone() for p in norms]
    factor = 1.1 if work.weights else 1.5  # weights that have learnt something stay a model of something
    with torch.no_grad():
        for p in norms:
            p.mul_(factor)
        later, later_log_p = by_ours(model, work, prompts, min(work.check, 32), sample=True)
        new, _ = by_training(model, work, prompts, later)
        for p, value in zip(norms, before, strict=True):
            p.copy_(value)
    old, _ = by_training(model, work, prompts, later)
    stale = (later_log_p - new).abs() > (later_log_p - old).abs()
    # Only where both weights differ by more than rounding does can it be told from which a token came.
    telling = (new - old).abs() > 4 * (drawn_log_p - drawn_trained).abs().max()
    return {
        **found,
        "stale_tokens": int((stale & telling).sum()),
        "tokens_that_tell": int(telling.sum()),
        "tokens_after_update": later.numel(),
        "log_p_off_after_update": float((later_log_p - new).abs().mean()),
    }


def measure(work: Rollout) -> dict[str, Any]:
    """Run the workload and return its row."""
    cuda = work.device == "cuda"
    model, prompts = model_of(work)
    if work.options.get("fp32_head"):
        whole = model.get_base_model() if work.mode != "full" else model
        whole.lm_head = _Float32Head(whole.lm_head)
    run = by_ours if work.system == "ours" else by_generate

    def timed(new: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        made = run(model, work, prompts, new, True)
        if cuda:
            torch.cuda.synchronize()
        completions = made[0] if isinstance(made, tuple) else made
        if completions.shape != (len(prompts), new):
            raise RuntimeError(f"{tuple(completions.shape)} tokens were made, not {(len(prompts), new)}")
        return time.perf_counter() - started

    first = timed(min(work.new, 16))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(work.new) for _ in range(work.runs)]
    memory = (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if cuda else (None, None)
    median = statistics.median(seconds)
    row = {
        "tokens_per_s": work.sequences * work.new / median,
        "s_median": median,
        "s_min": min(seconds),
        "ms_per_token": median / work.new * 1e3,
        "first_run_s": first,
        "peak_allocated_gib": memory[0] and memory[0] / 2**30,
        "allocated_after_gib": memory[1] and memory[1] / 2**30,
    }
    if work.system == "ours":
        one = timed(1)
        row["s_of_one_token"] = one  # prompts, a captured graph, and a step
        if work.check:
            row |= checks(model, work, prompts)
    return row


if __name__ == "__main__":
    worker.serve(Rollout, measure)
