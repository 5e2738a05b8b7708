"""Every kernel compiles for every generation of cards, and stays inside its shared memory or is refused there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_KIB = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227}
"""That a program may have, by capability (CUDA C++ Programming Guide, table of technical specifications)."""
KERNELS = {
    "_forward_kernel", "_backward_kernel", "_glu_forward_kernel", "_glu_backward_kernel", "_kernel", "_nf4_kernel",
    "_pointer_kernel", "products_kernel", "glu_kernel", "sums_kernel", "cross_entropy_kernel", "forward_kernel",
    "queries_kernel", "keys_kernel", "decode_kernel", "merge_kernel",
}  # fmt: skip
"""All of ours but Hopper's own."""
LARGE = {"products_kernel", "glu_kernel", "sums_kernel", "forward_kernel", "queries_kernel", "keys_kernel"}
"""Of thin products and capped attention, with tiles of up to 96 KiB."""


@pytest.mark.parametrize("card", SHARED_KIB)
def test_kernels_compile_and_fit(card: int, tmp_path: Path) -> None:
    rows = compiled_for(card, tmp_path)
    assert [r for r in rows if "error" in r] == []
    made = [r for r in rows if "kernel" in r]
    assert [r for r in made if r["shared"] > SHARED_KIB[card] << 10 or r["spills"]] == []
    refused = {r["refused"]: r["reason"] for r in rows if "refused" in r}
    if card == 75:
        assert refused == dict.fromkeys(("thin", "capped"), "sm_75 has too little shared memory")
    else:
        assert refused == {}
    expected = KERNELS - LARGE if card == 75 else KERNELS | {"_descriptor_kernel"} if card == 90 else KERNELS
    assert {r["kernel"] for r in made} == expected


def compiled_for(card: int, cache: Path) -> list[dict[str, Any]]:
    """What ``compile_for_cards`` says, in a process of its own: this one may have Triton as an interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.compile_for_cards", str(card)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
