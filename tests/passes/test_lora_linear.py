"""LoRA on a frozen linear layer: PEFT's graphs, in every precision that people train in, and what only resembles it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import chain
from statistics import median
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu

from tests.passes.recognising import LENGTH, assert_misses, assert_rewrites, find
from tests.tracing import trace
from unsloth.compiler.capture import retrace
from unsloth.models import presets
from unsloth.models.dora import make_dora_traceable
from unsloth.passes.recognise.lora_linear import RECOGNISER
from unsloth.passes.rewrite import Match, Miss
from unsloth.passes.runner import PassReport, run_passes

Function = Callable[..., Any]


def as_peft(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return linear(x, weight) + linear(linear(x, A), B) * 2.0


def with_bias(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias) + linear(linear(x, A), B) * 2.0


def commuted(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return 2 * linear(linear(x, A), B) + linear(x, weight)


def scaled_before(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return linear(x, weight) + linear(0.5 * linear(x, A), B)


def not_scaled(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return linear(x, weight) + linear(linear(x, A), B)


def copied(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    base = linear(x, weight).clone()  # as PEFT treats 4-bit layers
    return base + (linear(linear(x, A), B) * 2.0).to(base.dtype)


def on_another_input(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return linear(x, weight) + linear(linear(relu(x), A), B) * 2.0


SCALES = {
    as_peft: 2.0,
    with_bias: 2.0,
    commuted: 2.0,
    scaled_before: 0.5,
    not_scaled: 1.0,
    copied: 2.0,
    on_another_input: 2.0,
}
functions = pytest.mark.parametrize("function", SCALES, ids=lambda f: f.__name__)


def inputs(function: Function = as_peft, dtype: torch.dtype = torch.float32, adapter: Any = None) -> list[Tensor]:
    """x, a frozen weight, A, B and for ``with_bias`` a bias; all but the weight want a gradient."""
    adapter = adapter or dtype
    tensors = [
        torch.randn(2, LENGTH, 24, dtype=dtype, requires_grad=True),
        torch.randn(40, 24, dtype=dtype),
        torch.randn(3, 24, dtype=adapter, requires_grad=True),
        torch.randn(40, 3, dtype=adapter, requires_grad=True),
    ]
    return [*tensors, torch.randn(40, dtype=dtype, requires_grad=True)] if function is with_bias else tensors


# -- formulas ----------------------------------------------------------------------------------------------------------


@functions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rewrites_float32(function: Function, dynamic: bool) -> None:
    assert_rewrites(RECOGNISER, function, *inputs(function), to="lora_linear", dynamic=dynamic)


@functions
def test_rewrites_bfloat16(function: Function) -> None:
    assert_rewrites(RECOGNISER, function, *inputs(function, torch.bfloat16), to="lora_linear", tolerance=2e-2)


@functions
def test_arguments(function: Function) -> None:
    (match,) = find(RECOGNISER, function, *inputs(function))
    assert isinstance(match, Match)
    names = [None if a is None else str(a.target) for a in match.args[:-1]]
    bias = "L_bias_" if function is with_bias else None
    assert names[0] == "L_x_" and names[2:] == ["L_weight_", bias, "L_A_", "L_B_"]
    assert (names[1] is not None) == (function is on_another_input)
    assert match.args[-1] == SCALES[function] and isinstance(match.args[-1], float)


def test_projections_of_one_input() -> None:
    def two(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return as_peft(x, weight, A, B) * silu(as_peft(x, weight + 1, 2 * A, 3 * B))

    assert_rewrites(RECOGNISER, two, *inputs(), to="lora_linear", count=2)


def test_the_conversion_after_it_is_not_its_own() -> None:
    assert_rewrites(RECOGNISER, lambda x, w, A, B: as_peft(x, w, A, B).double(), *inputs(), to="lora_linear")


# -- types -------------------------------------------------------------------------------------------------------------


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_converts_what_the_operator_reads(function: Function, dtype: torch.dtype) -> None:
    tensors = inputs(function, dtype, adapter=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_rewrites(RECOGNISER, function, *tensors, to="lora_linear", tolerance=2e-2)
        (match,) = find(RECOGNISER, function, *tensors)
        assert isinstance(match, Match) and match.anchor.meta["val"].dtype == torch.bfloat16


def widened(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return linear(x, weight) + linear(linear(x.float(), A), B) * 2.0


def narrowed(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return linear(x.bfloat16(), weight) + linear(linear(x, A), B) * 2.0


@pytest.mark.parametrize(("function", "dtype"), [(widened, torch.bfloat16), (narrowed, torch.float32)])
def test_the_adapter_reads_x_whichever_way_autocast_gets_there(function: Function, dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype, adapter=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (match,) = find(RECOGNISER, function, *tensors)
        assert isinstance(match, Match) and match.args[1] is None
        assert_rewrites(RECOGNISER, function, *tensors, to="lora_linear", variant="adapter on x", tolerance=2e-2)


def test_x_rounded_for_the_base_product_alone_is_another_input() -> None:
    variant = "adapter on another input"
    with torch.autocast("cpu", torch.float16):
        assert_rewrites(RECOGNISER, narrowed, *inputs(), to="lora_linear", variant=variant, tolerance=1e-2)


def test_a_lossy_conversion_is_another_input() -> None:
    def narrowed_twice(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear(x, weight) + linear(linear(x.bfloat16().float(), A), B) * 2.0

    assert_rewrites(RECOGNISER, narrowed_twice, *inputs(), to="lora_linear", variant="adapter on another input")


def test_a_conversion_without_gradient_is_refused() -> None:
    """It would be the same value, but x would get the adapter's gradient too."""

    def half_detached(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with torch.no_grad():
            wide = x.float()
        return linear(x, weight) + linear(linear(wide, A), B) * 2.0

    with torch.autocast("cpu", torch.bfloat16):
        reason = refusal(half_detached, *inputs(dtype=torch.bfloat16, adapter=torch.float32))
    assert "a change of grad mode" in reason


def test_float32_adapters_without_autocast_are_refused() -> None:
    def rounded(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return widened(x, weight, A, B).to(x.dtype)

    report = refusal(rounded, *inputs(dtype=torch.bfloat16, adapter=torch.float32))
    assert report == "A is torch.float32 and x is torch.bfloat16"


def test_a_wider_result_is_refused() -> None:
    tensors = inputs(dtype=torch.bfloat16, adapter=torch.float32)
    assert_misses(RECOGNISER, widened, *tensors, because="the result is torch.float32 and the base product is torch.bf")


# -- what it is not ----------------------------------------------------------------------------------------------------


def refusal(function: Function, *tensors: Tensor) -> str:
    """The reason of the one match that the rewriter refuses."""
    _, (report,) = run_passes(trace(function, *tensors), [RECOGNISER], strict=True)
    (site,) = report.missed
    assert not report.rewritten
    return site.detail


def test_a_trained_base_weight_is_refused() -> None:
    x, weight, A, B = inputs()
    assert_misses(RECOGNISER, as_peft, x, weight.requires_grad_(), A, B, because="the base weight is trained too")


def test_a_base_weight_computed_from_a_trained_one_is_refused() -> None:
    def masked(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return as_peft(x, (2 * weight).double().float(), A, B)

    x, weight, A, B = inputs()
    assert_misses(RECOGNISER, masked, x, weight.requires_grad_(), A, B, because="the base weight is trained too")


def test_frozen_adapters_are_still_adapters() -> None:
    x, weight, A, B = inputs()
    assert_rewrites(RECOGNISER, as_peft, x, weight, A.detach(), B.detach(), to="lora_linear")


def dora(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
    base = linear(x, weight)
    return base + ((magnitude - 1) * base + magnitude * linear(linear(x, A), B) * 2.0)


def dora_with_bias(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, bias: Tensor) -> Tensor:
    base = linear(x, weight, bias)
    return base + ((magnitude - 1) * (base - bias) + magnitude * linear(linear(x, A), B) * 2.0)


def dora_with_a_magnified_bias(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, bias: Tensor
) -> Tensor:
    base = linear(x, weight, bias)
    return base + ((magnitude - 1) * base + magnitude * linear(linear(x, A), B) * 2.0)


def with_magnitude(function: Function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    magnitude = (torch.rand(1, 40, dtype=dtype) + 0.5).requires_grad_()
    return [*inputs(dtype=dtype), magnitude, *([] if function is dora else [torch.randn(40, dtype=dtype)])]


@pytest.mark.parametrize("function", [dora, dora_with_bias, dora_with_a_magnified_bias])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_an_adapted_layer_times_its_magnitude(function: Function, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    given = with_magnitude(function, dtype)
    assert_rewrites(RECOGNISER, function, *given, to="lora_linear", variant="DoRA", tolerance=tolerance)


def test_dora_with_a_magnitude_per_token_is_refused() -> None:
    magnitude = torch.rand(2, LENGTH, 40, requires_grad=True)
    assert_misses(RECOGNISER, dora, *inputs(), magnitude, because="not one value per feature")


def test_dora_without_something_else_is_refused() -> None:
    def less(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, bias: Tensor) -> Tensor:
        base = linear(x, weight)
        return base + ((magnitude - 1) * (base - bias) + magnitude * linear(linear(x, A), B) * 2.0)

    assert_misses(RECOGNISER, less, *with_magnitude(less), because="is not its bias")


def test_dora_of_two_base_products_is_refused() -> None:
    def dropped(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        z = relu(x)  # as with dropout
        return linear(x, weight) + ((magnitude - 1) * linear(z, weight) + magnitude * linear(linear(z, A), B) * 2.0)

    (miss,) = find(RECOGNISER, dropped, *with_magnitude(dora))
    assert isinstance(miss, Miss) and "not the same value twice" in miss.reason, miss


def test_dora_of_another_sum_is_refused() -> None:
    def once(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        return (magnitude - 1) * linear(x, weight) + magnitude * linear(linear(x, A), B) * 2.0

    assert_misses(RECOGNISER, once, *with_magnitude(dora), because="scaled by a tensor")


def test_a_learned_scale_is_refused() -> None:
    def learned(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        return linear(x, weight) + linear(linear(x, A), B) * scale

    assert_misses(RECOGNISER, learned, *inputs(), torch.ones((), requires_grad=True), because="scaled by a tensor")


def test_a_scale_that_is_not_known_is_refused() -> None:
    def scaled(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear(x, weight) + linear(linear(x, A), B) * x.shape[1]

    x, *rest = inputs()
    torch._dynamo.mark_dynamic(x, 1)
    assert_misses(RECOGNISER, scaled, x, *rest, because="the scale is not known when compiling")


def test_bias_of_the_adapter_is_refused() -> None:
    def biased(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight) + linear(linear(x, A), B, bias) * 2.0

    assert_misses(RECOGNISER, biased, *inputs(), torch.randn(40, requires_grad=True), because="B has a bias")


def test_an_update_of_anything_else_is_refused() -> None:
    def residual(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x + linear(linear(x, A), B) * 2.0

    tensors = torch.randn(2, LENGTH, 24), torch.randn(3, 24), torch.randn(24, 3)
    assert_misses(RECOGNISER, residual, *tensors, because="not added to the product of a linear layer")


def test_one_input_for_all_rows_is_refused() -> None:
    def shared(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear(x, weight) + linear(linear(x[:1], A), B) * 2.0

    assert "not known to be of one shape" in refusal(shared, *inputs())


@pytest.mark.parametrize("inner", ["base", "xa", "update"])
def test_inner_values_used_outside(inner: str) -> None:
    def leaking(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        base, xa = linear(x, weight), linear(x, A)
        update = linear(xa, B)
        return base + update * 2.0, {"base": base, "xa": xa, "update": update}[inner] * 3.0

    assert "used outside" in refusal(leaking, *inputs())


def test_other_sums_are_not_reported() -> None:
    others: list[Function] = [
        lambda x, w, A, B: linear(x, w) + linear(silu(linear(x, A)), B) * 2.0,
        lambda x, w, A, B: linear(x, w) - linear(linear(x, A), B) * 2.0,
        lambda x, w, A, B: torch.add(linear(x, w), linear(linear(x, A), B), alpha=2),
        lambda x, w, A, B: linear(x, w) + linear(linear(x, A) + 1, B) * 2.0,
        lambda x, w, A, B: linear(x, w) + linear(x, B @ A),
    ]
    for other in others:
        assert find(RECOGNISER, other, *inputs()) == []


# -- PEFT's models -----------------------------------------------------------------------------------------------------

PROJECTIONS = 7 * 2
"""All linear layers of the two-layer model."""
REGIMES = {
    "float32": (torch.float32, False, 0.0),
    "float32, dropout": (torch.float32, False, 0.1),
    "bfloat16": (torch.bfloat16, False, 0.0),
    "bfloat16, dropout": (torch.bfloat16, False, 0.1),
    "autocast": (torch.bfloat16, True, 0.0),
    "autocast, dropout": (torch.bfloat16, True, 0.1),
}
each_regime = pytest.mark.parametrize(("dtype", "autocast", "drop"), REGIMES.values(), ids=REGIMES)


def adapted(dtype: torch.dtype, autocast: bool = False, drop: float = 0.0, **settings: Any) -> peft.PeftModel:
    """PEFT's default: adapters in float32, to be used under autocast; or all in one dtype. B is random, not zero."""
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=drop, target_modules="all-linear", **settings)
    model: Any = peft.get_peft_model(presets.build("tiny-llama", dtype=dtype), config, autocast_adapter_dtype=autocast)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.train()


def gradients(
    model: nn.Module, run: Function, autocast: bool = False, length: int = 17, seed: int = 0
) -> dict[str, Tensor]:
    """By parameter, of one step; a seed stands for tokens and dropout."""
    tokens = torch.randint(1, 250, (2, length), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def compiled(model: nn.Module, reports: list[PassReport]) -> Any:
    """The model after this pass alone, run by eager autograd."""

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> torch.fx.GraphModule:
        result, report = run_passes(retrace(gm), [RECOGNISER], strict=True)
        reports.extend(report)
        return result

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> list[float]:
    assert got.keys() == truth.keys()
    return [float((got[name] - truth[name]).norm() / truth[name].norm()) for name in truth]


@each_regime
def test_every_projection_is_found_with_the_gradients_of_every_adapter(
    dtype: torch.dtype, autocast: bool, drop: float
) -> None:
    model, reports = adapted(dtype, autocast, drop), []
    function, seeds = compiled(model, reports), range(1 if dtype == torch.float32 else 8)
    ours = [gradients(model, function, autocast, seed=seed) for seed in seeds]
    eager = [gradients(model, model, autocast, seed=seed) for seed in seeds]
    (report,) = reports
    variant = "adapter on another input" if drop else "adapter on x"
    assert [site.detail for site in report.rewritten] == [variant] * PROJECTIONS and not report.missed
    assert len({site.module for site in report.rewritten}) == PROJECTIONS
    assert len(ours[0]) == 2 * PROJECTIONS
    if dtype == torch.float32:
        assert max(errors(ours[0], eager[0])) < 1e-5
        return
    exact = model.double()
    truth = [gradients(exact, exact, seed=seed) for seed in seeds]
    our_errors, eager_errors = (list(map(errors, these, truth)) for these in (ours, eager))
    # One step's rounding moves all of its gradients together: only several steps tell anything.
    assert median(chain(*our_errors)) <= 1.1 * median(chain(*eager_errors))
    for mine, theirs in zip(zip(*our_errors, strict=True), zip(*eager_errors, strict=True), strict=True):
        assert median(mine) <= 2 * median(theirs)


@pytest.mark.parametrize(("regime", "tolerance"), [("float32", 1e-5), ("autocast", 5e-2)])
def test_dora_of_peft_is_found_with_the_gradients_of_magnitudes(regime: str, tolerance: float) -> None:
    make_dora_traceable()
    dtype, autocast, drop = REGIMES[regime]
    model, reports = adapted(dtype, autocast, drop, use_dora=True), []
    ours = gradients(model, compiled(model, reports), autocast)
    eager = gradients(model, model, autocast)
    (report,) = reports
    assert [site.detail for site in report.rewritten] == ["DoRA"] * PROJECTIONS and not report.missed
    assert sum("magnitude" in name for name in ours) == PROJECTIONS
    assert max(errors(ours, eager)) < tolerance


def test_lengths_change() -> None:
    """The second length makes the sizes symbolic; that graph serves all others."""
    model, reports = adapted(torch.float32), []
    function = compiled(model, reports)
    for length in (17, 23, 40):
        ours = gradients(model, function, length=length)
        assert max(errors(ours, gradients(model, model, length=length))) < 1e-5
    assert [len(report.rewritten) for report in reports] == [PROJECTIONS] * 2


def test_only_the_first_of_several_adapters_is_fused() -> None:
    model, reports = adapted(torch.float32), []
    config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    ours = gradients(model, compiled(model, reports))
    assert len(ours) == 4 * PROJECTIONS
    assert max(errors(ours, gradients(model, model))) < 1e-5
    (report,) = reports
    assert len(report.rewritten) == len(report.missed) == PROJECTIONS
    assert {site.detail for site in report.missed} == {"a second adapter of the layer stays outside"}


def test_rank_stabilised_scale() -> None:
    model, reports = adapted(torch.float32, use_rslora=True), []
    assert max(errors(gradients(model, compiled(model, reports)), gradients(model, model))) < 1e-5
    assert len(reports[0].rewritten) == PROJECTIONS


def test_float32_adapters_on_a_bfloat16_model_are_left_alone() -> None:
    model, reports = adapted(torch.bfloat16, autocast=True), []
    gradients(model, compiled(model, reports))
    assert not reports[0].rewritten
    assert [site.detail for site in reports[0].missed] == ["A is torch.float32 and x is torch.bfloat16"] * PROJECTIONS


def test_a_model_without_adapters_has_nothing_to_report() -> None:
    tokens = torch.randint(1, 250, (2, 17))
    graph = trace(presets.build("tiny-llama"), input_ids=tokens, labels=tokens, use_cache=False)
    assert list(RECOGNISER.find(graph.graph)) == []
