"""The runner and the soundness rules: each rule is tested by breaking it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import fx
from torch.nn.functional import dropout, linear

from tests.toy import Raising, Scale, toy
from tests.tracing import dynamo_graph, targets, trace
from unsloth.compiler.capture import retrace
from unsloth.kernels.operator import OPERATORS, operator
from unsloth.passes import rewrite, soundness
from unsloth.passes.recognise import RECOGNISERS
from unsloth.passes.rewrite import Call, Match, Miss
from unsloth.passes.runner import CompilerWarning, PassError, copy_graph, run_passes
from unsloth.passes.soundness import LostGradient, Unsound, assert_same_mathematics


def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ((linear(x, w) * 3.0).relu() * 3.0).sum()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_rewrites_and_keeps_gradients(dynamic: bool) -> None:
    x, w = inputs()
    gm = trace(model, x, w, dynamic=dynamic)
    result, (report,) = run_passes(gm, [Scale()], strict=True)
    assert targets(result).count("toy_scale") == 2 and "toy_scale" not in targets(gm)
    assert [s.operator for s in report.rewritten] == ["toy_scale"] * 2 and report.seconds > 0
    assert all(s.source_line and s.source_line.startswith("test_runner.py:") for s in report.rewritten)
    run = torch.compile(model, backend=lambda g, _: run_passes(retrace(g), [Scale()], strict=True)[0], dynamic=dynamic)
    run(x, w).backward()
    got = x.grad, w.grad
    x.grad = w.grad = None
    model(x, w).backward()
    torch.testing.assert_close(got, (x.grad, w.grad))


def test_disabled_pass_does_not_run() -> None:
    gm = trace(model, *inputs())
    result, reports = run_passes(gm, [Scale()], disable=["toy_scale"])
    assert result is gm and reports == []


def test_a_pass_that_raises_is_left_out_with_one_warning() -> None:
    gm = trace(model, *inputs())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, reports = run_passes(gm, [Raising(), Scale()])
    assert [str(w.message) for w in caught if w.category is CompilerWarning] == [
        "unsloth: pass raising was left out: ValueError: deliberate"
    ]
    assert reports[0].error == "ValueError: deliberate" and targets(result).count("toy_scale") == 2
    with pytest.raises(PassError, match="raising: ValueError: deliberate"):
        run_passes(gm, [Raising()], strict=True)


def refused(function, *args, change) -> str:
    """The reason why the runner refused the one match that ``change`` made."""
    gm = trace(function, *args)
    before = targets(gm)
    result, (report,) = run_passes(gm, [Scale(change)], strict=True)
    assert report.rewritten == [] and targets(result) == before
    return report.missed[0].detail


def test_rule_1_inner_values_used_outside() -> None:
    def function(x, w):
        y = linear(x, w)
        return (y * 3.0).sum() + y.sum()

    def with_linear(match: Match) -> Match:
        return dataclasses.replace(match, interior=match.interior | {match.args[0]})

    assert "inner value linear is used outside, by sum" in refused(function, *inputs(), change=with_linear)


def test_rule_3_no_match_spans_a_grad_mode_change() -> None:
    def function(x, w):
        with torch.no_grad():
            y = linear(x, w)
        return (y * 3.0).sum() + x.sum()

    def with_linear(match: Match) -> Match:
        return dataclasses.replace(match, interior=match.interior | {match.args[0]})

    assert "spans" in refused(function, *inputs(), change=with_linear)


def test_rule_3_graphs_are_functional() -> None:
    def function(x, w):
        y = linear(x, w)
        y.mul_(3.0)
        return y.sum()

    gm = trace(function, *inputs())
    assert "mul" in targets(gm) and "mul_" not in targets(gm)
    _, (report,) = run_passes(gm, [Scale()], strict=True)
    assert len(report.rewritten) == 1


def test_rule_4_dtype_is_kept() -> None:
    def wrong(match: Match) -> Match:
        half = toy.reference
        del half
        return dataclasses.replace(match, args=(match.args[0].args[0], 3.0))

    def function(x, w):
        return (linear(x, w).double() * 3.0).sum()

    assert "float32 instead of torch.float64" in refused(function, *inputs(), change=wrong)


def test_rule_4_shape_is_kept() -> None:
    def wrong(match: Match) -> Match:
        return dataclasses.replace(match, args=(match.args[0].args[0], 3.0))

    assert "shape (2, 4) instead of (2, 3)" in refused(lambda x, w: (linear(x, w) * 3.0).sum(), *inputs(), change=wrong)


def test_rule_4_a_lost_gradient_drops_the_pass() -> None:
    def function(x, w):
        y = linear(x, w)
        z = y.detach()
        return (y * 3.0).sum() + z.sum()

    def detached(match: Match) -> Match:
        (detach,) = (u for u in match.args[0].users if "detach" in str(u.target))
        return dataclasses.replace(match, args=(detach, 3.0))

    gm = trace(function, *inputs())
    with pytest.raises(PassError, match=r"lost its gradient with respect to l_[xw]_"):
        run_passes(gm, [Scale(detached)], strict=True)
    with pytest.warns(CompilerWarning, match="toy_scale was left out: output 0 lost its gradient"):
        result, (report,) = run_passes(gm, [Scale(detached)])
    assert "toy_scale" not in targets(result) and report.error is not None


def _scaled_by(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * scale


toy_scale_by = OPERATORS.get("toy_scale_by") or operator(
    "toy_scale_by(Tensor scale, Tensor x) -> (Tensor y)",
    reference=_scaled_by,
    reference_backward=lambda grad, scale, needs: (grad * scale if needs[0] else None,),
    forward=_scaled_by,
    backward=lambda grad, scale, needs: (grad * scale if needs[0] else None,),
    saves="scale",
    differentiable="x",  # and not scale
    gradients_of="y",
    supports=lambda *_: None,
    flops=lambda scale, x: x.numel(),
    backward_flops=lambda scale, x: x.numel(),
)


class ScaleBy:
    """Recognises ``x * exp(scale)`` as an operator without a gradient of the scale."""

    name = "toy_scale_by"

    def find(self, graph: torch.fx.Graph):
        for node in graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor:
                yield Match(toy_scale_by, (node.args[1], node.args[0]), {node: 0}, frozenset({node}))


def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x * scale.exp()).sum()


@pytest.mark.parametrize("trained", [True, False])
def test_rule_4_an_argument_that_the_operator_gives_no_gradient(trained: bool) -> None:
    gm = trace(scaled, inputs()[0], torch.randn(4, requires_grad=trained))
    _, (report,) = run_passes(gm, [ScaleBy()], strict=True)
    refusals = ["scale may want a gradient, which the operator does not give it"] if trained else []
    assert [s.detail for s in report.missed] == refusals and len(report.rewritten) == 1 - len(refusals)


@pytest.mark.parametrize("recorded", [True, False])
def test_rule_4_a_gradient_that_an_operator_lacks_is_seen_by_autograd(monkeypatch, recorded: bool) -> None:
    """Autograd's record of an operator leads to all its tensors, those without a gradient included."""
    monkeypatch.setattr(rewrite, "_dropped", lambda *_: None)
    gm = retrace(dynamo_graph(scaled, inputs()[0], torch.randn(4, requires_grad=True)), check=not recorded)
    with pytest.raises(PassError, match="output 0 lost its gradient with respect to l_scale_"):
        run_passes(gm, [ScaleBy()], strict=True)
    with pytest.warns(CompilerWarning, match="toy_scale_by was left out: output 0 lost its gradient"):
        result, _ = run_passes(gm, [ScaleBy()])
    assert "toy_scale_by" not in targets(result)


