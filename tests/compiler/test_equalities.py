"""What training adds around a step: compiled and eager stay the same under each of it. A tiny Llama with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiler.test_backend import assert_same, batch, model, step
from unsloth.compiler.backend import compile_graph
from unsloth.compiler.options import Options
from unsloth.compiler.report import GraphReport
from unsloth.compiler.run import compiled

EAGER = Options(strict=True, lowering="eager")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_dynamic_sizes_from_the_first_step() -> None:
    owner = model("tiny-llama", lora=0.0)
    reports: list[GraphReport] = []

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_graph(gm, inputs, EAGER, observe=reports.append)

    run = torch.compile(owner, backend=backend, dynamic=True)
    for length, size in ((16, 2), (23, 3), (40, 4)):
        inputs = batch(length, size=size)
        assert_same(step(run, owner, inputs), step(owner, owner, inputs))
    (report,) = reports
    counts = {p.name: len(p.rewritten) for p in report.passes}
    assert counts["lora_linear"] == 14 and counts["rms_norm"] == 5 and counts["rope"] == counts["glu"] == 2


def test_two_graphs_serve_twenty_lengths_and_three_batch_sizes() -> None:
    owner = model("tiny-llama", lora=0.0)
    reports: list[GraphReport] = []
    run = compiled(owner, EAGER, reports)
    for index, length in enumerate(range(9, 69, 3)):
        inputs = batch(length, seed=index, size=2 + index % 3)
        assert_same(step(run, owner, inputs), step(owner, owner, inputs))
    assert len(reports) == 2  # for the first shape, for any: Dynamo takes for symbolic what has changed so far


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    owner = model("tiny-llama", lora=0.1)
    owner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    owner.enable_input_require_grads()  # without it a reentrant checkpoint trains no adapter, in eager either
    run = compiled(owner, EAGER, reports := [])
    assert_same(step(run, owner, batch()), step(owner, owner, batch()))
    assert sum(len(r.rewritten) for r in reports) > 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_and_adapter_dropout(implementation: str) -> None:
    owner = model("tiny-llama", lora=0.1, attn_implementation=implementation)
    for module in owner.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    with torch._inductor.config.patch(fallback_random=True):
        run = compiled(owner, EAGER, [])
        ours, eager = step(run, owner, batch()), step(owner, owner, batch())
    assert_same(ours, eager)
    calm = step(owner.eval(), owner, batch())
    assert abs(calm[0] - eager[0]) > 1e-4  # dropout was on


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_of_the_optimiser_under_autocast_with_a_gradient_scaler(dtype: torch.dtype) -> None:
    """Three steps: the scale, the adapters after each and whether a step was skipped are eager's."""

    def train(compile_it: Callable[[nn.Module], Any]) -> tuple[list[float], dict[str, torch.Tensor], float]:
        owner = model("tiny-llama", lora=0.0)
        run = compile_it(owner)
        trained = {n: p for n, p in owner.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1, enabled=dtype == torch.float16)
        losses = []
        for seed in range(3):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = run(**batch(seed=seed)).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser) if scaler.is_enabled() else None
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            scaler.step(optimiser)
            scaler.update()
            losses.append(float(loss.detach()))
        return losses, {n: p.detach().clone() for n, p in trained.items()}, scaler.get_scale()

    eager, ours = train(lambda owner: owner), train(lambda owner: compiled(owner, EAGER, []))
    assert ours[2] == eager[2]
    if dtype == torch.float16:
        assert eager[2] < 2.0**27  # the first scale overflows float16: not every step made the scale grow
    rounding = torch.finfo(dtype).eps
    for a, b in zip(ours[0], eager[0], strict=True):
        assert abs(a - b) <= 4 * rounding * abs(b)
    for name, value in eager[1].items():
        assert (ours[1][name] - value).norm() <= 8 * rounding * value.norm(), name


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_grad_modes(context: Any) -> None:
    owner = model("tiny-llama", lora=0.0).eval()
    run = compiled(owner, EAGER, [])
    with context():
        ours, eager = run(**batch()), owner(**batch())
    torch.testing.assert_close(ours.logits, eager.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, eager.loss)
