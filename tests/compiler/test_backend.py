"""The whole way: real architectures, compiled and eager, loss and every gradient."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from tests.toy import Raising
from unsloth.compiler import backend as backend_module
from unsloth.compiler.backend import compile_graph
from unsloth.compiler.logits import DroppedLogits, DroppedLogitsError
from unsloth.compiler.options import OptionError, Options
from unsloth.compiler.report import GraphReport
from unsloth.compiler.run import compiled, sizes_in_graph
from unsloth.models import presets
from unsloth.passes.recognise import RECOGNISERS
from unsloth.passes.runner import CompilerWarning

TINY = ["tiny-llama", "tiny-qwen3", "tiny-mistral", "tiny-gemma2", "tiny-phi3"]
TRAINED_ON = {"use_cache": False}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(length: int = 16, seed: int = 0, size: int = 2) -> dict[str, Any]:
    ids = torch.randint(1, 100, (size, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, **TRAINED_ON}


def model(name: str, *, lora: float | None = None, **kwargs: Any) -> nn.Module:
    """A preset, bare or with LoRA on every linear layer, B random; ``lora`` is its dropout."""
    built = presets.build(name, **kwargs)
    if lora is not None:
        peft = pytest.importorskip("peft", reason="needs peft")
        config = peft.LoraConfig(r=4, lora_dropout=lora, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        built = peft.get_peft_model(built, config)
    return built.train()


def step(run: Any, owner: nn.Module, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    owner.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = run(**inputs).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def assert_same(ours: Any, eager: Any, loss_tolerance: float = 1e-5, tolerance: float = 1e-4) -> None:
    assert abs(ours[0] - eager[0]) <= loss_tolerance * abs(eager[0])
    assert ours[1].keys() == eager[1].keys() and eager[1]
    for name, gradient in eager[1].items():
        assert gradient.norm() > 0, name
        assert (ours[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("lora", [None, 0.0, 0.1], ids=["bare", "lora", "lora-dropout"])
@pytest.mark.parametrize("name", TINY)
def test_eager_lowering_equals_eager(name: str, lora: float | None) -> None:
    owner = model(name, lora=lora)
    reports: list[GraphReport] = []
    run = compiled(owner, Options(strict=True, lowering="eager"), reports)
    assert_same(step(run, owner, batch()), step(owner, owner, batch()))
    (report,) = reports
    counts = {p.name: len(p.rewritten) for p in report.passes}
    assert counts["rms_norm"] >= 5 and counts["rope"] == 2 and counts["glu"] == 2
    assert report.fallback is None


@pytest.mark.parametrize(
    ("name", "lora", "budget"),
    [("tiny-llama", 0.1, None), ("tiny-qwen3", None, 0), ("tiny-gemma2", 0.0, None), ("tiny-phi3", 0.1, 0)],
)
def test_inductor_lowering_equals_eager(name: str, lora: float | None, budget: int | None) -> None:
    owner = model(name, lora=lora)
    reports: list[GraphReport] = []
    inputs = packed() if name == "tiny-qwen3" else batch()  # documents are found there, and recomputed under no budget
    with torch._inductor.config.patch(fallback_random=True):
        run = compiled(owner, Options(strict=True, memory_budget=budget), reports)
        assert_same(step(run, owner, inputs), step(owner, owner, inputs))
    plan = reports[0].partitioner.last_plan
    assert plan.policy == ("keep" if budget is None else "recompute") and plan.saved_bytes > 0


def test_a_note_that_transformers_makes_once_ends_no_graph() -> None:
    logger = transformers_logging.get_logger("transformers.noted")

    class Noted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            logger.warning_once("a loss that the configuration does not name")
            return y.sum()

    owner, x = Noted(3, 2), torch.randn(4, 3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(owner, backend="unsloth", options={"lowering": "eager", "strict": True}, fullgraph=True)
    torch.testing.assert_close(run(x), owner(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # What PyTorch writes into its log of each compilation; an error there is printed, and ends nothing.
    noted = torch._dynamo.config.get_config_copy()["ignore_logging_functions"]
    assert json.loads(json.dumps(noted)) == ["info_once", "warning_once"]


@pytest.mark.parametrize("size", [2, 3])
def test_two_graphs_serve_ten_lengths(size: int) -> None:
    owner = model("tiny-llama", lora=0.0)
    reports: list[GraphReport] = []
    run = compiled(owner, Options(strict=True, lowering="eager"), reports)
    for length in (16, 17, 23, 31, 32, 33, 40, 48, 57, 64):
        inputs = batch(length, size=size)
        assert_same(step(run, owner, inputs), step(owner, owner, inputs))
    assert len(reports) <= 2


@pytest.mark.parametrize(("padding", "kept"), [("any", True), ("right", False)])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-phi3"])
def test_padded_batch_equals_eager(name: str, padding: Any, kept: bool) -> None:
    """Loss and every gradient, with the mask and without it under the promise that padding is on the right."""
    owner = model(name)
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 11:] = 0
    inputs |= {"attention_mask": mask, "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}
    run = compiled(owner, Options(strict=True, lowering="eager", padding=padding), reports := [])
    assert_same(step(run, owner, inputs), step(owner, owner, inputs))
    masks = [site.detail for p in reports[0].passes for site in p.rewritten if site.operator == "attention"]
    assert masks == ["the mask is kept: depends on the input attention_mask (padding)" if kept else "causal"] * 2


def test_a_batch_padded_on_the_left_equals_eager() -> None:
    owner = model("tiny-llama")
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :5] = 0
    inputs |= {"attention_mask": mask, "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}
    run = compiled(owner, Options(strict=True, lowering="eager"), [])
    assert_same(step(run, owner, inputs), step(owner, owner, inputs))


def packed(length: int = 16) -> dict[str, Any]:
    """Two rows of two documents."""
    positions = [torch.cat([torch.arange(n), torch.arange(length - n)]) for n in (6, 9)]
    return {**batch(length), "position_ids": torch.stack(positions)}


def test_packed_batch_equals_eager() -> None:
    """The second length takes a graph whose sizes are symbolic, in which no mask is left either."""
    owner = model("tiny-llama")
    run = compiled(owner, Options(strict=True, lowering="eager"), reports := [])
    for length in (16, 21):
        inputs = packed(length)
        together = step(run, owner, inputs)
        assert_same(together, step(owner, owner, inputs))
        assert abs(together[0] - step(owner, owner, batch(length))[0]) > 1e-6  # the documents do matter
    assert len(reports) == 2
    for report in reports:
        (attention,) = (p for p in report.passes if p.name == "attention")
        assert [s.detail for s in attention.rewritten] == ["causal ∧ documents"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["adapters", "a window", "packed"])
def test_autocast_equals_eager(case: str, dtype: torch.dtype) -> None:
    owner = model("tiny-llama", lora=0.0) if case == "adapters" else model("tiny-mistral")
    inputs = packed(40) if case == "packed" else batch(24)  # longer than the window
    run = compiled(owner, Options(strict=True, lowering="eager"), reports := [])

    def under(function):
        def call(**inputs):
            with torch.autocast("cpu", dtype=dtype):
                return function(**inputs)

        return call

    # Summation orders differ in the low precision; float32 eager is the truth that both are compared with.
    truth = step(owner, owner, inputs)
    eager, ours = step(under(owner), owner, inputs), step(under(run), owner, inputs)
    assert all(len(p.rewritten) == 2 for r in reports for p in r.passes if p.name == "attention")
    for name, gradient in truth[1].items():
        error = [float((s[1][name] - gradient).norm() / gradient.norm()) for s in (ours, eager)]
        assert error[0] <= 1.2 * error[1] + 4 * torch.finfo(dtype).eps, (name, error)


def test_gradient_checkpointing_is_inlined() -> None:
    owner = model("tiny-llama")
    owner.gradient_checkpointing_enable({"use_reentrant": False})
    run = compiled(owner, Options(strict=True, lowering="eager"), reports := [])
    assert_same(step(run, owner, batch()), step(owner, owner, batch()))
    assert len(reports[0].rewritten) >= 9


def test_options_are_checked() -> None:
    owner = model("tiny-llama")
    with pytest.raises(Exception, match="did you mean 'memory_budget'") as error:
        torch.compile(owner, backend=backend_module.unsloth, options={"memory_buget": 1})(**batch())
    assert isinstance(error.value, OptionError) or "OptionError" in str(error.value)


def test_a_disabled_pass_leaves_its_formula_alone() -> None:
    owner = model("tiny-llama")
    run = compiled(owner, Options(strict=True, lowering="eager", disable=("rope",)), reports := [])
    assert_same(step(run, owner, batch()), step(owner, owner, batch()))
    assert "rope" not in {p.name for p in reports[0].passes}


def test_dropped_logits() -> None:
    owner = model("tiny-llama")
    run = compiled(owner, Options(strict=True, lowering="eager", logits="drop"), [])
    assert_same(step(run, owner, batch()), step(owner, owner, batch()))
    logits = run(**batch()).logits
    assert isinstance(logits, DroppedLogits) and logits.shape == owner(**batch()).logits.shape
    with pytest.raises(DroppedLogitsError, match="keep"):
        logits + 1
    # Without a loss the logits are what the caller is after.
    only = {k: v for k, v in batch().items() if k != "labels"}
    torch.testing.assert_close(run(**only).logits, owner(**only).logits)


def test_dropped_logits_know_their_symbolic_shape() -> None:
    owner = model("tiny-llama")
    run = compiled(owner, Options(strict=True, lowering="eager", logits="drop"), [])
    for length in (16, 17, 23):
        assert run(**batch(length)).logits.shape == (2, length, owner.config.vocab_size)


# -- the backend never makes a working model fail ---------------------------------------------------------------------

STAGES = ["retrace", "run_passes", "lower"]


def injected(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(backend_module, stage, fail)


def warned(run: Any, owner: nn.Module) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = step(run, owner, batch())
    return result, [str(w.message) for w in caught if issubclass(w.category, CompilerWarning)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_stage_leaves_the_graph_to_what_is_left(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = model("tiny-llama", lora=0.0)
    injected(stage, monkeypatch)
    result, messages = warned(compiled(owner, Options(lowering="eager"), reports := []), owner)
    assert_same(result, step(owner, owner, batch()))
    assert messages == ["unsloth: a graph is left to Inductor as it is: ZeroDivisionError: deliberate"]
    assert reports[0].fallback == "ZeroDivisionError: deliberate"


@pytest.mark.parametrize("stage", STAGES)
def test_strict_raises_instead(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = model("tiny-llama")
    injected(stage, monkeypatch)
    with pytest.raises(Exception, match="deliberate"):
        compiled(owner, Options(lowering="eager", strict=True), [])(**batch())


@pytest.fixture(scope="module")
def whole() -> tuple[Any, list[GraphReport]]:
    """A step with every pass, and what they did."""
    owner = model("tiny-llama", lora=0.0)
    result = step(compiled(owner, Options(lowering="eager", logits="drop"), reports := []), owner, batch())
    return result, reports


@pytest.mark.parametrize("index", range(len(RECOGNISERS)))
def test_a_failing_pass_leaves_the_others(index: int, whole: tuple[Any, list[GraphReport]]) -> None:
    owner = model("tiny-llama", lora=0.0)
    passes = list(RECOGNISERS)
    passes[index] = Raising(passes[index].name)
    expected, complete = whole
    result, messages = warned(compiled(owner, Options(lowering="eager", logits="drop"), reports := [], passes), owner)
    assert_same(result, expected)
    assert_same(result, step(owner, owner, batch()))
    assert messages == [f"unsloth: pass {passes[index].name} was left out: ValueError: deliberate"]
    fused = {
        "lora_linear": {"lora_linears"},
        "rms_norm": {"add_rms_norm"},
    }  # without the operators there is nothing to fuse
    others = [r.name for r in RECOGNISERS if r.name not in {passes[index].name, *fused.get(passes[index].name, ())}]
    counts = [[len(p.rewritten) for p in r.passes if p.name in others] for r in (reports[0], complete[0])]
    assert counts[0] == counts[1] and sum(map(bool, counts[0])) >= len(others) - 1  # no weights of 4 bits here


def test_a_failing_memory_plan_leaves_the_partition_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from unsloth.passes.memory.partition import Partitioner

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(Partitioner, "choose", fail)
    owner = model("tiny-llama")
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        result, messages = warned(compiled(owner, Options(), []), owner)
    assert_same(result, step(owner, owner, batch()))
    assert messages == ["unsloth: the memory plan was left out: ZeroDivisionError: deliberate"]


def test_a_kernel_that_fails_is_switched_off_and_the_graph_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from unsloth.kernels.operator import OPERATORS, KernelWarning

    operator = OPERATORS["swiglu"]
    monkeypatch.setattr(operator, "devices", ("cpu",))

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(operator, "forward", fail)
    monkeypatch.setattr(operator, "disabled", None)
    owner = model("tiny-llama")
    reports: list[GraphReport] = []
    run = compiled(owner, Options(strict=True, lowering="eager"), reports)
    with pytest.warns(KernelWarning, match="swiglu kernel failed and is switched off: RuntimeError: no such"):
        first = step(run, owner, batch())
    assert_same(first, step(owner, owner, batch()))
    assert_same(step(run, owner, batch()), step(owner, owner, batch()))
    glu = [next(p for p in r.passes if p.name == "glu") for r in reports]
    assert [len(p.rewritten) for p in glu] == [2, 0]
    assert "switched off" in glu[1].missed[0].detail


def test_the_backend_is_found_by_its_name() -> None:
    assert "unsloth" in torch._dynamo.list_backends()
    owner = model("tiny-llama")
    run = torch.compile(owner, backend="unsloth", options={"strict": True, "lowering": "eager"})
    assert_same(step(run, owner, batch()), step(owner, owner, batch()))


def test_evaluation_without_gradients() -> None:
    owner = model("tiny-llama").eval()
    run = compiled(owner, Options(strict=True), [])
    with torch.no_grad():
        torch.testing.assert_close(run(**batch()).loss, owner(**batch()).loss)


def test_compile_graph_reports_what_it_did() -> None:
    seen: list[GraphReport] = []
    owner = model("tiny-llama")

    def backend(gm: Any, example_inputs: Any) -> Any:
        return compile_graph(gm, example_inputs, Options(lowering="eager"), observe=seen.append)

    torch.compile(owner, backend=backend)(**batch())
    assert seen[0].capture_seconds > 0 and seen[0].nodes[0] > seen[0].nodes[1] > 0


# -- sizes that are read off data --------------------------------------------------------------------------------------


def _gated_pieces(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Pieces of a row, as many as there are lengths, each through a gated activation."""
    pieces = torch.split(x, lengths.tolist())
    gated = [torch.nn.functional.silu(p[:, :4]) * p[:, 4:] * (i + 1) for i, p in enumerate(pieces)]
    return torch.cat(gated).square().sum()


def test_sizes_in_data_stay_in_the_graph() -> None:
    reports: list[GraphReport] = []
    run = compiled(_gated_pieces, Options.parse({"strict": True, "lowering": "eager"}), reports)
    with sizes_in_graph():
        for lengths in ([2, 5], [4, 3], [1, 6]):
            gradients = []
            for function in (run, _gated_pieces):
                x = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
                function(x, torch.tensor(lengths)).backward()
                gradients.append(x.grad)
            torch.testing.assert_close(*gradients)
    assert len(reports) == 1
    assert [s.operator for s in reports[0].rewritten] == ["glu", "glu"]


def test_a_graph_without_tensors_is_left_alone() -> None:
    """Between two graph breaks there may be arithmetic on sizes only."""
    reports: list[GraphReport] = []
    run = compiled(lambda n: torch.arange(n) + 1, Options.parse({"strict": True, "lowering": "eager"}), reports)
    for size in (5, 6, 7):
        assert run(size).tolist() == list(range(1, size + 1))
    assert reports and not any(report.passes for report in reports)
