"""`explain` says what was recognised and what was not; `verify` notices a wrong gradient and names the pass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from unsloth import explain, verify
from unsloth.compiler.batches import packed, padded
from unsloth.compiler.options import OptionError, Options
from unsloth.compiler.run import BatchError, compiled
from unsloth.kernels.operator import operator
from unsloth.models import presets
from unsloth.passes.recognise import RECOGNISERS
from unsloth.passes.rewrite import Match, Miss


def batch() -> dict[str, Any]:
    ids = torch.randint(1, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_explain_counts_every_operator() -> None:
    explanation = explain(presets.build("tiny-llama"), batch())
    found = {"rms_norm": (5, 5), "rope": (2, 2), "glu": (2, 2), "attention": (2, 2), "linear_cross_entropy": (0, 1)}
    found["add_rms_norm"] = (3, 3)
    none = dict.fromkeys(("nf4", "lora_linear", "lora_linears"), (0, 0))
    assert explanation.counts == {**none, **found}
    text = str(explanation)
    assert 'the logits are returned as well; options={"logits": "drop"} leaves them out' in text
    assert "LlamaForCausalLM, all parameters trained, float32     1 graph, 0 breaks" in text
    assert "2/2" in text and "round, then scale" in text


def test_explain_shows_near_misses_with_reason_and_source_line() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.head = nn.Linear(8, 1)

        def forward(self, x):
            variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
            y = self.weight * (x * torch.rsqrt(variance + 1e-6))
            return self.head(y).sum()

    explanation = explain(Norm(), (torch.randn(2, 8),))
    (miss,) = explanation.missed
    assert miss.operator == "rms_norm" and miss.detail == "x is not the same value twice"
    assert (miss.source_line or "").startswith("test_explain_verify.py:")
    assert "missed      rms_norm in graph: x is not the same value twice  (test_explain_verify.py:" in str(explanation)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Scattered(nn.Module):
    """Indexes with tuples of tensors of one number each, whose data Dynamo asks for and does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Scaled(4, 4)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(x.shape[:2], dtype=torch.bool)
        rows, columns = zip(*places, strict=True)
        seen[rows, columns] = False
        return (self.body(x) * seen[..., None]).square().sum()


def test_what_dynamo_fails_on_runs_as_written_and_is_explained() -> None:
    model, arguments = Scattered(), (torch.randn(2, 5, 4), torch.tensor([[0, 1], [1, 3]]))
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="not allocated"):
        torch.compile(model, backend="eager")(*arguments)  # with which it has nothing to do here
    explanation = explain(model, arguments, options={"strict": True})
    (failed,) = explanation.breaks
    assert "setitem" in failed.cause and "torch.stack" in failed.remedy
    assert (failed.source_line or "").startswith("test_explain_verify.py:")
    assert len(explanation.graphs) == 1  # of the body, which is called from there
    assert verify(model, arguments, options={"lowering": "eager"}).ok
    assert not torch._dynamo.config.suppress_errors


def test_what_the_backend_raises_is_not_taken_for_dynamos() -> None:
    class Failing:
        name = "failing"

        def find(self, *_: Any) -> list[Match | Miss]:
            raise ArithmeticError("no rule for this")

    run = compiled(nn.Linear(4, 4), Options(strict=True, lowering="eager"), [], recognisers=[Failing()])
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no rule for this"):
        run(torch.ones(2, 4))
    assert not torch._dynamo.config.suppress_errors


