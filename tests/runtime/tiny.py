"""Small data to train on."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def conversations(count: int = 16) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}." + " Indeed." * (i % 3)},
            ]
        }
        for i in range(count)
    ]


def dataset(count: int = 16) -> Dataset:
    return Dataset.from_list(conversations(count))
