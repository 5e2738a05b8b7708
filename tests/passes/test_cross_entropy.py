"""The loss and its head: every spelling, the trainer's metrics, whose gradients are made, and what is none of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.recognising import LENGTH, assert_misses, assert_rewrites, find
from tests.tracing import targets, trace
from unsloth.compiler.logits import drop_outputs, find_logits
from unsloth.compiler.options import Options
from unsloth.compiler.report import GraphReport
from unsloth.compiler.run import compiled
from unsloth.passes.recognise.cross_entropy import RECOGNISER
from unsloth.passes.rewrite import Match
from unsloth.passes.runner import PassReport, run_passes
from unsloth.runtime.causal_lm import causal_lm_step

BATCH, WIDTH, VOCABULARY = 2, 16, 37
IGNORED = -100


def inputs(dtype: torch.dtype = torch.float32, trained: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels, some of which are ignored."""
    hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=trained)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels[0, 1] = IGNORED
    return hidden, weight, labels


def loss_of(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), labels.view(-1), **options)


# -- spellings ---------------------------------------------------------------------------------------------------------


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(F.linear(hidden, weight), labels)


def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(F.linear(hidden, weight), labels, reduction="sum") / 7


def another_ignored(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(F.linear(hidden, weight), labels.clamp(min=0), ignore_index=0)


def with_bias(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(F.linear(hidden, weight, weight[:, 3] * 2), labels)


def scaled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(0.25 * F.linear(hidden, weight), labels)


def divided_after_the_cast(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(F.linear(hidden, weight).float() / 8.0, labels)


def softcapped(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(torch.tanh(F.linear(hidden, weight) / 3.0) * 3.0, labels)


def softcapped_in_float32(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(3.0 * torch.tanh(F.linear(hidden, weight).float() * 2.0 / 3.0), labels)


def flat(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden.view(-1, WIDTH), weight).float(), labels.view(-1))


def shifted_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return loss_of(logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous())


def shifted_labels(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_of(F.linear(hidden, weight), F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous())


def several_cuts(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)[:, 1:]
    return loss_of((logits * 0.5)[:1, :-2].contiguous(), labels[1:, 2:-1].contiguous())


SPELLINGS = {
    function.__name__: (function, variant, args)
    for function, variant, args in [
        (plain, "plain", (IGNORED, True, 1.0, 0.0)),
        (summed, "plain", (IGNORED, False, 1.0, 0.0)),
        (another_ignored, "plain", (0, True, 1.0, 0.0)),
        (with_bias, "plain", (IGNORED, True, 1.0, 0.0)),
        (scaled, "plain", (IGNORED, True, 0.25, 0.0)),
        (divided_after_the_cast, "plain", (IGNORED, True, 0.125, 0.0)),
        (softcapped, "softcapped", (IGNORED, True, 1.0, 3.0)),
        (softcapped_in_float32, "softcapped", (IGNORED, True, 2.0, 3.0)),
        (flat, "plain", (IGNORED, True, 1.0, 0.0)),
        (shifted_logits, "plain", (IGNORED, True, 1.0, 0.0)),
        (shifted_labels, "plain", (IGNORED, True, 1.0, 0.0)),
        (several_cuts, "plain", (IGNORED, True, 0.5, 0.0)),
    ]
}
spellings = pytest.mark.parametrize(("function", "variant", "args"), SPELLINGS.values(), ids=SPELLINGS)


@spellings
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rewrites_float32(function: Callable, variant: str, args: tuple, dynamic: bool) -> None:
    assert_rewrites(RECOGNISER, function, *inputs(), to="linear_cross_entropy", variant=variant, dynamic=dynamic)


@spellings
def test_rewrites_bfloat16(function: Callable, variant: str, args: tuple) -> None:
    name = "linear_cross_entropy"
    assert_rewrites(RECOGNISER, function, *inputs(torch.bfloat16), to=name, variant=variant, tolerance=3e-2)


@spellings
def test_arguments(function: Callable, variant: str, args: tuple) -> None:
    (match,) = find(RECOGNISER, function, *inputs())
    assert isinstance(match, Match)
    assert match.args[4:8] == args
    statistics, wants = match.args[8:]
    assert not statistics and wants == [True, True, function is with_bias]


def test_under_autocast_the_head_computes_in_the_lower_precision() -> None:
    hidden, weight, labels = inputs()

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(hidden, weight, labels)

    assert_rewrites(RECOGNISER, step, hidden, weight, labels, to="linear_cross_entropy", tolerance=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_rewrites(RECOGNISER, plain, hidden, weight, labels, to="linear_cross_entropy", tolerance=2e-2)
        gm, (report,) = run_passes(trace(plain, hidden, weight, labels), [RECOGNISER], strict=True)
    (node,) = (n for n in gm.graph.nodes if "linear_cross_entropy" in str(n.target))
    assert len(report.rewritten) == 1 and {n.meta["val"].dtype for n in node.args[:2]} == {torch.bfloat16}


# -- statistics --------------------------------------------------------------------------------------------------------


def with_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, head: Callable[[Tensor, Tensor], Tensor] = F.linear
) -> tuple[Tensor, ...]:
    logits = head(hidden, weight)
    loss = loss_of(logits, labels)
    with torch.no_grad():
        log_p = torch.log_softmax(logits.float(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        correct = logits.argmax(-1) == labels
    return loss, entropy, correct


def rewritten(function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> tuple[Any, PassReport]:
    """The function with its graph rewritten, when called, and the report that will then be there."""
    reports: list[GraphReport] = []
    options = Options(strict=True, lowering="eager", logits="drop")
    torch._dynamo.reset()
    run = compiled(function, options, reports, [RECOGNISER])
    for x in args:
        for dim, size in enumerate(x.shape):
            if dynamic and size == LENGTH:
                torch._dynamo.mark_dynamic(x, dim)
    result = run(*args)
    (graph,) = reports
    (report,) = graph.passes
    return result, report


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_statistics_come_from_the_same_operator(dynamic: bool) -> None:
    args = inputs()
    (loss, entropy, correct), report = rewritten(with_statistics, *args, dynamic=dynamic)
    assert [site.detail for site in report.rewritten] == ["plain, with statistics"] and not report.missed
    expected = with_statistics(*args)
    torch.testing.assert_close((loss, entropy), expected[:2])
    assert torch.equal(correct, expected[2])
    torch.testing.assert_close(*(torch.autograd.grad(x, args[:2]) for x in (loss, expected[0])))
    assert not entropy.requires_grad and loss.requires_grad


@pytest.mark.parametrize("kind", ["entropy", "top1"])
def test_each_statistic_is_optional(kind: str) -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss, entropy, correct = with_statistics(hidden, weight, labels)
        return loss, entropy if kind == "entropy" else correct

    args = inputs()
    result, report = rewritten(step, *args)
    assert [site.detail for site in report.rewritten] == ["plain, with statistics"]
    torch.testing.assert_close(result, step(*args))


def test_statistics_of_softcapped_logits() -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return with_statistics(hidden, weight, labels, lambda h, w: 3.0 * torch.tanh(F.linear(h, w) * 0.5 / 3.0))

    args = inputs()
    result, report = rewritten(step, *args)
    assert [site.detail for site in report.rewritten] == ["softcapped, with statistics"]
    torch.testing.assert_close(result, step(*args))


def test_a_statistic_with_a_gradient_is_refused() -> None:
    """An entropy bonus: the operator returns the entropy, but not its gradient."""

    def bonus(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        log_p = torch.log_softmax(logits.float(), -1)
        return loss_of(logits, labels) + 0.1 * (log_p.exp() * log_p).sum(-1).neg().mean()

    args = inputs()
    loss, report = rewritten(bonus, *args)
    assert "may want a gradient, which the operator does not have" in report.missed[0].detail and not report.rewritten
    torch.testing.assert_close(*(torch.autograd.grad(x, args[:2]) for x in (loss, bonus(*args))))


def test_the_largest_logit_has_no_gradient_to_lose() -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)
        return loss_of(logits, labels), logits.argmax(-1)

    args = inputs()
    result, report = rewritten(step, *args)
    assert len(report.rewritten) == 1
    torch.testing.assert_close(result, step(*args))


def test_statistics_that_are_read_before_the_loss_exists_are_refused() -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        with torch.no_grad():
            labels = torch.where(logits.argmax(-1) == labels, IGNORED, labels)
        return loss_of(logits, labels)

    args = inputs()
    loss, report = rewritten(step, *args)
    assert not report.rewritten and "before every argument" in report.missed[0].detail
    torch.testing.assert_close(loss, step(*args))


def test_metrics_between_the_head_and_the_loss_do_not_part_them() -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)
        with torch.no_grad():
            norm = hidden.norm()
        return loss_of(logits, labels), norm

    args = inputs()
    result, report = rewritten(step, *args)
    assert len(report.rewritten) == 1
    torch.testing.assert_close(result, step(*args))


def test_log_probabilities_that_somebody_else_reads_are_refused() -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(hidden, weight)
        loss = loss_of(logits, labels)
        with torch.no_grad():
            log_p = torch.log_softmax(logits.float(), -1)
            return loss, -(log_p.exp() * log_p).sum(-1), log_p[..., 0]

    args = inputs()
    result, report = rewritten(step, *args)
    assert not report.rewritten and "is used outside" in report.missed[0].detail
    torch.testing.assert_close(result, step(*args))


# -- a loss per token --------------------------------------------------------------------------------------------------


def chosen(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -loss_of(F.linear(hidden, weight), labels, reduction="none").view(labels.shape)


def tempered(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As a policy is trained: behind a cap and a temperature, with an entropy that is rewarded."""
    logits = (torch.tanh(F.linear(hidden, weight) * 2.0 / 3.0) * 3.0).float()[:, 1:] / 0.7
    log_p = torch.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return loss_of(logits, labels[:, 1:].contiguous(), reduction="none"), entropy


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_loss_per_token(dynamic: bool) -> None:
    variant, name = "plain, per token", "token_cross_entropy"
    assert_rewrites(RECOGNISER, chosen, *inputs(trained=False), to=name, variant=variant, dynamic=dynamic)
    variant = "softcapped, with statistics, per token"
    assert_rewrites(RECOGNISER, tempered, *inputs(), to=name, variant=variant, dynamic=dynamic)


@pytest.mark.parametrize("trained", [False, True])
def test_arguments_of_a_loss_per_token(trained: bool) -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, entropy = tempered(hidden, weight, labels)
        return losses, entropy if trained else entropy.detach()

    (match,) = find(RECOGNISER, step, *inputs())
    assert isinstance(match, Match)
    assert match.args[5:7] == pytest.approx((2.0 / 0.7, 3.0 / 0.7)) and match.args[7:9] == (True, True)
    with torch.no_grad():
        (match,) = find(RECOGNISER, step, *inputs())
    assert isinstance(match, Match) and match.args[8:] == (False, [False] * 3)


def test_an_entropy_without_gradients_beside_a_loss_per_token() -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)
        with torch.no_grad():
            log_p = torch.log_softmax(logits.float(), -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        return loss_of(logits, labels, reduction="none"), entropy

    args = inputs(trained=False)
    (losses, entropy), report = rewritten(step, *args)
    assert [site.detail for site in report.rewritten] == ["plain, with statistics, per token"]
    expected = step(*args)
    torch.testing.assert_close((losses, entropy), expected)
    assert losses.requires_grad and not entropy.requires_grad
    weights = torch.linspace(-1, 1, losses.numel())
    ours, theirs = (torch.autograd.grad((x * weights).sum(), args[0]) for x in (losses, expected[0]))
    torch.testing.assert_close(ours, theirs)


def test_the_largest_logit_is_no_output_of_a_loss_per_token() -> None:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)
        return loss_of(logits, labels, reduction="none"), logits.argmax(-1)

    assert_misses(RECOGNISER, step, *inputs(), because="largest logit is not an output")


# -- whose gradients ---------------------------------------------------------------------------------------------------


def wants(function: Callable[..., Any], *args: Tensor) -> list[bool]:
    (match,) = find(RECOGNISER, function, *args)
    assert isinstance(match, Match), match.reason
    return match.args[9]


def test_a_frozen_head_wants_no_gradient() -> None:
    assert wants(plain, *inputs(trained=False)) == [True, False, False]


def test_nothing_trained_wants_nothing() -> None:
    hidden, weight, labels = inputs(trained=False)
    assert wants(plain, hidden.detach(), weight, labels) == [False, False, False]


def test_without_gradients_nothing_is_wanted() -> None:
    with torch.no_grad():
        assert wants(plain, *inputs()) == [False, False, False]

    def inside(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            loss = plain(hidden, weight, labels)
        return loss, hidden.sum()

    assert wants(inside, *inputs()) == [False, False, False]


def test_evaluation_makes_no_gradients_and_does_not_keep_training_from_them() -> None:
    args = inputs()
    reports: list[GraphReport] = []
    torch._dynamo.reset()
    run = compiled(plain, Options(strict=True, lowering="eager"), reports, [RECOGNISER])
    with torch.no_grad():
        evaluated = run(*args)
    trained = run(*args)
    torch.testing.assert_close(evaluated, trained.detach())
    torch.testing.assert_close(*(torch.autograd.grad(x, args[:2]) for x in (trained, plain(*args))))
    assert not evaluated.requires_grad and [len(report.passes[0].rewritten) for report in reports] == [1, 1]


def test_what_gradients_cannot_pass_wants_none() -> None:
    def detached(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain((2 * hidden).detach(), weight, labels)

    def frozen_in_a_region(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            body = 2 * hidden
        return plain(body, weight, labels)

    def looked_up(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain(F.one_hot(hidden.long() % WIDTH, WIDTH)[..., 0, :].float(), weight, labels)

    for function in (detached, frozen_in_a_region, looked_up):
        assert wants(function, *inputs()) == [False, True, False], function.__name__


def test_gradients_pass_through_conversions() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    assert wants(lambda h, w, y: plain(h.float(), w.float(), y), hidden, weight, labels) == [True, True, False]


# -- near misses -------------------------------------------------------------------------------------------------------

REASONS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "class weights": (lambda x, y: loss_of(x, y, weight=torch.ones(VOCABULARY)), "weighs classes"),
    "label smoothing": (lambda x, y: loss_of(x, y, label_smoothing=0.1), "smooths labels by 0.1"),
    "probabilities": (lambda x, y: F.cross_entropy(x, torch.softmax(x.detach(), 1)), "probabilities"),
    "returned": (lambda x, y: (loss_of(x, y), x), 'returned as well; options={"logits": "drop"}'),
    "read": (lambda x, y: loss_of(x, y) + x.square().mean(), "read by square as well"),
    "z-loss": (lambda x, y: loss_of(x, y) + 1e-4 * x.logsumexp(-1).square().mean(), "read by logsumexp as well"),
    "classes first": (lambda x, y: F.cross_entropy(x.transpose(1, 2), y), "have 3 dimensions"),
    "an adapter": (lambda x, y: loss_of(x + 0.1 * x[..., :1], y), "an adapter on the head"),
    "regrouped": (lambda x, y: loss_of(x.view(-1, VOCABULARY)[:-1], y.view(-1)[1:]), "rows were rearranged"),
    "part of the vocabulary": (
        lambda x, y: F.cross_entropy(x[..., :-1].flatten(0, 1), y.view(-1).clamp(max=VOCABULARY - 2)),
        "does not keep the vocabulary",
    ),
    "another scale per token": (lambda x, y: loss_of(x * x.detach()[..., :1], y), "scale is not a number"),
    "another cap": (lambda x, y: loss_of(torch.tanh(x / 3.0) * 2.0, y), "softcap is not the same number twice"),
    "statistics of other rows": (lambda x, y: (loss_of(x[:1].clone(), y[:1]), x.argmax(-1)), "read by argmax as well"),
}


@pytest.mark.parametrize(("loss", "because"), REASONS.values(), ids=REASONS)
def test_near_misses(loss: Callable[[Tensor, Tensor], Any], because: str) -> None:
    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return loss(F.linear(hidden, weight), labels)

    assert_misses(RECOGNISER, function, *inputs(), because=because)


def test_several_losses_of_one_graph() -> None:
    """A loss per prediction depth, each through the head, and a router's loss beside them."""

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        next_token = plain(hidden, weight, labels)
        second = loss_of(F.linear(hidden.tanh()[:, :-1], weight), labels[:, 1:].contiguous())
        balance = torch.softmax(hidden[..., :4], -1).mean((0, 1)).square().sum()
        return next_token + 0.3 * second + 0.01 * balance

    assert_rewrites(RECOGNISER, function, *inputs(), to="linear_cross_entropy", variant="plain", count=2)


def test_a_classification_and_a_masked_token_loss() -> None:
    """Of a pooled token through a few classes; of the masked tokens through the vocabulary with a bias."""

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        classes = F.cross_entropy(F.linear(hidden[:, -1], weight[:5]), labels[:, 0] % 5)
        masked = labels.masked_fill(labels % 3 != 0, IGNORED)
        return classes + with_bias(hidden, weight, masked)

    assert_rewrites(RECOGNISER, function, *inputs(), to="linear_cross_entropy", variant="plain", count=2)


def test_a_loss_in_bfloat16_is_refused() -> None:
    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).view(-1, VOCABULARY), labels.view(-1))

    _, report = rewritten(function, *inputs(torch.bfloat16))
    assert not report.rewritten and "torch.float32 instead of torch.bfloat16" in report.missed[0].detail


def test_a_graph_without_a_loss_is_not_reported() -> None:
    assert find(RECOGNISER, lambda h, w, y: F.linear(h, w).argmax(-1) + y, *inputs()) == []


# -- models ------------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {  # configuration, and the scale and cap in it
    "llama": ({}, (1.0, 0.0)),
    "gemma2": ({"final_logit_softcapping": 5.0}, (1.0, 5.0)),  # its head is tied to the embedding
    "cohere": ({"logit_scale": 0.25}, (0.25, 0.0)),
    "granite": ({"logits_scaling": 4.0}, (0.25, 0.0)),
}
models = pytest.mark.parametrize("architecture", MODELS)


def build(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    changes, _ = MODELS[architecture]
    config = transformers.AutoConfig.for_model(architecture, **SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(length: int = 12) -> dict[str, Any]:
    tokens = torch.randint(3, VOCABULARY, (2, length))
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    return {"input_ids": tokens, "labels": labels, "use_cache": False}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same_step(model: nn.Module, given: dict[str, Any], details: list[str], **options: Any) -> None:
    """The compiled model has eager's loss and gradients, and the pass reports these details."""
    expected = model(**given).loss
    reports: list[GraphReport] = []
    torch._dynamo.reset()
    chosen = Options(strict=True, logits="drop", **options)
    loss = compiled(model, chosen, reports, [RECOGNISER])(**given).loss
    (graph,) = reports
    assert [site.detail for site in graph.passes[0].rewritten] == details and not graph.passes[0].missed
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-5)


@models
@pytest.mark.parametrize("divided", [False, True], ids=["mean", "num_items_in_batch"])
def test_models_as_transformers_computes_their_loss(architecture: str, divided: bool) -> None:
    given = batch()
    if divided:
        given["num_items_in_batch"] = torch.tensor(29)
    variant = "softcapped" if MODELS[architecture][1][1] else "plain"
    assert_same_step(build(architecture), given, [variant], lowering="eager")


def test_through_inductor() -> None:
    assert_same_step(build("gemma2"), batch(), ["softcapped"], lowering="inductor")


def test_an_adapted_model_makes_no_gradient_of_its_head() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert_same_step(model, batch(), ["plain"], lowering="eager")
    gm, _ = run_passes(_without_logits(model, batch()), [RECOGNISER], strict=True)
    (node,) = (n for n in gm.graph.nodes if "linear_cross_entropy" in str(n.target))
    assert node.args[9] == [True, False, False]


def test_an_adapter_on_the_head_is_a_near_miss() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    _, (report,) = run_passes(_without_logits(model, batch()), [RECOGNISER], strict=True)
    assert not report.rewritten and "an adapter on the head" in report.missed[0].detail


@models
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_no_value_of_the_graph_is_as_large_as_the_logits(architecture: str, dynamic: bool) -> None:
    """The trainer's step, metrics included; sizes of a symbolic graph are those that it was traced with."""
    model, given = build(architecture), batch(length=29)
    labels = given.pop("labels")
    if dynamic:
        for x in (given["input_ids"], labels):
            torch._dynamo.mark_dynamic(x, 1)
    gm = trace(causal_lm_step, model, given, labels)
    scale, softcap = MODELS[architecture][1]
    result, (report,) = run_passes(gm, [RECOGNISER], strict=True)
    variant = "softcapped" if softcap else "plain"
    assert [site.detail for site in report.rewritten] == [f"{variant}, with statistics"] and not report.missed
    (node,) = (n for n in result.graph.nodes if "linear_cross_entropy" in str(n.target))
    assert node.args[6:8] == (scale, softcap)
    assert _with_logits(gm) and not _with_logits(result)
    assert "log_softmax" not in targets(result)


def test_the_trainers_step() -> None:
    """Loss, metrics and gradients of the compiled step, with symbolic lengths and an accumulated divisor."""
    model = build("llama")
    reports: list[GraphReport] = []
    torch._dynamo.reset()
    step = compiled(causal_lm_step, Options(strict=True, lowering="eager"), reports, [RECOGNISER])
    for length in (9, 12, 15):
        given = batch(length)
        labels = given.pop("labels")
        ours = step(model, given, labels, torch.tensor(31))
        expected = causal_lm_step(model, given, labels, torch.tensor(31))
        torch.testing.assert_close(tuple(ours), tuple(expected))
        torch.testing.assert_close(gradients(model, ours.loss), gradients(model, expected.loss), rtol=1e-4, atol=1e-5)
    assert len(reports) == 2 and all(len(report.passes[0].rewritten) == 1 for report in reports)


def _without_logits(model: nn.Module, given: dict[str, Any]) -> torch.fx.GraphModule:
    gm = trace(model, **given)
    drop_outputs(gm, find_logits(gm))
    return gm


def _with_logits(gm: torch.fx.GraphModule) -> list[str]:
    """Nodes with a vocabulary per token: nothing else in these small models is so wide, but the embedding and head."""
    values = {n.name: n.meta.get("val") for n in gm.graph.nodes if n.op == "call_function"}
    return [name for name, v in values.items() if isinstance(v, Tensor) and v.dim() and v.shape[-1] == VOCABULARY]
