"""Workloads that belong together: ``python -m benchmarks.step --suite NAME`` measures what their files lack.

A suite is a row in a table: a name and its workloads. Systems are written as ``--systems`` takes them.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """One workload, as the command line of ``benchmarks.step`` would name it, and who does it."""

    name: str
    shape: str
    mode: str
    batch: int
    seq: int
    systems: tuple[str, ...]
    checkpointing: str = "none"


OURS = "recorded:logits=drop"
"""As our trainer runs it."""
ALL = ("unsloth", OURS, "inductor", "liger", "trl", "hf")
WITHOUT_UNSLOTH = ("inductor", OURS, "liger", "hf")

TRUTH = ("float32",)
"""A step that others are checked against; recomputed, or 8B would not fit."""
QWEN, LLAMA = "qwen2.5-vl-7b", "llama-3.2-11b-vision"
"""An image of 1024 × 1024 in each row, and as much text beside it as the workload's length says."""
OURS_OF_IMAGES = "ours:logits=drop"
"""As our trainer runs it: steps with images are launched, not recorded."""
OF_IMAGES = (OURS_OF_IMAGES, "unsloth", "hf")


def _with_images(name: str, shape: str, mode: str) -> tuple[Work, ...]:
    return (
        Work(name, shape, mode, 2, 512, OF_IMAGES),
        Work(f"{name}-checkpointing", shape, mode, 2, 512, ("unsloth",), "unsloth"),
        Work(f"{name}-checkpointing", shape, mode, 2, 512, ("hf",), "hf"),
    )


SUITES: dict[str, tuple[Work, ...]] = {
    "peers": (
        Work("1b-lora", "llama-1b", "lora", 4, 2048, TRUTH, "hf"),
        Work("1b-lora", "llama-1b", "lora", 4, 2048, ALL),
        Work("8b-lora", "llama-8b", "lora", 2, 2048, TRUTH, "hf"),
        Work("8b-lora", "llama-8b", "lora", 2, 2048, ALL),
        Work("8b-lora-checkpointing", "llama-8b", "lora", 2, 2048, ("unsloth",), "unsloth"),
        Work("8b-lora-checkpointing", "llama-8b", "lora", 2, 2048, ("hf", "trl", "liger"), "hf"),
        # Ours has a budget where others have a switch: the memory of the best of them, as measured.
        Work("8b-lora-checkpointing", "llama-8b", "lora", 2, 2048, (f"{OURS}:memory_budget=16.7GiB",)),
        Work("8b-qlora", "llama-8b", "qlora", 2, 2048, TRUTH, "hf"),
        Work("8b-qlora", "llama-8b", "qlora", 2, 2048, ("unsloth", OURS, "inductor", "liger", "trl")),
        Work("8b-qlora-checkpointing", "llama-8b", "qlora", 2, 2048, ("unsloth",), "unsloth"),
        Work("8b-qlora-checkpointing", "llama-8b", "qlora", 2, 2048, ("hf", "liger"), "hf"),
        Work("8b-qlora-checkpointing", "llama-8b", "qlora", 2, 2048, (f"{OURS}:memory_budget=7GiB",)),
        Work("8b-qlora-long", "llama-8b", "qlora", 1, 32768, ("unsloth",), "unsloth"),
        Work("8b-qlora-long", "llama-8b", "qlora", 1, 32768, ("ours:logits=drop:memory_budget=14.2GiB",)),
        Work("4b-lora", "qwen3-4b", "lora", 4, 2048, TRUTH, "hf"),
        Work("4b-lora", "qwen3-4b", "lora", 4, 2048, ("unsloth", OURS, "inductor", "liger")),
        Work("1b-full", "llama-1b", "full", 4, 2048, TRUTH, "hf"),
        Work("1b-full", "llama-1b", "full", 4, 2048, WITHOUT_UNSLOTH),
        Work("moe-lora", "qwen3-30b-a3b-12", "lora", 2, 2048, ("hf", OURS, "inductor")),
    ),
    "vision": (
        *_with_images("qwen-lora", QWEN, "lora"),
        *_with_images("qwen-qlora", QWEN, "qlora"),
        *_with_images("llama-lora", LLAMA, "lora"),
        *_with_images("llama-qlora", LLAMA, "qlora"),
    ),
}
"""By name. Another suite is another entry."""