def test_explain_leaves_the_model_as_it_was() -> None:
    model = presets.build("tiny-llama")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    explain(model, batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2"])
def test_verify_accepts_the_same_step(name: str) -> None:
    result = verify(presets.build(name).train(), batch(), options={"lowering": "eager"})
    assert result.ok and result.first_deviation is None and not result.missing
    assert "same training step" in str(result) and len(result.gradients) > 10


def test_verify_in_bfloat16_compares_with_a_float32_run() -> None:
    result = verify(presets.build("tiny-llama", dtype=torch.bfloat16), batch(), options={"lowering": "eager"})
    assert result.ok and result.loss_float32 is not None


def test_verify_keeps_gradients_and_random_state() -> None:
    model = presets.build("tiny-llama")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    verify(model, batch(), options={"lowering": "eager"})
    assert torch.equal(torch.get_rng_state(), state)
    assert float(model.lm_head.weight.grad.min()) == 1.0 and model.model.norm.weight.grad is None


def _wrong(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def _wrong_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, needs: list[bool]) -> Any:
    return grad * up, grad * torch.nn.functional.silu(gate)  # the derivative of silu is forgotten


wrong_glu = operator(
    "wrong_glu(Tensor gate, Tensor up) -> (Tensor y)",
    reference=_wrong,
    reference_backward=_wrong_backward,
    forward=_wrong,
    backward=_wrong_backward,
    saves="gate up",
    differentiable="gate up",
    gradients_of="y",
    supports=lambda gate, up: None,
    flops=lambda gate, up: gate.numel(),
    backward_flops=lambda gate, up: gate.numel(),
)


@dataclasses.dataclass
class WrongAt:
    """A right pass with the wrong backward at the places that ``wrong`` says, counted in graph order."""

    name: str
    wrong: frozenset[int]

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        (right,) = (r for r in RECOGNISERS if r.name == self.name)
        for index, item in enumerate(right.find(graph)):
            yield dataclasses.replace(item, operator=wrong_glu) if index in self.wrong else item


@pytest.mark.parametrize(("wrong", "module"), [({0, 1}, "model.layers.0.mlp"), ({1}, "model.layers.1.mlp")])
def test_verify_names_the_place(wrong: set[int], module: str) -> None:
    """The loss is right, one place of one pass is not: operator, module and line are named."""
    passes = [WrongAt("glu", frozenset(wrong)) if r.name == "glu" else r for r in RECOGNISERS]
    result = verify(presets.build("tiny-llama"), batch(), options={"lowering": "eager"}, recognisers=passes)
    assert not result.ok and abs(result.loss_compiled - result.loss_eager) < 1e-5
    assert result.first_deviation == "pass glu"
    assert "NOT the same training step" in str(result) and "first after pass glu" in str(result)
    culprit = result.culprit
    assert culprit is not None and (culprit.operator, culprit.module, culprit.detail) == ("glu", module, "swiglu")
    assert (culprit.source_line or "").startswith("modeling_llama.py:")
    assert f"culprit   glu (swiglu) in {module}, modeling_llama.py:" in str(result)


def test_verify_names_a_place_among_many() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
            self.ups = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

        def forward(self, x):
            for gate, up in zip(self.gates, self.ups, strict=True):
                x = x + torch.nn.functional.silu(gate(x)) * up(x)
            return x.square().mean()

    verifying = sys.modules["unsloth.compiler.verify"]
    steps = []
    passes = [WrongAt("glu", frozenset({5, 7}))]
    with pytest.MonkeyPatch.context() as patch:
        right = verifying._compiled_step
        patch.setattr(verifying, "_compiled_step", lambda *args: steps.append(args) or right(*args))
        result = verify(Deep(), (torch.randn(2, 4),), options={"lowering": "eager"}, recognisers=passes)
    (line,) = {s.source_line for s in explain(Deep(), (torch.randn(2, 4),)).rewritten}
    assert result.culprit is not None and result.culprit.source_line == line
    assert len(steps) <= 9  # 2 to find the pass, log₂ 9 to find the place
    sites = [s.nodes for s in explain(Deep(), (torch.randn(2, 4),)).rewritten]
    assert result.culprit.nodes == sites[5]


def test_a_step_that_trains_nothing_is_not_ok() -> None:
    class Still(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum() * 0.0

    result = verify(Still(4, 4), (torch.ones(2, 4),), options={"lowering": "eager"})
    assert not result.ok and result.grad_norm == 0 and "such a step trains nothing" in str(result)


@pytest.mark.parametrize("shape", [packed, padded])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-gemma2"])
def test_verify_of_packed_and_padded_batches(name: str, shape: Any) -> None:
    result = verify(presets.build(name).train(), shape(batch()), options={"lowering": "eager"})
    assert result.ok and result.grad_norm > 0, result


def test_verify_is_not_fooled_by_nan() -> None:
    from unsloth.compiler.verify import _compare

    nan = float("nan"), {"w": torch.full((2,), float("nan"))}
    good = 1.0, {"w": torch.ones(2)}
    assert not _compare(nan, good, good, 1e-4).ok
    assert not _compare((float("nan"), good[1]), good, good, 1e-4).ok
    assert _compare(good, good, good, 1e-4).ok


def test_verify_notices_a_vanished_gradient() -> None:
    from unsloth.compiler.verify import _compare

    good = 1.0, {"w": torch.ones(2), "v": torch.ones(2)}
    assert _compare((1.0, {"w": torch.ones(2)}), good, good, 1e-4).missing == ["v"]
    assert _compare((1.0, {"w": torch.ones(2), "v": torch.zeros(2)}), good, good, 1e-4).missing == ["v"]


def test_bad_input_is_named() -> None:
    model = presets.build("tiny-llama")
    with pytest.raises(BatchError, match="no scalar loss"):
        explain(model, {"input_ids": batch()["input_ids"]})
    with pytest.raises(OptionError, match="did you mean 'strict'"):
        verify(model, batch(), options={"strickt": True})
