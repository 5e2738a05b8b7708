"""CUDA graphs: recorded steps are the steps, accumulated and in parts, and nothing outlives its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.runtime.test_trainer import adapted, history, trainer
from unsloth.models import presets
from unsloth.runtime.trainer import SFTTrainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def of_one_length(rows: int = 64, length: int = 32) -> Dataset:
    ids = torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_list([{"input_ids": row} for row in ids.tolist()])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses(tmp_path: Any, parts: int = 1, **settings: Any) -> tuple[list[dict[str, float]], Any]:
    options = settings.pop("options", {})
    made = trainer(
        SFTTrainer,
        tmp_path,
        rows=of_one_length(),
        more={"options": {"strict": True, **options}},
        max_steps=8,
        **settings,
    )
    made._smaller.parts = parts
    return history(made), made


def recording(tmp_path: Any, accumulated: int, model: Any = None, options: Any = None) -> Any:
    settings = {"gradient_accumulation_steps": accumulated, "more": {"options": options or {}}}
    return trainer(SFTTrainer, tmp_path, model=model, rows=of_one_length(), **settings)


@needs_gpu
@pytest.mark.parametrize(("accumulated", "parts"), [(1, 1), (3, 1), (2, 2)])
def test_recorded_steps_are_the_same_steps(tmp_path: Any, accumulated: int, parts: int) -> None:
    """The second step is recorded, those after it are replayed."""
    settings = {"use_cpu": False, "gradient_accumulation_steps": accumulated}
    launched, _ = losses(tmp_path, parts, options={"cuda_graphs": False}, **settings)
    torch._dynamo.reset()
    recorded, made = losses(tmp_path, parts, **settings)
    assert made.options.cuda_graphs
    assert torch._inductor.cudagraph_trees.get_container(0).tree_manager is not None, "nothing was recorded"
    for ours, other in zip(recorded, launched, strict=True):
        assert ours["grad_norm"] > 0 and ours == pytest.approx(other, rel=1e-4)


def test_steps_are_launched_where_they_do_not_repeat(tmp_path: Any) -> None:
    on_cpu = trainer(SFTTrainer, tmp_path, rows=of_one_length())
    assert not on_cpu.options.cuda_graphs
    asked = trainer(SFTTrainer, tmp_path, more={"options": {"cuda_graphs": True}})
    assert asked.options.cuda_graphs, "what the user says is done"


def test_full_gradients_are_not_copied_for_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        (kind, steps): trainer(
            SFTTrainer, tmp_path, model=model(), rows=of_one_length(), gradient_accumulation_steps=steps
        )
        for kind, model in (("adapters", few_adapters), ("full", lambda: presets.build("tiny-llama")))
        for steps in (1, 2)
    }
    monkeypatch.setattr("unsloth.runtime.trainer.trl.SFTConfig.device", torch.device("cuda"))
    repeats = {key: each._repeats_exactly() for key, each in made.items()}
    assert repeats == {("adapters", 1): True, ("adapters", 2): True, ("full", 1): True, ("full", 2): False}


def few_adapters() -> torch.nn.Module:
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj.lora" in name)
    return model


def test_what_outlives_a_step_is_moved(tmp_path: Any) -> None:
    """On a CPU nothing is recorded; what would be overwritten has other memory all the same."""
    made = trainer(
        SFTTrainer,
        tmp_path,
        rows=of_one_length(),
        gradient_accumulation_steps=2,
        more={"options": {"cuda_graphs": True}},
    )
    made.create_accelerator_and_postprocess()
    parameter = next(p for p in made.model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    gradient, loss = parameter.grad, torch.ones(())
    made.accelerator.gradient_state._set_sync_gradients(False)
    assert made._lasting(loss).data_ptr() != loss.data_ptr()
    assert parameter.grad.data_ptr() != gradient.data_ptr() and bool((parameter.grad == 1).all())
    gradient = parameter.grad
    made.accelerator.gradient_state._set_sync_gradients(True)
    made._lasting(loss)
    assert parameter.grad.data_ptr() == gradient.data_ptr(), "the optimiser reads it before the next forward"
