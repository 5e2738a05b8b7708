"""Both plans give eager's gradients, and keep what they say they keep."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx

from tests.memory.llama import Model, assert_same, cut_by, gradients, ids, partitioned
from unsloth.passes.memory import torch_private
from unsloth.passes.memory.partition import Partitioner
from unsloth.passes.runner import CompilerWarning

POLICIES = ["keep", "recompute"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_equal_eager(policy: str, dynamic: bool) -> None:
    model = Model()
    run = torch.compile(model, backend=cut_by(partitioned(policy)), dynamic=dynamic)
    for length in (9, 12) if dynamic else (9,):
        assert_same(gradients(run, model, ids(length=length)), gradients(model, model, ids(length=length)))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_condition_on_data_is_no_input_of_backward(policy: str) -> None:
    """Inductor takes numbers and tensors. A tower's images are split by sizes that only the data tell."""

    class Split(nn.Linear):
        def forward(self, x, sizes):
            whole = super().forward(x).sin()
            return torch.cat([part.exp() * part.shape[0] for part in torch.split(whole, sizes.tolist())])

    owner, x, sizes = Split(6, 5), torch.randn(7, 6), torch.tensor([3, 4])
    patches = {"custom_partitioner_fn": partitioned(policy)}
    run = torch.compile(owner, backend=lambda gm, xs: compile_fx(gm, xs, config_patches=patches), fullgraph=True)

    def gradient(function: Any) -> torch.Tensor:
        owner.zero_grad()
        function(x, sizes).sum().backward()
        assert owner.weight.grad is not None
        return owner.weight.grad.clone()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.testing.assert_close(gradient(run), gradient(owner))


@pytest.mark.parametrize("policy", POLICIES)
def test_inductor_with_eagers_dropout_masks(policy: str) -> None:
    model = Model(layers=2, p=0.3)
    patches = {"custom_partitioner_fn": partitioned(policy), "emulate_precision_casts": True, "fallback_random": True}
    run = torch.compile(model, backend=lambda gm, xs: compile_fx(gm, xs, config_patches=patches))
    assert_same(gradients(run, model, ids()), gradients(model, model, ids()))


