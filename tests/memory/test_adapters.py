"""Backward of adapted layers in pieces: where it is cut, where not, and that no plan changes a bit of a gradient."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from tests.kernels.oracle import DEVICE
from unsloth.kernels.glu import geglu, swiglu
from unsloth.kernels.lora_backward import LORA_DOWN_BACKWARD, LORA_UP_BACKWARD, glu_lora_backward
from unsloth.kernels.lora_linear import lora_linear
from unsloth.kernels.lora_linears import LORA_LINEARS
from unsloth.kernels.rms_norm import rms_norm
from unsloth.passes.memory import partition
from unsloth.passes.memory.adapters import fuse_adapter_gradients
from unsloth.passes.memory.rowwise import Tokens
from unsloth.passes.memory.sliced import _Body

WANTED = [True, False, False, True, True]


class Backward:
    """A backward graph of an MLP of adapted layers behind a norm, as it is when a plan has been made."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, rank: int = 4) -> None:
        self.graph, self.dtype = fx.Graph(), dtype
        self.dy, self.z = self.tensor("dy", 6, 8), self.tensor("z", 6, 8)
        self.gate, self.up = self.tensor("gate", 6, 12), self.tensor("up", 6, 12)
        self.rstd = self.tensor("rstd", 6, dtype=torch.float32)
        self.norm_weight = self.tensor("norm_weight", 8)
        self.down = [
            self.tensor("W", 8, 12),
            self.tensor("A", rank, 12),
            self.tensor("B", 8, rank),
            self.tensor("xa", 6, rank),
        ]
        self.layers = [
            *(self.tensor("A2", 2 * rank, 8), self.tensor("W1", 12, 8), self.tensor("W2", 12, 8)),
            *(self.tensor("B1", 12, rank), self.tensor("B2", 12, rank), self.tensor("xa2", 6, 2 * rank)),
        ]

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> fx.Node:
        node = self.graph.placeholder(name)
        value = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
        node.meta["val"] = value.to(DEVICE, dtype or self.dtype)
        return node

    def call(self, target: Any, *args: Any) -> list[fx.Node]:
        """A call with its results, which also are what the arguments make of it."""
        node = self.graph.call_function(target, args)
        found = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        node.meta["val"] = found
        if isinstance(found, torch.Tensor):
            return [node]
        parts = [self.graph.call_function(operator.getitem, (node, i)) for i in range(len(found))]
        for part, value in zip(parts, found, strict=True):
            part.meta["val"] = value
        return parts

    def whole(
        self, act: Any = swiglu, others: tuple = (), apart: Any = None, needs: Any = WANTED, swapped: bool = False
    ) -> list[fx.Node]:
        """All of it; returns the gradients."""
        W, A, B, xa = self.down
        x, _ = self.call(rms_norm.overload, self.z, self.norm_weight, 1e-6, 0.0, True)
        (h,) = self.call(act.overload, self.gate, self.up, *others)
        down = self.call(lora_linear.overload_backward, self.dy, h, apart, W, A, B, xa, 2.0, needs)
        dys = self.call(act.overload_backward, down[0], self.gate, self.up, *others, [True, True])
        wanted = [True, True, False, False, True, True]
        layers = self.call(
            LORA_LINEARS[2].overload_backward, *(dys[::-1] if swapped else dys), x, *self.layers, 0.5, 1.5, wanted
        )
        (dz, _) = self.call(
            rms_norm.overload_backward, layers[0], self.z, self.norm_weight, self.rstd, 1e-6, 0.0, True, [True, False]
        )
        return [dz, down[3], down[4], *(layers[i] for i in (1, 4, 5)), h]

    def cut(self, results: list[fx.Node]) -> list[Any]:
        """What is called of the pieces, after the graph has been cut."""
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        fuse_adapter_gradients(self.graph)
        self.graph.lint()
        pieces = {
            glu_lora_backward.overload,
            *(o.overload for d in (LORA_UP_BACKWARD, LORA_DOWN_BACKWARD) for o in d.values()),
        }
        return [n.target for n in self.graph.nodes if n.target in pieces]

    def values(self) -> list[torch.Tensor]:
        inputs = [n.meta["val"] for n in self.graph.find_nodes(op="placeholder")]
        return list(fx.Interpreter(fx.GraphModule({}, self.graph)).run(*inputs))


