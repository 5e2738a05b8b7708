"""DPO and ORPO on the compiled model: TRL's numbers, and exact resumption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from trl.experimental.orpo import ORPOConfig
from trl.experimental.orpo import ORPOTrainer as TheirORPOTrainer

from tests.runtime.test_trainer import EAGER, adapted
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.runtime.preferences import DPOTrainer, ORPOTrainer

METHODS = {"dpo": (trl.DPOTrainer, DPOTrainer, trl.DPOConfig), "orpo": (TheirORPOTrainer, ORPOTrainer, ORPOConfig)}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def pairs(count: int = 12) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"What is {i} + {i}? ", "chosen": f"It is {2 * i}.", "rejected": "No idea," + " none" * (i % 3)}
            for i in range(count)
        ]
    )


def make(cls: Any, config: Any, folder: Any, more: Any = None, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    return cls(
        adapted(), args=config(**settings), train_dataset=pairs(), processing_class=byte_tokenizer(), **(more or {})
    )


def history(made: Any) -> list[dict[str, float]]:
    made.train()
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    return [{n: float(h[n]) for n in names} for h in made.state.log_history if "loss" in h]


@pytest.mark.parametrize("method", METHODS)
def test_the_steps_are_those_of_trl(tmp_path, method) -> None:
    theirs, ours, config = METHODS[method]
    wanted = history(make(theirs, config, tmp_path))
    made = make(ours, config, tmp_path, {"options": EAGER})
    found = history(made)
    assert len(found) == len(wanted) == 4 and all(step["grad_norm"] > 0 for step in found)
    for mine, other in zip(found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=2e-3, abs=1e-5)
    assert made.explanation.counts["rms_norm"][0] >= 5 and made.explanation.counts["rope"][0] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, method) -> None:
    _, ours, config = METHODS[method]
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = make(ours, config, tmp_path, {"compile": False}, **settings)
    whole.train()
    resumed = make(ours, config, tmp_path, {"compile": False}, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    entries = [[e.get("loss") for e in made.state.log_history if "loss" in e] for made in (whole, resumed)]
    assert entries[0] == entries[1]