@pytest.mark.parametrize("policy", POLICIES)
def test_recomputed_dropout_draws_the_same_mask(policy: str) -> None:
    """The weight's gradient is yᵀ·h with y as forward dropped it: another mask in backward leaves y's row space."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = torch.dropout(layer(x).exp(), 0.5, True)
            return x

    model = Dropping()
    patches = {"custom_partitioner_fn": partitioned(policy)}
    run = torch.compile(model, backend=lambda gm, xs: compile_fx(gm, xs, config_patches=patches))
    y = run(torch.randn(8, 64) * 0.1)
    assert 0.3 < (y != 0).float().mean() < 0.7
    (gradient,) = torch.autograd.grad(y.sum(), model.layers[1].weight)
    rows = y.detach().double().T  # [64, 8]: exp is its own derivative, so dL/dW = yᵀ·h
    hidden = torch.linalg.lstsq(rows, gradient.double()).solution
    torch.testing.assert_close(rows @ hidden, gradient.double(), rtol=1e-4, atol=1e-4)


def test_plans_keep_what_they_say() -> None:
    seen: dict[str, Any] = {}
    saved = {}
    for policy in POLICIES:
        torch._dynamo.reset()
        partitioner = partitioned(policy)
        model = Model(layers=4)
        run = torch.compile(model, backend=cut_by(partitioner, seen))
        gradients(run, model, ids(length=33))
        assert partitioner.last_plan is not None
        outputs = _saved(seen["forward"])
        assert {n for n in outputs if not n.startswith("primals")} == set(partitioner.last_plan.kept)
        saved[policy] = partitioner.last_plan.saved_bytes
    assert saved["recompute"] < 0.5 * saved["keep"]


def test_keep_needs_no_more_bytes_than_min_cut_and_repeats_no_product() -> None:
    seen: dict[str, Any] = {}
    model = Model(layers=3)
    ours = partitioned("keep")
    gradients(torch.compile(model, backend=cut_by(ours, seen)), model, ids(length=33))
    products = _count(seen["backward"], "mm")
    torch._dynamo.reset()
    theirs: dict[str, Any] = {}
    gradients(torch.compile(model, backend=cut_by(_min_cut, theirs)), model, ids(length=33))
    assert ours.last_plan is not None
    assert ours.last_plan.saved_bytes <= _saved_bytes(theirs["forward"])
    assert products <= _count(theirs["backward"], "mm")


def test_recompute_repeats_products_next_to_their_use() -> None:
    seen: dict[str, Any] = {}
    model = Model(layers=3)
    gradients(torch.compile(model, backend=cut_by(partitioned("recompute"), seen)), model, ids())
    names = [str(n.target) for n in seen["backward"].graph.nodes if n.op == "call_function"]
    again = [i for i, name in enumerate(names) if "swiglu.default" in name]
    back = [i for i, name in enumerate(names) if "swiglu_backward" in name]
    assert len(again) == len(back) == 3
    # Each layer's activation is recomputed after the backward of the layer above it, not at the start.
    assert again[1] > back[0] and again[2] > back[1]


def test_statistics_are_kept_without_their_operator() -> None:
    seen: dict[str, Any] = {}
    model = Model(layers=1)
    partitioner = partitioned("keep")
    gradients(torch.compile(model, backend=cut_by(partitioner, seen)), model, ids())
    assert partitioner.last_plan is not None
    kept = {n for n in seen["forward"].graph.nodes if n.name in partitioner.last_plan.kept}
    statistics = [n for n in kept if "rms_norm" in str(n.args[0])]
    assert statistics and all(n.args[1] == 1 for n in statistics)  # rstd, never y


def test_a_budget_decides() -> None:
    model = Model()
    for budget, policy in ((None, "keep"), (1 << 40, "keep"), (2_200_000, "mixed"), (0, "recompute")):
        torch._dynamo.reset()
        partitioner = Partitioner(budget, strict=True)
        gradients(torch.compile(model, backend=cut_by(partitioner)), model, ids(length=200))
        plan = partitioner.last_plan
        assert plan is not None and plan.policy == policy
        assert policy in str(plan) and "GiB" in str(plan)
        assert not budget or plan.peak_bytes <= budget


def test_a_budget_below_the_floor_names_it() -> None:
    model = Model()
    run = torch.compile(model, backend=cut_by(Partitioner(150_000, strict=True)))
    with pytest.raises(BackendCompilerFailed, match=r"below the floor of .* MiB: working .* MiB, "):
        gradients(run, model, ids(length=200))
    torch._dynamo.reset()
    relaxed = Partitioner(700_000)
    with pytest.warns(CompilerWarning, match=r"below the floor .*about \d+ tokens would fit, in place of 200"):
        gradients(torch.compile(model, backend=cut_by(relaxed)), model, ids(length=200))
    assert relaxed.last_plan is not None and relaxed.last_plan.policy == "recompute"


def test_inference_graphs_have_no_backward() -> None:
    model = Model().eval()
    run = torch.compile(model, backend=cut_by(partitioned("keep")))
    with torch.no_grad():
        torch.testing.assert_close(run(ids())[0], model(ids())[0])


def test_a_view_is_kept_as_its_base() -> None:
    def function(x, w):
        y = (x @ w).transpose(0, 1)
        return y.exp().sum() + (y * y).sum()

    partitioner = partitioned("keep")
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    torch.compile(function, backend=cut_by(partitioner))(x, w).backward()
    assert partitioner.last_plan is not None and partitioner.last_plan.kept == ["mm"]


def test_identity_covers_policy_budget_and_source() -> None:
    identities = {Partitioner(b, p).uuid() for b in (None, 0, 1 << 30) for p in ("auto", "keep", "recompute")}
    assert len(identities) == 9
    assert Partitioner(0).uuid() == pickle.loads(pickle.dumps(Partitioner(0))).uuid()
    with pytest.raises(ValueError, match="policy cannot be 'kep'"):
        Partitioner(policy="kep")


def test_a_failing_plan_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(Partitioner, "choose", fail)
    model = Model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = gradients(torch.compile(model, backend=cut_by(Partitioner())), model, ids())
    assert_same(ours, gradients(model, model, ids()))
    messages = [str(w.message) for w in caught if w.category is CompilerWarning]
    assert messages == ["unsloth: the memory plan was left out: ZeroDivisionError: deliberate"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("classify_nodes", {"joint_module", "static_lifetime_input_indices", "num_fwd_outputs"}),
        ("_extract_fwd_bwd_outputs", {"joint_module", "num_fwd_outputs"}),
        (
            "_extract_fwd_bwd_modules",
            {"joint_module", "saved_values", "saved_sym_nodes", "num_fwd_outputs", "static_lifetime_input_nodes"},
        ),
        ("reordering_to_mimic_autograd_engine", {"gm"}),
        ("raise_getitems", {"gm"}),
        ("thread_graphsafe_rng_from_hops", {"module", "is_backward"}),
        ("is_not_collective", {"node"}),
        ("is_sym_node", {"node"}),
        ("fx_graph_cse", {"fx_g"}),
    ],
)
def test_pytorchs_private_parts_are_there(name: str, parameters: set[str]) -> None:
    assert parameters <= torch_private.signature(name)


def test_every_private_part_is_watched() -> None:
    (watch,) = (m for m in test_pytorchs_private_parts_are_there.pytestmark if m.name == "parametrize")  # pyright: ignore
    assert {name for name, _ in watch.args[1]} == set(torch_private.PARTS)


def _min_cut(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
    return torch_private.min_cut(gm, joint_inputs, compiler="inductor", **kwargs)


def _saved_nodes(forward: fx.GraphModule) -> list[fx.Node]:
    (output,) = (n for n in forward.graph.nodes if n.op == "output")
    return [n for n in output.args[0] if isinstance(n, fx.Node)]


def _saved(forward: fx.GraphModule) -> list[str]:
    user_outputs = 2  # loss and logits; the counter is copied in place
    return [n.name for n in _saved_nodes(forward)[user_outputs:]]


def _saved_bytes(forward: fx.GraphModule) -> int:
    nodes = [n for n in _saved_nodes(forward)[2:] if n.op != "placeholder"]
    return sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in nodes)


def _count(gm: fx.GraphModule, name: str) -> int:
    return sum(f"aten.{name}." in str(n.target) for n in gm.graph.nodes)