@pytest.mark.parametrize(("act", "others"), [(swiglu, ()), (geglu, (False,)), (geglu, (True,))])
def test_a_gated_mlp_is_cut(act: Any, others: tuple) -> None:
    backward = Backward()
    *results, _ = backward.whole(act, others)
    expected = [r.meta["val"] for r in results]
    assert backward.cut(results) == [
        LORA_UP_BACKWARD[1].overload,
        LORA_DOWN_BACKWARD[1].overload,
        glu_lora_backward.overload,
        LORA_DOWN_BACKWARD[2].overload,
    ]
    calls = [n.target for n in backward.graph.find_nodes(op="call_function", target=act.overload)]
    assert not calls and not backward.graph.find_nodes(op="call_function", target=rms_norm.overload)
    rstd = 1 / backward.z.meta["val"].float().pow(2).mean(-1).add(1e-6).sqrt()
    backward.rstd.meta["val"].copy_(rstd)  # what forward saved
    for value, truth in zip(backward.values()[1:], expected[1:], strict=True):
        assert value.norm() > 0 and (value - truth).norm() <= 0.02 * truth.norm()


def test_a_stretch_is_cut_that_reads_a_saved_statistic_late() -> None:
    """As a graph of its own, which it becomes to run in slices, it has inputs in the order in which they are met."""
    backward = Backward()
    *results, _ = backward.whole()
    backward.graph.output(tuple(results))
    calls = [n for n in backward.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    body = _Body(calls, Tokens(1, 6), {})
    assert len(body.graph.find_nodes(op="call_function", target=glu_lora_backward.overload)) == 1
    kinds = [n.op == "placeholder" for n in body.graph.nodes]
    assert kinds == sorted(kinds, reverse=True) and set(body.given.values()) >= {backward.rstd}


def test_h_stays_for_what_else_reads_it() -> None:
    backward = Backward()
    assert glu_lora_backward.overload in backward.cut(backward.whole())
    assert backward.graph.find_nodes(op="call_function", target=swiglu.overload)


def refused() -> list[Any]:
    def plain(**kwargs: Any) -> Any:
        def make() -> tuple[Backward, list[fx.Node]]:
            backward = Backward(kwargs.pop("dtype", torch.bfloat16), kwargs.pop("rank", 4))
            if kwargs.pop("dropout", False):
                kwargs["apart"] = backward.tensor("dropped", 6, 12)
            *results, _ = backward.whole(**kwargs)
            return backward, results

        return make

    return [
        pytest.param(plain(dropout=True), id="the adapter has an input of its own"),
        pytest.param(plain(needs=[True, False, True, True, True]), id="a bias is trained"),
        pytest.param(plain(swapped=True), id="up before gate"),
        pytest.param(plain(dtype=torch.float32), id="float32"),
        pytest.param(plain(rank=40), id="a rank above what the kernel holds"),
    ]


@pytest.mark.parametrize("make", refused())
def test_an_mlp_that_is_left_whole(make: Any) -> None:
    backward, results = make()
    assert glu_lora_backward.overload not in backward.cut(results)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False).train()
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return adapted


def test_no_plan_changes_a_bit(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []
    monkeypatch.setattr(partition, "fuse_adapter_gradients", lambda g: cut.append(fuse_adapter_gradients(g)) or cut[-1])
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for budget in (None, 0):
        torch._dynamo.reset()
        model.zero_grad()
        options = {"logits": "drop"} if budget is None else {"logits": "drop", "memory_budget": budget}
        compiled = torch.compile(model, backend="unsloth", options=options)
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert cut == [0, 5, 0, 5]  # of each plan forward and backward: two MLPs, their norms, and one layer's attention
    (loss, gradients), (other_loss, others) = found
    assert torch.equal(loss, other_loss) and len(gradients) == 28
    for name, gradient in gradients.items():
        assert gradient.norm() > 0 and torch.equal(gradient, others[name]), name