def test_rule_4_only_the_guilty_pass_is_dropped() -> None:
    class Guilty(Scale):
        name = "guilty"

    def function(x, w):
        y = linear(x, w)
        z = y.detach()
        return (y * 3.0).sum() + z.sum() + (x.relu() * 3.0).sum()

    def detached(match: Match) -> Match | Miss:
        found = [u for u in match.args[0].users if "detach" in str(u.target)]
        if not found:
            return Miss("no detach", match.anchor, None, 1)
        return dataclasses.replace(match, args=(found[0], 3.0))

    def only_relu(match: Match) -> Match | Miss:
        relu = "relu" in str(match.args[0].target)
        return match if relu else Miss("not relu", match.anchor, None, 1)

    gm = trace(function, *inputs())
    with pytest.warns(CompilerWarning, match="pass guilty was left out"):
        result, reports = run_passes(gm, [Guilty(detached), Scale(only_relu)])
    assert targets(result).count("toy_scale") == 1
    assert reports[0].error and not reports[1].error and len(reports[1].rewritten) == 1


def with_output_copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph, its first output copied into the order of memory that a new tensor has."""
    other = copy_graph(gm)
    (output,) = other.graph.find_nodes(op="output")
    node = output.args[0][0]
    with other.graph.inserting_after(node):
        copied = {"memory_format": torch.contiguous_format}
        clone = other.graph.call_function(torch.ops.aten.clone.default, (node,), copied)
    node.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
    other.recompile()
    return other


def test_rule_4_output_strides_are_kept() -> None:
    gm = trace(lambda x, w: (x.t() * 3.0, linear(x, w).sum()), *inputs())
    with pytest.raises(Unsound, match="output 0 changed its strides"):
        assert_same_mathematics(gm, with_output_copied(gm))


def test_rule_4_a_stride_that_no_element_is_found_by_may_change() -> None:
    gm = trace(lambda x, w: ((x * 3.0)[:, None].transpose(0, 1), linear(x, w).sum()), *inputs())
    other = with_output_copied(gm)
    first, second = (soundness._outputs(g)[0].value for g in (gm, other))
    assert first.shape == (1, 2, 4) and (first.stride(), second.stride()) == ((4, 4, 1), (8, 4, 1))
    assert_same_mathematics(gm, other)


def test_rule_5_random_operators_are_not_swallowed() -> None:
    def with_dropout(match: Match) -> Match:
        drop = match.args[0]
        return dataclasses.replace(match, args=(drop.args[0], 3.0), interior=match.interior | {drop})

    def function(x, w):
        return (dropout(linear(x, w), 0.5, True) * 3.0).sum()

    assert "random operator dropout" in refused(function, *inputs(), change=with_dropout)


def test_rule_7_a_pass_that_guards_is_dropped() -> None:
    class Guarding(Scale):
        def find(self, graph):
            for item in super().find(graph):
                assert int(item.args[0].meta["val"].shape[0]) > 0  # specialises the symbolic size
                yield item

    gm = trace(model, *inputs(), dynamic=True)
    with pytest.raises(PassError, match="guarded on a symbolic shape"):
        run_passes(gm, [Guarding()], strict=True)


def test_supports_is_asked_and_its_reason_reported() -> None:
    def function(x, w):
        return (linear(x, w).long() * 3.0).sum() + x.sum()

    def integer(match: Match) -> Match:
        return match

    assert refused(function, *inputs(), change=integer) == "only floating point"


def test_overlapping_matches_apply_once() -> None:
    class Twice(Scale):
        def find(self, graph):
            for item in super().find(graph):
                yield item
                yield item

    result, (report,) = run_passes(trace(model, *inputs()), [Twice()], strict=True)
    assert targets(result).count("toy_scale") == 2 and len(report.rewritten) == 2


def test_a_match_may_compute_its_arguments_first() -> None:
    def negated_twice(match: Match) -> Match:  # x·3 = −toy(−x)
        inside = Call(torch.ops.aten.neg.default, match.args[:1])
        return dataclasses.replace(match, operator=torch.ops.aten.neg.default, args=(Call(toy, (inside, 3.0)),))

    x, w = inputs()
    result, (report,) = run_passes(trace(model, x, w), [Scale(negated_twice)], strict=True)
    assert len(report.rewritten) == 2
    assert targets(result) == ["linear", *["neg", "toy_scale", "neg", "relu"], *["neg", "toy_scale", "neg"], "sum"]
    torch.testing.assert_close(result(x, w)[0], model(x, w))


def test_an_operator_inside_an_argument_is_asked_whether_it_applies() -> None:
    def rounded(match: Match) -> Match:
        whole = Call(torch.ops.aten._to_copy.default, match.args[:1], {"dtype": torch.int64})
        return dataclasses.replace(match, operator=torch.ops.aten.neg.default, args=(Call(toy, (whole, 3.0)),))

    _, (report,) = run_passes(trace(model, *inputs()), [Scale(rounded)], strict=True)
    assert {s.detail for s in report.missed} == {"only floating point"} and not report.rewritten


def test_every_pass_leaves_its_graphs_in_the_structured_trace(tmp_path) -> None:
    code = (
        "import torch\nfrom tests.passes.test_runner import inputs, model\n"
        "torch.compile(model, backend='unsloth', options={'lowering': 'eager', 'strict': True})(*inputs())"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TORCH_TRACE": str(tmp_path)}, check=True)
    (log,) = tmp_path.glob("*.log")
    names = [name for line in log.read_text().splitlines() for name in re.findall(r'"name": "(unsloth_\w+)"', line)]
    assert names == [f"unsloth_{r.name}_{when}" for r in RECOGNISERS for when in ("before", "after")]


# -- what is not done twice -------------------------------------------------------------------------------------------


def test_a_graph_with_a_record_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = retrace(dynamo_graph(model, *inputs()), check=False)
    runs = []
    checked = soundness._outputs
    monkeypatch.setattr(soundness, "_outputs", lambda graph, *args: runs.append(graph) or checked(graph, *args))
    result, (report,) = run_passes(gm, [Scale()], strict=True)
    assert runs == [result] and len(report.rewritten) == 2
    assert not any("unsloth_output" in n.meta for n in result.graph.nodes)  # it would keep an autograd graph alive


@pytest.mark.parametrize("passes", [[], [Scale()]], ids=["unchanged", "rewritten"])
def test_a_gradient_that_the_retrace_lost_is_no_fault_of_the_passes(passes: list) -> None:
    gm = retrace(dynamo_graph(model, *inputs()), check=False)
    (relu,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default)
    with gm.graph.inserting_before(relu):
        relu.args = (gm.graph.call_function(torch.ops.aten.detach.default, relu.args),)
    relu.args[0].meta = dict(relu.meta)
    gm.recompile()
    with pytest.raises(LostGradient, match=r"output 0 would lose its gradient with respect to l_x_, l_w_"):
        run_passes(gm, passes)


def test_alike_sites_are_asked_once_and_get_values_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    supports = toy.supports
    monkeypatch.setattr(toy, "supports", lambda *args: asked.append(args) or supports(*args))
    result, _ = run_passes(trace(model, *inputs()), [Scale()], strict=True)
    first, second = (n.meta["val"] for n in result.graph.nodes if "toy_scale" in str(n.target))
    assert len(asked) == 1 and first is not second
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
