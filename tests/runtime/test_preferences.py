"""DPO and ORPO on the compiled model: TRL's numbers, and exact resumption."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from trl.experimental.orpo import ORPOConfig
from trl.experimental.orpo import ORPOTrainer as TheirORPOTrainer

from tests.runtime.test_replan import short_of_memory
from tests.runtime.test_smaller import Memory
from tests.runtime.test_train import checkpoint, command  # noqa: F401
from tests.runtime.test_trainer import EAGER, adapted
from unsloth.models.adapters import add_lora
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.presets import build
from unsloth.runtime.data import DataError, Templates, load_data
from unsloth.runtime.finite import TrainingError
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


def make(cls: Any, config: Any, folder: Any, more: Any = None, *, model: Any = None, **changes: Any) -> Any:
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
        adapted() if model is None else model,
        args=config(**settings),
        train_dataset=pairs(),
        processing_class=byte_tokenizer(),
        **(more or {}),
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


# -- the reference -----------------------------------------------------------------------------------------------------


def test_the_reference_of_fresh_adapters_is_the_model_without_them(tmp_path) -> None:
    def fresh() -> torch.nn.Module:
        return add_lora(build("tiny-llama"), rank=4)

    theirs = make(trl.DPOTrainer, trl.DPOConfig, tmp_path, model=fresh())
    ours = make(DPOTrainer, trl.DPOConfig, tmp_path, {"compile": False}, model=fresh())
    assert list(theirs.model.peft_config) == ["default", "ref"] and list(ours.model.peft_config) == ["default"]
    for mine, other in zip(history(ours), history(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    learnt = make(DPOTrainer, trl.DPOConfig, tmp_path, {"compile": False})
    assert list(learnt.model.peft_config) == ["default", "ref"]


def test_rows_that_are_cut_off_are_counted(tmp_path) -> None:
    made = make(DPOTrainer, trl.DPOConfig, tmp_path, {"compile": False}, max_length=32)
    rows = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in made.train_dataset]
    longer = sum(prompt + max(answers) > 32 for prompt, *answers in rows)
    assert made.truncated["train"] == (longer, 12, 0) and 0 < longer < 12


# -- out of memory -----------------------------------------------------------------------------------------------------

UNEVEN = {"per_device_train_batch_size": 5, "optim": "sgd"}
"""Five pairs: in parts of three and two, of answers of several lengths."""


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("after", [0, 2, 4], ids=["at first", "in the middle of a step", "in the second step"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_that_is_short_changes_nothing(tmp_path, caplog, undisturbed, method, after, backward) -> None:
    """Losses, gradients, every metric of the log, and the parameters."""
    whole, before = undisturbed[method]
    _, ours, config = METHODS[method]
    model = adapted()
    # DPO's reference is a forward pass of its own, without gradients.
    passes = after * (2 if method == "dpo" and not backward else 1)
    memory = Memory(model, 6, backward=backward, after=passes)
    halved = make(ours, config, tmp_path, {"compile": False}, model=model, **UNEVEN)
    with caplog.at_level(logging.WARNING):
        found = everything(halved)
    assert memory.refused == [10] and halved._smaller.batches.parts == 2
    assert "out of memory with 5 pairs of" in caplog.text and "from now on 3 at a time" in caplog.text
    assert len(found) == len(before) == 4
    for mine, other in zip(found, before, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    for (name, one), other in zip(whole.model.named_parameters(), halved.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    """By method, a run that memory suffices for, and its log."""
    runs = {}
    for method, (_, ours, config) in METHODS.items():
        made = make(ours, config, tmp_path_factory.mktemp(method), {"compile": False}, **UNEVEN)
        runs[method] = made, everything(made)
    return runs


def everything(made: Any) -> list[dict[str, float]]:
    """What is logged of each step but times."""
    made.train()
    times = {"tokens_per_second", "total_flos"}
    return [{n: v for n, v in h.items() if n not in times} for h in made.state.log_history if "loss" in h]


@pytest.mark.parametrize("method", METHODS)
def test_three_halvings_are_enough(tmp_path, method) -> None:
    _, ours, config = METHODS[method]
    memory = Memory(model := adapted(), 0)
    made = make(
        ours, config, tmp_path, {"compile": False}, model=model, **{**UNEVEN, "per_device_train_batch_size": 12}
    )
    with pytest.raises(TrainingError, match="after 3 halvings of the micro-batch: CUDA out of memory"):
        made.train()
    assert memory.refused == [24, 12, 6, 4]
    Memory(model := adapted(), 0)
    made = make(ours, config, tmp_path, {"compile": False}, model=model)
    with pytest.raises(TrainingError, match=r"out of memory with one pair of \d+ tokens"):
        made.train()


@pytest.mark.parametrize(("method", "settings"), [("dpo", {}), ("orpo", {}), ("dpo", {"loss_type": "aot"})])
def test_a_smaller_plan_comes_before_smaller_batches(tmp_path, caplog, monkeypatch, method, settings) -> None:
    """In the middle of a step, whose earlier micro-batch is done again: the log is what it would have been."""
    _, ours, config = METHODS[method]
    before = everything(make(ours, config, tmp_path / "whole", {"compile": False}, **{**UNEVEN, **settings}))
    budgets = short_of_memory(monkeypatch)
    made = make(ours, config, tmp_path / "short", **{**UNEVEN, **settings})
    with caplog.at_level(logging.WARNING):
        found = everything(made)
    assert len(budgets) == 3 and made._smaller.batches.parts == 1 and caplog.text.count("planned again for") == 2
    for mine, other in zip(found, before, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_loss_that_parts_do_not_add_up_to_ends_the_run(tmp_path) -> None:
    Memory(model := adapted(), 0)
    made = make(DPOTrainer, trl.DPOConfig, tmp_path, {"compile": False}, model=model, loss_type="aot")
    with pytest.raises(TrainingError, match=r"out of memory: CUDA .* 'aot' is not the sum of its parts: it sorts"):
        made.train()


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_a_file(command, checkpoint, tmp_path, method) -> None:  # noqa: F811
    path, out = tmp_path / "pairs.csv", tmp_path / "out"
    cells = [f"What is {i} + {i}?,It is {2 * i}.,{'No idea' if i else f'It is {2 * i}.'}" for i in range(9)]
    path.write_text("\n".join(["question,chosen,rejected", *cells]) + "\n", encoding="utf-8")
    words = ["--method", method, "--model", checkpoint, "--data", path, "--eval-data", path, "--output-dir", out]
    # One of them compiled is enough: the steps of both are held against TRL's above.
    words += ["--options", "{lowering: eager, strict: true}", "--compile", method == "orpo"]
    words += ["--learning-rate", "1e-2", "--loraplus-lr-ratio", 4]
    code, said, err = command(*words, "--max-steps", 6, "--sample-prompt", "What?", "--beta", 0.5)
    assert code == 0, err
    assert f"{path}: 8 rows, preference pairs (question, chosen, rejected)" in err
    assert f"{path}:2: chosen and rejected are the same" in err
    lines = err.splitlines()
    assert any(line.startswith("chosen      <|im_start|>") for line in lines) and "«It is 2." in err
    assert any(line.startswith("rejected    <|im_start|>") for line in lines) and "«No idea" in err
    assert "tokens/s" in said and ("0 breaks" in said and "lora_linear" in said) == (method == "orpo")
    before, after = [float(word) for word in re.findall(r"loss ([\d.]+) before, ([\d.]+) after", said)[0]]
    assert after < before
    assert not (out / "ref").exists()
    assert PeftModel.from_pretrained(build("tiny-llama"), out).peft_config


# -- rows --------------------------------------------------------------------------------------------------------------

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Q?"), ("assistant", "yes"), ("assistant", "no")))
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "Q? ", "chosen": "yes", "rejected": "no"}, {"prompt": "Q? ", "chosen": "yes", "rejected": "no"}),
        (
            {"chosen": "H: Q?\n\nA: yes it is", "rejected": "H: Q?\n\nA: yes, no"},
            {"prompt": "H: Q?\n\nA:", "chosen": " yes it is", "rejected": " yes, no"},
        ),
        (CHAT, CHAT),
        ({"prompt": "Q?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 2}, CHAT),
        ({"prompt": "Q?", "chosen": [GOOD], "rejected": [BAD]}, CHAT),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
        ({"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}, CHAT),
        (
            {
                "conversations": [{"from": "human", "value": "Q?"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            CHAT,
        ),
        ({"question": "Q?", "chosen": "yes", "rejected": "no"}, CHAT),
        (
            {"system": "Be brief.", "instruction": "Q", "input": "?", "chosen": "yes", "rejected": "no"},
            {**CHAT, "prompt": [SYSTEM, {"role": "user", "content": "Q\n\n?"}]},
        ),
        ({"system": "Be brief.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {**CHAT, "prompt": [SYSTEM, USER]}),
    ],
)
def test_forms_of_pairs(tmp_path, row, wanted) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert load_data(str(path), preferences=True).rows[0] == wanted


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q?", "chosen": "no", "rejected": "no"}, "chosen and rejected are the same"),
        ({"prompt": "Q?", "chosen": "no", "rejected": None}, "column 'rejected' is null"),
        ({"prompt": " ", "chosen": "no", "rejected": "yes"}, "column 'prompt' is empty"),
        ({"chosen": "no", "rejected": "yes"}, "there is no column 'prompt', and chosen and rejected do not begin with"),
        (
            {"chosen": [GOOD], "rejected": [BAD]},
            "there is no prompt, and chosen and rejected do not begin with",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "column 'chosen' has no message of the assistant's"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "column 'rejected' has no message of the assistant's"),
        ({"prompt": [USER], "chosen": [{"role": "boss", "content": "x"}], "rejected": [BAD]}, "has the role 'boss'"),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path, row, reason) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_data(str(path), preferences=True)
    assert f"{path}:1: " in str(error.value) and reason in str(error.value)


def test_pairs_for_a_model_without_a_chat_template(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("ask,chosen,rejected\nQ?,yes,no\n", encoding="utf-8")
    data = load_data(str(path), templates=Templates.parse("Say: {ask}", preferences=True), preferences=True)
    assert data.rows[0]["prompt"] == [{"role": "user", "content": "Say: Q?"}]
    assert data.without_chat().rows[0] == {"prompt": "Say: Q?\n\n", "chosen": "yes", "rejected": "no"}
