"""Recorded steps are the launched ones, for as long as what was recorded still holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from tests.runtime.test_trainer import adapted, history, trainer
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled, guards_of
from unsloth.runtime import recorded
from unsloth.runtime.recorded import LAUNCHES, RECORDINGS, Recorder
from unsloth.runtime.trainer import SFTTrainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Graph:
    """A stand-in for a CUDA graph on the CPU: replaying computes into the same memory again, from the same memory."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.again: Any = None

    def replay(self) -> None:
        self.again()


@contextmanager
def recording(graph: Graph, **_: Any) -> Iterator[None]:
    Graph.recording = graph
    try:
        yield
    finally:
        Graph.recording = None


class Product:
    """y = x·w, and its gradient; counts how often Python runs it."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 1, bias=False)
        self.runs, self.holds = 0, True
        self.recorder = Recorder(self.model)

    def step(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        self.runs += 1
        x, factor = inputs.pop("x"), inputs.pop("factor")
        weight = self.model.weight

        def loss_and_gradient() -> tuple[Tensor, Tensor]:
            return (x @ weight.detach().T).sum() * factor, x.sum(0, keepdim=True) * factor

        loss, gradient = loss_and_gradient()
        weight.grad = gradient if weight.grad is None else weight.grad + gradient
        if Graph.recording is not None:

            def again() -> None:
                for place, value in zip((loss, gradient), loss_and_gradient(), strict=True):
                    place.copy_(value)

            Graph.recording.again = again
        return loss, "a name"

    def __call__(self, x: Tensor, factor: float = 1.0, *, alone: bool = True) -> Tensor:
        loss, name = self.recorder.run(self.step, {"x": x, "factor": factor}, lambda: lambda: self.holds, alone=alone)
        assert name == "a name"
        return loss


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Product:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made = Product()
    for _ in range(LAUNCHES + 1):  # the last one is recorded
        made(torch.randn(3, 4))
        made.model.weight.grad = None
    assert (made.runs, made.recorder.replayed) == (LAUNCHES + 1, 1)
    return made


def test_a_replay_reads_the_new_batch_and_adds_its_gradient(product: Product) -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    losses = [product(x, alone=False) for x in (first, second)]
    assert product.runs == LAUNCHES + 1, "nothing was launched"
    expected = [(x @ product.model.weight.detach().T).sum() for x in (first, second)]
    torch.testing.assert_close(losses, expected)  # the first is not overwritten by the second
    gradient = product.model.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, (first + second).sum(0, keepdim=True))


def test_a_gradient_that_nobody_adds_to_is_not_copied(product: Product) -> None:
    product(torch.randn(3, 4))
    before = product.model.weight.grad
    product.model.weight.grad = None
    product(torch.randn(3, 4))
    after = product.model.weight.grad
    assert before is not None and after is not None and before.data_ptr() == after.data_ptr()


def test_what_recording_did_is_no_gradient(product: Product) -> None:
    """Recording runs nothing on the device, and a gradient that was there before is not lost."""
    product.model.weight.grad = torch.ones(1, 4)
    for _ in range(LAUNCHES + 1):
        product(torch.zeros(2, 4))
    assert product.recorder.replayed == 2
    torch.testing.assert_close(product.model.weight.grad, torch.ones(1, 4))


@pytest.mark.parametrize("change", ["shape", "dtype", "value", "guard", "frozen", "moved"])
def test_what_was_not_recorded_is_launched(product: Product, change: str) -> None:
    x, factor, runs = torch.randn(3, 4), 1.0, product.runs
    if change == "shape":
        x = x[:2]
    elif change == "dtype":
        x = x.double()
        product.model.double()
    elif change == "value":
        factor = 2.0
    elif change == "guard":
        product.holds = False
    elif change == "frozen":
        product.model.weight.requires_grad_(False)
    else:
        product.model.weight.data = product.model.weight.data.clone()
    loss = product(x, factor)
    assert product.runs == runs + 1
    torch.testing.assert_close(loss, (x @ product.model.weight.detach().T).sum() * factor)


def test_a_changed_model_is_recorded_as_it_is_now(product: Product) -> None:
    product.model.weight.data = product.model.weight.data.clone()
    for _ in range(LAUNCHES + 1):
        product(torch.randn(3, 4))
    assert product.recorder.replayed == 2


def test_few_shapes_are_recorded(product: Product) -> None:
    for rows in range(1, 6):
        for _ in range(LAUNCHES + 2):
            product(torch.randn(rows, 4))
    assert len(product.recorder._recordings) == RECORDINGS


def test_memory_is_given_back(product: Product) -> None:
    assert product.recorder.forget() and not product.recorder.forget()
    runs = product.runs
    product(torch.randn(3, 4))
    assert product.runs == runs + 1, "launched, and recorded again later"
    assert product.recorder.reason is None
    for _ in range(LAUNCHES):
        product(torch.randn(3, 4))
    assert product.recorder.stop("memory was short")
    runs = product.runs
    for _ in range(LAUNCHES + 2):
        product(torch.randn(3, 4))
    assert product.runs == runs + LAUNCHES + 2


def test_a_step_that_cannot_be_recorded_is_launched(
    product: Product, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def refuses(*_: Any, **__: Any) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    x = torch.randn(5, 4)
    for _ in range(LAUNCHES + 1):
        product.model.weight.grad = None
        product(x)
    torch.testing.assert_close(product.model.weight.grad, x.sum(0, keepdim=True))
    assert product.recorder.reason == "operation not permitted when stream is capturing"
    assert len(caplog.records) == 1


def test_large_gradients_are_not_there_twice(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        total_memory = 16 / recorded.GRADIENT_SHARE - 1

    monkeypatch.setattr(torch.cuda, "get_device_properties", Small)
    for _ in range(LAUNCHES + 2):
        product(torch.randn(5, 4), alone=False)
    assert product.recorder.replayed == 1
    monkeypatch.setattr(Small, "total_memory", 16 / recorded.GRADIENT_SHARE + 1)
    product(torch.randn(5, 4), alone=False)
    assert product.recorder.replayed == 2


def test_one_tensor_under_two_names_stays_one(product: Product) -> None:
    """Dynamo guards on it, and would compile anew for two."""
    same: list[bool] = []

    def step(inputs: dict[str, Any]) -> tuple[Any, ...]:
        same.append(inputs["input_ids"] is inputs["labels"])
        if Graph.recording is not None:
            Graph.recording.again = lambda: None
        return ()

    def run(one: Tensor, other: Tensor) -> None:
        product.recorder.run(step, {"input_ids": one, "labels": other}, lambda: lambda: True)

    one, other = torch.ones(2), torch.ones(2)
    for _ in range(LAUNCHES + 2):
        run(one, one)
    assert same == [True] * (LAUNCHES + 1)
    run(one, other)
    assert not same[-1]


# -- guards ------------------------------------------------------------------------------------------------------------


def scaled(model: nn.Module, x: Tensor, factor: float = 1.0) -> Tensor:
    return model(x) * factor


def test_guards_are_those_of_the_code_that_ran() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(2, 4)
    arguments = {"model": model, "x": x, "factor": 1.0}
    assert guards_of(scaled, arguments) is None, "nothing is compiled"
    compiled(scaled, Options.parse({"lowering": "eager"}), [])(model, x).sum().backward()  # type: ignore[arg-type]
    guards = guards_of(scaled, arguments)
    assert guards is not None and guards()
    with torch.autocast("cpu"):
        assert not guards()
    model.eval()
    assert not guards()
    model.train()
    assert guards()
    assert guards_of(scaled, {**arguments, "factor": 2.0}) is None


# -- in the trainer ----------------------------------------------------------------------------------------------------


def of_one_length(rows: int = 64, length: int = 32) -> Dataset:
    ids = torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_list([{"input_ids": row} for row in ids.tolist()])


@needs_gpu
@pytest.mark.parametrize(
    ("accumulated", "parts", "dropout"), [(1, 1, 0.0), (3, 1, 0.0), (2, 2, 0.0), (1, 1, 0.1)], ids=str
)
def test_recorded_steps_are_the_same_steps(tmp_path: Any, accumulated: int, parts: int, dropout: float) -> None:
    curves = []
    for cuda_graphs in (False, True):
        torch._dynamo.reset()
        made = trainer(
            SFTTrainer,
            tmp_path,
            model=adapted(dropout),
            rows=of_one_length(),
            more={"options": {"strict": True}, "cuda_graphs": cuda_graphs},
            max_steps=8,
            use_cpu=False,
            gradient_accumulation_steps=accumulated,
        )
        made._smaller.parts = parts
        curves.append(history(made))
        assert made._recorder.reason == (None if cuda_graphs else "switched off")
        replayed = (8 * accumulated * parts - LAUNCHES) if cuda_graphs else 0
        assert made._recorder.replayed == replayed
    for one, other in zip(*curves, strict=True):
        assert one["grad_norm"] > 0 and one == pytest.approx(other, rel=1e-4)


@needs_gpu
def test_random_numbers_can_be_drawn_after_a_recording_that_failed() -> None:
    layer = nn.Linear(4, 1, device="cuda")
    recorder, x = Recorder(layer), torch.randn(3, 4, device="cuda")

    def step(inputs: dict[str, Any]) -> tuple[Any, ...]:
        loss = nn.functional.dropout(layer(inputs["x"])).sum()
        loss.backward()
        return (loss.item(),)  # waits for the device, which no recording can

    for _ in range(LAUNCHES + 2):
        recorder.run(step, {"x": x}, lambda: lambda: True)
    assert recorder.reason is not None and recorder.replayed == 0


def test_packed_documents_are_launched(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention within them waits for the device."""
    made = trainer(SFTTrainer, tmp_path, max_steps=2, padding_free=True, max_length=None, more={"compile": False})
    monkeypatch.setattr(made._recorder, "run", lambda *_, **__: pytest.fail("recorded"))
    assert all(step["grad_norm"] > 0 for step in history(made))


def test_nothing_is_recorded_on_a_cpu(tmp_path: Any) -> None:
    made = trainer(SFTTrainer, tmp_path, rows=of_one_length())
    assert made._recorder.reason == "switched off"
