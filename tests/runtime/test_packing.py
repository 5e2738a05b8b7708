"""Packed documents do not see each other, and accumulated micro-batches are one batch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from tests.runtime.test_trainer import EAGER, adapted, trainer
from unsloth.runtime.trainer import SFTTrainer

MODES = {"eager": {"compile": False}, "compiled": {"options": EAGER}}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def documents(*lengths: int, first: int = 0) -> Dataset:
    """Rows of tokens; ``first`` changes those of the first."""
    return Dataset.from_list(
        [
            {"input_ids": [(31 * i + 7 * j + (first if i == 0 else 0)) % 250 + 4 for j in range(length)]}
            for i, length in enumerate(lengths)
        ]
    )


def gradients(made: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and every parameter's gradient of one step over some micro-batches, as the training loop makes it."""
    made.model.train()
    made.model.zero_grad()
    batches, items = made.get_batch_samples(iter(batches), len(batches), made.args.device)
    made.current_gradient_accumulation_steps = len(batches)
    loss = sum(float(made.training_step(made.model, dict(batch), items)) for batch in batches)
    found = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    assert found and all(gradient.any() for gradient in found.values())
    return loss, found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        error = float((gradient - other[name]).norm() / gradient.norm())
        assert error <= tolerance, (name, error)


def mixed_lengths(count: int) -> list[int]:
    """Numbers of tokens from 3 to 60."""
    return [3 + (37 * i * i + 11 * i) % 58 for i in range(count)]


def batch_of(made: Any) -> dict[str, Any]:
    return next(iter(made.get_train_dataloader()))


def packed(tmp_path: Any, mode: str, rows: Dataset, **settings: Any) -> Any:
    changes = {"per_device_train_batch_size": 1, "max_length": 64, **settings}
    made = trainer(SFTTrainer, tmp_path, rows=rows, more=MODES[mode], **changes)
    made.create_optimizer()
    return made


PACKED = {"packing": True}
PADDING_FREE = {"padding_free": True, "per_device_train_batch_size": 2, "max_length": None}


def second_document(made: Any) -> dict[str, Any]:
    """A batch of two documents with labels on the second alone."""
    batch = batch_of(made)
    assert batch["input_ids"].shape == (1, 50) and "attention_mask" not in batch
    assert (batch["position_ids"][0] == 0).nonzero().flatten().tolist() == [0, 30]
    assert batch["input_ids"][0, 30:].tolist() == documents(30, 20)[1]["input_ids"]
    batch["labels"][:, :31] = -100
    return batch


def with_another_first_document(batch: dict[str, Any]) -> dict[str, Any]:
    changed = dict(batch)
    changed["input_ids"] = batch["input_ids"].clone()
    changed["input_ids"][0, :30] = torch.tensor(documents(30, first=100)[0]["input_ids"])
    return changed


LAYOUTS = [
    pytest.param(PACKED, "sdpa", id="packed"),
    pytest.param(PADDING_FREE, "sdpa", id="padding-free"),
    pytest.param(PACKED, "eager", id="packed, eager attention"),
    pytest.param(
        *(PACKED, "flex_attention"),
        id="packed, flex attention",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="has no backward on a CPU"),
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("settings", "attention"), LAYOUTS)
def test_a_document_does_not_see_the_one_before_it(tmp_path, mode, settings, attention) -> None:
    model: Any = adapted()
    model.base_model.model.set_attn_implementation(attention)
    settings = {**settings, "use_cpu": attention != "flex_attention"}
    rows = documents(30, 20)
    made = packed(tmp_path, mode, rows, train_sampling_strategy="sequential", model=model, **settings)
    batch = {name: v.to(made.args.device) if isinstance(v, Tensor) else v for name, v in second_document(made).items()}
    loss, wanted = gradients(made, [batch])
    changed, found = gradients(made, [with_another_first_document(batch)])
    assert loss == pytest.approx(changed, rel=1e-6)
    assert_close(wanted, found, 1e-5)


def test_without_positions_it_would(tmp_path) -> None:
    """That the test above can fail."""
    made = packed(tmp_path, "eager", documents(30, 20), **PACKED)
    batch = second_document(made)
    bare = {name: batch[name] for name in ("input_ids", "labels")}
    assert gradients(made, [bare])[0] != pytest.approx(
        gradients(made, [with_another_first_document(bare)])[0], rel=1e-4
    )


@pytest.mark.parametrize("settings", [PADDING_FREE, {**PACKED, "packing_strategy": "bfd_split"}], ids=["free", "split"])
def test_twenty_steps_of_documents_in_two_graphs(tmp_path, settings) -> None:
    torch._dynamo.utils.counters.clear()
    made = packed(tmp_path, "compiled", documents(*mixed_lengths(160)), max_steps=20, **settings)
    made.train()
    assert 1 <= len(made.explanation.graphs) <= 2 and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_batch_is_its_documents_one_by_one(tmp_path, mode) -> None:
    rows = documents(20, 30, 9)
    whole = packed(tmp_path, mode, rows, packing=True)
    assert len(whole.train_dataset) == 1
    alone = packed(tmp_path, "eager", rows, per_device_train_batch_size=1)
    loss, found = gradients(whole, [batch_of(whole)])
    expected, wanted = gradients(alone, list(alone.get_train_dataloader()))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(found, wanted, 1e-4 if mode == "compiled" else 1e-5)


def test_wrapped_packing_is_said_to_mix_documents(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        packed(tmp_path, "eager", documents(20, 30), packing=True, packing_strategy="wrapped")
    assert "documents attend to each other" in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_micro_batches_are_one_batch(tmp_path, mode) -> None:
    rows = documents(5, 60, 17, 3, 33, 8, 50, 2)
    made = packed(tmp_path, mode, rows, per_device_train_batch_size=8)
    tokens = list(made.train_dataset)
    expected, wanted = gradients(made, [made.data_collator(tokens)])
    for size in (1, 2, 4):
        batches = [made.data_collator(tokens[i : i + size]) for i in range(0, 8, size)]
        loss, found = gradients(made, batches)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert_close(found, wanted, 1e-5)


def test_adapters_have_random_values() -> None:
    """Else half of the gradients above would be zero in any case."""
    assert all(p.any() for n, p in adapted().named_parameters() if "lora_B" in n)
