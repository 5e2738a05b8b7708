"""Out of memory: the same batch in smaller parts gives the same loss, gradient and metrics."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.test_packing import documents
from tests.runtime.test_trainer import EAGER, adapted, assert_same, history, trainer
from tests.runtime.tiny import dataset
from unsloth.runtime.finite import TrainingError
from unsloth.runtime.smaller import SmallerBatches, split
from unsloth.runtime.trainer import SFTTrainer


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(tmp_path, **settings: Any) -> Any:
    defaults = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "optim": "sgd", "rows": dataset(32)}
    return trainer(SFTTrainer, tmp_path, **{**defaults, "more": {"compile": False}, **settings})


class Memory:
    """Runs out where more than some rows go forward, or (half way) backward."""

    def __init__(self, model: Any, rows: int, *, backward: bool = False, after: int = 0, dim: int = 0) -> None:
        self.rows, self.refused, self.after, self.dim = rows, [], after, dim
        layer = model.base_model.model.model.layers[0]
        layer.register_forward_hook(self.backward if backward else self.forward)

    def refuse(self, rows: int) -> None:
        if rows > self.rows and self.after < 0:
            self.refused.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    def forward(self, module: Any, args: Any, output: Any) -> None:
        self.after -= 1
        self.refuse(output.shape[self.dim])

    def backward(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.after -= 1
        if output.requires_grad:
            output.register_hook(lambda gradient: self.refuse(len(gradient)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Any, list[dict[str, float]]]:
    """A run that memory suffices for, and its log."""
    made = make(tmp_path_factory.mktemp("whole"))
    return made, history(made)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("after", [0, 1, 2], ids=["at first", "in the middle of a step", "in the second step"])
def test_the_run_is_the_same(tmp_path, caplog, whole, backward: bool, after: int) -> None:
    undisturbed, before = whole
    model = adapted()
    memory = Memory(model, 2, backward=backward, after=after)
    halved = make(tmp_path, model=model)
    with caplog.at_level(logging.WARNING):
        after_all = history(halved)
    assert memory.refused == [8, 4] and halved._smaller.parts == 4  # and never again
    assert_same(after_all, before, 1e-5)
    for (name, one), other in zip(undisturbed.model.named_parameters(), halved.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
    assert "out of memory with 8 rows of" in caplog.text and "from now on 2 at a time" in caplog.text


def test_the_compiled_step_in_parts(tmp_path) -> None:
    eager = history(make(tmp_path, max_steps=2))
    made = make(tmp_path, max_steps=2, more={"options": EAGER})
    made._smaller.parts = 2
    assert_same(history(made), eager, 1e-3)


def test_three_halvings_are_enough(tmp_path) -> None:
    memory = Memory(model := adapted(), 1)
    made = make(tmp_path, model=model, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    with pytest.raises(TrainingError, match="after 3 halvings of the micro-batch: CUDA out of memory"):
        made.train()
    assert memory.refused == [16, 8, 4, 2]
    Memory(model := adapted(), 0)
    made = make(tmp_path, model=model, per_device_train_batch_size=2)
    with pytest.raises(TrainingError, match=r"out of memory with one row of \d+ tokens"):
        made.train()


def test_parts_hold_every_row_once() -> None:
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.arange(5), "other": "x", "one": torch.ones(1)}
    for parts, sizes in ((2, [3, 2]), (4, [2, 2, 1]), (8, [1] * 5)):
        found = list(split(batch, parts))
        assert [len(p["input_ids"]) for p in found] == sizes == [len(p["labels"]) for p in found]
        assert torch.cat([p["input_ids"] for p in found]).equal(batch["input_ids"])
        assert all(p["other"] == "x" and len(p["one"]) == 1 for p in found)


def test_packed_documents_are_parted_between_them(tmp_path, caplog) -> None:
    rows = documents(9, 30, 5, 12, 8, 20, 6, 3)
    settings = {"padding_free": True, "max_length": None, "rows": rows, "gradient_accumulation_steps": 1}
    whole = make(tmp_path, max_steps=1, **settings)
    memory = Memory(model := adapted(), 40, dim=1)
    halved = make(tmp_path, model=model, max_steps=1, **settings)
    with caplog.at_level(logging.WARNING):
        assert_same(history(halved), history(whole), 1e-5)
    assert memory.refused[0] == 93 and halved._smaller.parts == 4
    assert "out of memory with 8 documents of 93 tokens" in caplog.text
    batch = next(iter(whole.get_train_dataloader()))
    parts = list(split(batch, 4))
    assert torch.cat([p["input_ids"] for p in parts], dim=1).equal(batch["input_ids"])
    for part in parts:
        assert part["position_ids"][0, 0] == 0 and part["seq_idx"][0, 0] == 0
        starts = [*(part["position_ids"][0] == 0).nonzero().flatten().tolist(), part["input_ids"].shape[1]]
        assert part["cu_seq_lens_q"].tolist() == starts and part["max_length_q"] == max(np.diff(starts))


def test_a_mean_over_the_micro_batch_is_the_same_in_parts() -> None:
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, 3, -100], [-100, 1, 1, 1]])
    batch = {"input_ids": labels.clone(), "labels": labels}
    divisors: list[Any] = []

    def run(part: dict[str, Any], items: Any, share: float) -> torch.Tensor:
        divisors.append((int(items), share))
        return torch.tensor(1.0)

    smaller = SmallerBatches()
    smaller.parts = 2
    smaller.run(run, batch, None, list)
    assert divisors == [(6, 2 / 3), (6, 1 / 3)]
