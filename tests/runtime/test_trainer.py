"""The compiled step is TRL's step: the same losses, gradients and metrics, in one graph."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.runtime.tiny import dataset
from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.runtime.causal_lm import causal_lm_step
from unsloth.runtime.lengths import WithoutIdleMask
from unsloth.runtime.pace import Pace
from unsloth.runtime.trainer import SFTTrainer

EAGER = {"lowering": "eager", "strict": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def adapted(dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(presets.build("tiny-llama"), config)


def trainer(
    cls: Any,
    tmp_path: Any,
    *,
    model: Any = None,
    rows: Any = None,
    eval_dataset: Any = None,
    more: Any = None,
    **settings: Any,
):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_length": 128,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return cls(
        model if model is not None else adapted(),
        trl.SFTConfig(**{**defaults, **settings}),
        train_dataset=rows if rows is not None else dataset(),
        eval_dataset=eval_dataset,
        processing_class=byte_tokenizer(),
        **(more or {}),
    )


def history(made: Any) -> list[dict[str, float]]:
    made.train()
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [{n: float(h[n]) for n in names} for h in made.state.log_history if "loss" in h]


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["grad_norm"] > 0
        assert mine == pytest.approx(other, rel=tolerance)


def test_twenty_steps_are_those_of_trl_in_one_graph(tmp_path) -> None:
    lengths = [3 + (37 * i * i + 11 * i) % 58 for i in range(80)]
    rows = Dataset.from_list([{"input_ids": [(7 * i + j) % 250 + 4 for j in range(n)]} for i, n in enumerate(lengths)])
    # Adam divides gradients that nearly vanish by themselves: two equal runs part after ten steps.
    settings = {"max_steps": 20, "gradient_accumulation_steps": 2, "rows": rows, "optim": "sgd"}
    theirs = history(trainer(trl.SFTTrainer, tmp_path, **settings))
    ours = trainer(SFTTrainer, tmp_path, more={"options": EAGER}, **settings)
    assert_same(history(ours), theirs, 1e-3)
    assert len(ours.explanation.graphs) == 1 and not torch._dynamo.utils.counters["graph_break"]
    assert ours.explanation.counts["rms_norm"] == (5, 5) and ours.explanation.counts["attention"] == (2, 2)


def test_compiled_and_eager_steps_agree_through_inductor(tmp_path) -> None:
    eager = history(trainer(SFTTrainer, tmp_path, more={"compile": False}))
    assert_same(history(trainer(SFTTrainer, tmp_path, more={"options": {"strict": True}})), eager, 1e-3)


def test_autocast_with_float32_adapters(tmp_path) -> None:
    theirs = history(trainer(trl.SFTTrainer, tmp_path, bf16=True))
    ours = history(trainer(SFTTrainer, tmp_path, bf16=True, more={"options": EAGER}))
    # Both round to bfloat16, differently: a step's grad_norm is 1.5% off in either. tests/compiler/test_adapters.py
    # holds every gradient against float64.
    assert_same(ours, theirs, 5e-2)


def test_evaluation_is_that_of_trl_and_not_counted_as_training(tmp_path) -> None:
    theirs = trainer(trl.SFTTrainer, tmp_path, eval_dataset=dataset(6)).evaluate()
    ours = trainer(SFTTrainer, tmp_path, eval_dataset=dataset(6), more={"options": EAGER})
    metrics = ours.evaluate()
    assert metrics["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(theirs["eval_mean_token_accuracy"], rel=1e-4)
    assert ours.pace.tokens_per_second is None and ours.pace.first_step_seconds is None


@pytest.mark.parametrize("enabled_by", ["argument", "model"])
def test_gradient_checkpointing_is_the_planners(tmp_path, enabled_by: str) -> None:
    model = adapted()
    if enabled_by == "model":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    settings = {"gradient_checkpointing": enabled_by == "argument"}
    given = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=True)
    ours = trainer(SFTTrainer, tmp_path, model=model, more={"options": EAGER}, **settings)
    assert history(ours) and len(ours.explanation.graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert given.gradient_checkpointing  # the caller's arguments stay as they were


def test_other_losses_run_as_trl_runs_them(tmp_path) -> None:
    theirs = history(trainer(trl.SFTTrainer, tmp_path, loss_type="dft"))
    ours = trainer(SFTTrainer, tmp_path, loss_type="dft", more={"options": EAGER})
    assert_same(history(ours), theirs, 1e-5)
    assert ours.explanation.graphs == []


def test_a_batch_without_trained_tokens_has_loss_zero() -> None:
    model, ids = adapted(), torch.randint(4, 100, (2, 8))
    step = causal_lm_step(model, {"input_ids": ids}, torch.full_like(ids, -100))
    assert float(step.loss) == 0 and int(step.tokens) == 0
    step.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_step_metrics_against_their_definitions() -> None:
    model, ids = adapted(), torch.randint(4, 100, (2, 9))
    labels = ids.clone()
    labels[0, :5] = -100
    step = causal_lm_step(model, {"input_ids": ids}, labels)
    logits = model(input_ids=ids).logits[:, :-1].double()
    trained, p = labels[:, 1:] != -100, logits.softmax(-1)
    nll = -p.gather(-1, ids[:, 1:, None])[..., 0].log()
    assert float(step.loss) == pytest.approx(float(nll[trained].mean()), rel=1e-5)
    assert float(step.entropy) == pytest.approx(float(-(p * p.log()).sum(-1)[trained].sum()), rel=1e-5)
    assert int(step.correct) == int((logits.argmax(-1) == ids[:, 1:])[trained].sum())
    assert int(step.tokens) == int(trained.sum())


def test_pace_leaves_out_compilation_and_pauses(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    pace = Pace()

    def step(tokens: int, seconds: float, *, compiles: bool = False) -> None:
        started = clock[0]
        clock[0] += seconds
        pace.after_step(tokens, started if compiles else None)

    step(1000, 50.0)
    assert pace.first_step_seconds == 50.0 and pace.tokens_per_second is None and pace.lap() is None
    step(100, 1.0)
    step(100, 1.0)
    step(100, 30.0, compiles=True)
    assert pace.lap() == pytest.approx(100)
    with pace.paused():
        clock[0] += 1000
    step(300, 1.0)
    assert pace.lap() == pytest.approx(300) and pace.tokens_per_second == pytest.approx(500 / 3)
    assert not math.isnan(pace.tokens_per_second)


@pytest.mark.parametrize("last", [24, 17], ids=["all", "but the last"])
def test_rows_of_one_length_need_no_mask(tmp_path, last: int) -> None:
    lengths = [24] * 7 + [last]
    rows = Dataset.from_list([{"input_ids": [(7 * i + j) % 250 + 4 for j in range(n)]} for i, n in enumerate(lengths)])
    theirs = history(trainer(trl.SFTTrainer, tmp_path, rows=rows))
    ours = trainer(SFTTrainer, tmp_path, rows=rows, more={"options": EAGER})
    assert_same(history(ours), theirs, 1e-3)
    assert ours.explanation.counts["attention"] == ((2, 2) if last == 24 else (4, 4))  # a second graph, with padding


def test_only_our_own_collators_promise_padding_on_the_right(tmp_path) -> None:
    ours = trainer(SFTTrainer, tmp_path, more={"options": EAGER})
    assert ours.options.padding == "right"
    assert trainer(SFTTrainer, tmp_path, more={"options": {**EAGER, "padding": "any"}}).options.padding == "any"
    another = type("Another", (type(ours.data_collator),), {})(pad_token_id=0)
    assert trainer(SFTTrainer, tmp_path, more={"options": EAGER, "data_collator": another}).options.padding == "any"


def test_a_mask_that_masks_is_kept() -> None:
    collate = WithoutIdleMask(lambda rows: {"attention_mask": torch.tensor(rows)})
    assert collate([[1, 1], [1, 1]]) == {}
    assert collate([[1, 1], [1, 0]])["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert WithoutIdleMask(list)([1]) == [1]
