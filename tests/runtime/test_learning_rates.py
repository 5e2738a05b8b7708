"""Rates of their own for embeddings and B, and the kinds of adapters and optimisers that a run may ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.runtime.test_train import checkpoint, command, rows  # noqa: F401
from tests.runtime.test_trainer import EAGER as OPTIONS
from tests.runtime.test_trainer import assert_same, history, trainer
from unsloth.models import presets
from unsloth.models.adapters import add_lora
from unsloth.runtime.trainer import SFTTrainer


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(presets.build("tiny-llama"), config)


def rates(made: Any) -> dict[str, tuple[float, float]]:
    """Each trained parameter's rate and weight decay."""
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in made.optimizer.param_groups for p in g["params"]}
    return {name: groups[id(p)] for name, p in made.model.named_parameters() if p.requires_grad}


def make(tmp_path, **settings: Any) -> Any:
    more = {"compile": False, **settings.pop("more", {})}
    return trainer(SFTTrainer, tmp_path, learning_rate=1e-3, weight_decay=0.1, more=more, **settings)


def test_rates(tmp_path) -> None:
    model = adapted(modules_to_save=["embed_tokens", "lm_head"])
    made = make(tmp_path, model=model, more={"embedding_learning_rate": 1e-5, "loraplus_lr_ratio": 16})
    made.create_optimizer()
    found = rates(made)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, (rate, decay) in found.items():
        wanted = 1e-5 if "modules_to_save" in name else 16e-3 if "lora_B" in name else 1e-3
        assert rate == pytest.approx(wanted) and decay == 0.1, name
    kinds = {name.split(".")[-2] for name in found} | {name.split(".")[-3] for name in found}
    assert {"lora_A", "lora_B"} <= kinds


def test_the_schedule_scales_each_rate(tmp_path) -> None:
    made = make(tmp_path, model=adapted(), max_steps=2, more={"loraplus_lr_ratio": 4})
    made.train()
    found = {rate for rate, _ in rates(made).values()}
    assert found == {0.0}  # the linear schedule ends there
    assert sorted(made.lr_scheduler.base_lrs) == pytest.approx([1e-3, 4e-3])


def test_rates_of_what_is_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="no embedding is trained"):
        make(tmp_path, model=adapted(), more={"embedding_learning_rate": 1e-5}).create_optimizer()
    with pytest.raises(ValueError, match="there are no adapters"):
        make(tmp_path, model=presets.build("tiny-llama"), more={"loraplus_lr_ratio": 2}).create_optimizer()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}], ids=["DoRA", "rsLoRA"])
def test_the_compiled_step_with_other_adapters(tmp_path, settings) -> None:
    def add() -> Any:
        model = add_lora(presets.build("tiny-llama"), rank=4, **settings)
        torch.manual_seed(1)  # else B, and with it the gradient of A, would be zero
        for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
            nn.init.normal_(parameter, std=0.1)
        return model

    torch._dynamo.utils.counters.clear()
    eager = history(make(tmp_path, model=add(), max_steps=3))
    made = make(tmp_path, model=add(), max_steps=3, more={"compile": True, "options": OPTIONS})
    assert_same(history(made), eager, 1e-3)
    assert len(made.explanation.graphs) == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_neftune_is_noise_in_training_alone(tmp_path) -> None:
    quiet, noisy = make(tmp_path, model=adapted()), make(tmp_path, model=adapted(), neftune_noise_alpha=10)
    assert history(noisy)[0]["loss"] != pytest.approx(history(quiet)[0]["loss"], rel=1e-5)
    assert not noisy.model.get_input_embeddings()._forward_hooks


def test_neftune_is_that_of_trl_in_one_graph(tmp_path) -> None:
    settings = {"neftune_noise_alpha": 10, "max_steps": 3}
    theirs = history(trainer(trl.SFTTrainer, tmp_path, **settings))
    torch._dynamo.utils.counters.clear()
    ours = trainer(SFTTrainer, tmp_path, more={"options": OPTIONS}, **settings)  # draws eager's numbers
    assert_same(history(ours), theirs, 1e-3)
    assert len(ours.explanation.graphs) == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_a_run_with_all_of_it(command, checkpoint, rows, tmp_path) -> None:  # noqa: F811
    words = ["--model", checkpoint, "--data", rows, "--output-dir", tmp_path / "out", "--max-steps", 2]
    words += [
        "--options",
        "{lowering: eager, strict: true}",
        "--use-dora",
        "true",
        "--use-rslora",
        "true",
        "--loraplus-lr-ratio",
        8,
    ]
    words += ["--modules-to-save", "[embed_tokens]", "--embedding-learning-rate", "1e-5", "--neftune-noise-alpha", 5]
    code, out, err = command(*words)
    assert code == 0 and "steps       2, " in out, err


def test_a_tracker_that_is_not_installed(command, checkpoint, rows, tmp_path) -> None:  # noqa: F811
    words = ["--model", checkpoint, "--data", rows, "--output-dir", tmp_path / "out", "--report-to"]
    code, _, err = command(*words, "swanlab")
    assert code == 2 and "--report-to: report_to swanlab needs its package: pip install swanlab" in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' optimisers need a GPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_small_and_paged_optimisers_resume(tmp_path, optim) -> None:
    settings: dict[str, Any] = {"optim": optim, "use_cpu": False, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path, model=adapted(), **settings)
    whole.train()
    resumed = make(tmp_path, model=adapted(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
