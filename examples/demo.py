"""A small model, end to end through the backend, on any machine: ``make demo``.

A two-layer Llama with random weights and LoRA adapters learns the docstrings of Python's standard library, byte by
byte. First ``explain`` says what the compiler recognises, then ``verify`` compares one step with eager, then 30 steps
run compiled.
"""

from __future__ import annotations

import ast
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import unsloth
from unsloth.models import presets

BATCH, SEQ, STEPS = 8, 128, 30


def docstrings() -> bytes:
    """Every docstring of the standard library's top-level modules, one after the other."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        texts += [text for node in nodes if (text := ast.get_docstring(node))]
    return "\n\n".join(texts).encode()


def batches(text: bytes, device: str) -> Iterator[dict[str, Tensor]]:
    """Random windows of the text; a byte is a token."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(tokens) - SEQ, (BATCH, 1), generator=generator)
        ids = tokens[starts + torch.arange(SEQ)].to(device)
        yield {"input_ids": ids, "labels": ids}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = presets.build("tiny-llama", device=device)
    # A base without training has nothing to adapt, so embedding and head are trained along with the adapters.
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
    )
    model = get_peft_model(model, lora)
    data = batches(docstrings(), device)
    first = next(data)

    print("-- explain", "-" * 69)
    print(unsloth.explain(model, first))

    print("\n-- verify", "-" * 70)
    verification = unsloth.verify(model, first)
    print(verification)

    print(f"\n-- train: {STEPS} steps of {BATCH} × {SEQ} tokens on {device}", "-" * 32)
    compiled = torch.compile(model, backend="unsloth")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses: list[float] = []
    marked, started = 0, time.perf_counter()
    for step in range(STEPS):
        loss = compiled(**next(data), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 0:
            print(f"step  1  loss {losses[0]:.3f}  after {time.perf_counter() - started:.1f} s (compiling included)")
        elif (step + 1) % 10 == 0:
            speed = (step - marked) * BATCH * SEQ / (time.perf_counter() - started)
            print(f"step {step + 1:>2}  loss {losses[-1]:.3f}  {speed:,.0f} tokens/s")
        else:
            continue
        marked, started = step, time.perf_counter()
    if not verification.ok or losses[-1] > losses[0] - 1:
        raise SystemExit("the demo did not do what it should: see above")


if __name__ == "__main__":
    main()
