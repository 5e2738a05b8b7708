"""Attention is recognised where its mask is proven, and takes keys and values as they were before being repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    masking_utils,
)

from tests.passes.recognising import assert_misses, assert_rewrites
from tests.tracing import targets, trace
from unsloth.compiler.capture import retrace
from unsloth.kernels.masked_attention import masked_attention
from unsloth.passes.recognise.attention import Attention
from unsloth.passes.recognise.mask import prove
from unsloth.passes.rewrite import Match, Miss
from unsloth.passes.runner import run_passes

MODES = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])


def symbolic(function: Callable[..., Any], *args: Tensor) -> Callable[..., Any]:
    """Make batch and length symbolic, as in a model: heads and width stay, and equal sizes are known to be equal."""
    dims = [(i, d) for i, x in enumerate(args) for d in (0, 2) if x.shape[d] > 1]
    for i, d in dims:
        torch._dynamo.mark_dynamic(args[i], d)
    equal = [(i, d) for i, d in dims if args[i].shape[d] == args[0].shape[d]]

    def checked(*args: Tensor) -> Any:
        for i, d in equal:
            torch._check(args[i].shape[d] == args[0].shape[d])
        return function(*args)

    return checked


def found(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> Match | Miss:
    gm = trace(symbolic(function, *args), *args, dynamic=None) if dynamic else trace(function, *args)
    (result,) = Attention().find(gm.graph)
    return result


def matched(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> Match:
    result = found(function, *args, dynamic=dynamic)
    assert isinstance(result, Match), result
    return result


def missed(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> str:
    result = found(function, *args, dynamic=dynamic)
    assert isinstance(result, Miss)
    return result.reason


def heads(count: int, length: int = 6, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, length, width, requires_grad=True)


def repeated(x: Tensor, n: int) -> Tensor:
    """As transformers does it: head h of the result is head h // n."""
    batch, stored, length, width = x.shape
    return x[:, :, None, :, :].expand(batch, stored, n, length, width).reshape(batch, stored * n, length, width)


def inputs(match: Match) -> list[int]:
    """Which of the arguments called q, k, v, or of ``*args``, the operator's q, k and v are."""
    names = ["L_q_", "L_k_", "L_v_", "L_args_0_", "L_args_1_", "L_args_2_"]
    return [names.index(str(a.target)) % 3 for a in match.args[:3]]


# -- flags -------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("causal", [False, True])
def test_flags(causal: bool, dynamic: bool) -> None:
    match = matched(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal),
        *(heads(4) for _ in range(3)),
        dynamic=dynamic,
    )
    assert inputs(match) == [0, 1, 2]
    assert match.args[3:] == (causal, 8**-0.5, None) and match.autocast == (0, 1, 2)
    assert match.variant == ("causal" if causal else "everything visible")
    assert list(match.outputs) == list(match.interior)


def test_a_scale_is_taken_over() -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)

    assert matched(scaled, heads(4), heads(4), heads(4)).args[4] == 0.25


@MODES
def test_a_proven_mask_becomes_a_flag(dynamic: bool) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=positions <= positions[:, None])

    match = matched(masked, heads(4), heads(4), heads(4), dynamic=dynamic)
    assert match.args[3] is True and match.variant == "causal" and len(match.interior) == 1


@MODES
def test_a_mask_that_hides_nothing_disappears(dynamic: bool) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(q.shape[2], k.shape[2]))

    match = matched(masked, heads(4, 6), heads(4, 9), heads(4, 9), dynamic=dynamic)
    assert match.args[3] is False and match.variant == "everything visible"


# -- near misses -------------------------------------------------------------------------------------------------------


def test_dropout_is_refused() -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)

    assert missed(dropping, heads(4), heads(4), heads(4)) == "attention weights are dropped with probability 0.1"


@MODES
def test_causal_over_other_lengths_is_refused(dynamic: bool) -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    arguments = heads(4, 6), heads(4, 9), heads(4, 9)
    assert missed(causal, *arguments, dynamic=dynamic).startswith("causal with ")
    match = matched(masked, *arguments, dynamic=dynamic)
    assert match.operator is masked_attention and match.variant.startswith("causal with ")


@MODES
def test_a_proven_window_becomes_a_number(dynamic: bool) -> None:
    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        back = positions[:, None] - positions
        return scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < 4))

    match = matched(windowed, heads(4), heads(4), heads(4), dynamic=dynamic)
    assert match.args[3:] == (True, 8**-0.5, 4) and match.variant == "causal ∧ window 4"
    if not dynamic:
        short = matched(windowed, *(heads(4, 3) for _ in range(3)))
        assert short.args[5] is None and short.variant == "causal"


@MODES
def test_a_window_that_sees_ahead_stays_a_tensor(dynamic: bool) -> None:
    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=positions[:, None] - positions < 4)

    match = matched(windowed, heads(4), heads(4), heads(4), dynamic=dynamic)
    assert match.operator is masked_attention and match.args[3] is match.anchor.args[3]
    assert match.variant == "window 4 without causal: no kernel, the mask is kept"


def test_a_padding_mask_stays_a_tensor() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        mask = (positions <= positions[:, None]) & attention_mask[:, None, None, :].bool()
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    match = matched(padded, heads(4), heads(4), heads(4), torch.ones(2, 6, dtype=torch.int64))
    assert match.operator is masked_attention and match.args[3] is match.anchor.args[3] and match.autocast == (0, 1, 2)
    assert match.variant == "the mask is kept: depends on the input attention_mask (padding)"


def padded_on_the_right(mask_of: Callable[[Tensor, Tensor], Tensor]) -> Match | Miss:
    """What is found under the promise; ``mask_of`` makes a mask of causal [6, 6] and an input [2, 6]."""

    def padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        mask = mask_of(positions <= positions[:, None], attention_mask)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    gm = trace(padded, heads(4), heads(4), heads(4), torch.ones(2, 6, dtype=torch.int64))
    (result,) = Attention(right_padded=True).find(gm.graph)
    return result


def test_padding_on_the_right_needs_no_mask_beside_causal() -> None:
    result = padded_on_the_right(lambda causal, mask: causal & mask[:, None, None, :].bool())
    assert isinstance(result, Match) and result.variant == "causal" and result.args[3] is True


@pytest.mark.parametrize(
    ("mask_of", "reason"),
    [
        (lambda causal, mask: mask[:, None, None, :].bool().expand(2, 1, 6, 6), "(padding)"),  # sees what follows
        (lambda causal, mask: causal & mask[:, None, :, None].bool(), "depends on the input attention_mask"),  # queries
        (lambda causal, mask: causal & (mask * 2 - 1)[:, None, None, :].bool(), "depends on"),  # not the input itself
        (lambda causal, mask: causal | mask[:, None, None, :].bool(), "depends on"),
    ],
)
def test_the_promise_of_padding_on_the_right_covers_nothing_else(mask_of: Any, reason: str) -> None:
    result = padded_on_the_right(mask_of)
    assert isinstance(result, Match) and result.operator is masked_attention
    assert result.variant.startswith("the mask is kept: ") and reason in result.variant


def test_three_dimensions_are_refused() -> None:
    assert "are not [batch, heads, length, width]" in missed(
        scaled_dot_product_attention, *(torch.randn(4, 6, 8) for _ in range(3))
    )


# -- grouped keys and values -------------------------------------------------------------------------------------------

REPEATED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "unsqueeze, expand, reshape": repeated,
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "repeat a new dimension": lambda x, n: x.unsqueeze(2).repeat(1, 1, n, 1, 1).flatten(1, 2),
    "contiguous first": lambda x, n: repeated(x.transpose(2, 3).contiguous().transpose(2, 3), n),
}


@MODES
@pytest.mark.parametrize(("stored", "batch"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("spelling", REPEATED)
def test_repeated_heads_are_seen_through(spelling: str, stored: int, batch: int, dynamic: bool) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (REPEATED[spelling](x, 4 // stored) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    args = heads(4, batch=batch), heads(stored, batch=batch), heads(stored, batch=batch)
    match = matched(grouped, *args, dynamic=dynamic)
    assert inputs(match) == [0, 1, 2]
    # Nothing else has a use for the repeated heads, so they are part of the match.
    assert all(n in match.interior for a in match.anchor.args[1:3] for n in [a])


def test_one_key_head_for_all() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1))

    assert inputs(matched(shared, heads(4), heads(1), heads(1))) == [0, 1, 2]


@MODES
def test_one_key_head_that_is_broadcast(dynamic: bool) -> None:
    match = matched(scaled_dot_product_attention, heads(4), heads(1), heads(1), dynamic=dynamic)
    assert match.interior == {match.anchor} and match.args[:3] == match.anchor.args[:3]
    expected = "4 query, 1 key and 4 value heads without enable_gqa"
    assert missed(scaled_dot_product_attention, heads(4), heads(1), heads(4), dynamic=dynamic) == expected


def test_one_broadcast_key_head_keeps_its_gradients() -> None:
    def backend(gm: fx.GraphModule, _: Any) -> Any:
        result, (report,) = run_passes(retrace(gm), [Attention()], strict=True)
        assert report.rewritten and not report.missed
        return result

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, -1)

    torch._dynamo.reset()
    args = heads(4), heads(1), heads(1)
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    got, wanted = (torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, attend))
    torch.testing.assert_close(got, wanted)


def test_enable_gqa() -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    match = matched(grouped, heads(4), heads(2), heads(2))
    assert inputs(match) == [0, 1, 2]


NOT_REPEATED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "in the other order": lambda k, v: (k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
    "expanded in front": lambda k, v: tuple(x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2) for x in (k, v)),
    "one in the other order": lambda k, v: (repeated(k, 2), v.repeat(1, 2, 1, 1)),
    "and cut": lambda k, v: (repeated(k, 2)[:, :, :5], repeated(v, 2)[:, :, :5]),
    "and shifted": lambda k, v: (repeated(k, 2)[:, :, 1:], repeated(v, 2)[:, :, 1:]),
    "and detached": lambda k, v: (repeated(k, 2).detach(), repeated(v, 2).detach()),
    "and transposed": lambda k, v: tuple(repeated(x.transpose(2, 3), 2).reshape(2, 4, 6, 8) for x in (k, v)),
    "and scaled": lambda k, v: (repeated(k, 2) * 2, repeated(v, 2) * 2),
}


@pytest.mark.parametrize("spelling", NOT_REPEATED)
def test_other_repetitions_are_taken_as_they_are(spelling: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, *NOT_REPEATED[spelling](k, v))

    match = matched(attend, heads(4), heads(2), heads(2))
    assert match.args[1:3] == match.anchor.args[1:3] and match.interior == {match.anchor}


def test_repeated_keys_with_values_of_their_own_are_taken_as_they_are() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, repeated(k, 2), v)

    match = matched(attend, heads(4), heads(2), heads(4))
    assert match.args[1:3] == match.anchor.args[1:3]


def test_repeated_along_another_dimension_is_no_attention_of_ours() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2))

    match = matched(attend, heads(4), heads(4, 3), heads(4, 3))
    assert match.args[1:3] == match.anchor.args[1:3]


def test_repeated_heads_with_other_users_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k = repeated(k, 2)
        return scaled_dot_product_attention(q, k, repeated(v, 2)), k

    match = matched(attend, heads(4), heads(2), heads(2))
    assert inputs(match) == [0, 1, 2]
    assert match.anchor.args[1] not in match.interior and match.anchor.args[2] in match.interior


# -- the rewritten graph -----------------------------------------------------------------------------------------------


@MODES
def test_the_rewritten_graph_computes_the_same(dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        mask = (positions <= positions[:, None])[None, None].expand(q.shape[0], -1, -1, -1)
        out = scaled_dot_product_attention(q, repeated(k, 2), repeated(v, 2), attn_mask=mask)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        result, (report,) = run_passes(retrace(gm), [Attention()], strict=True)
        assert [s.detail for s in report.rewritten] == ["causal"] and not report.missed
        assert not {"arange", "le", "expand", "scaled_dot_product_attention"} & set(targets(result))
        return result

    torch._dynamo.reset()
    args = heads(4), heads(2), heads(2)
    function = symbolic(attend, *args) if dynamic else attend
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    got, wanted = (torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, attend))
    torch.testing.assert_close(got, wanted)


def test_the_output_of_a_graph_whose_batch_is_one_row() -> None:
    """As of a tower that attends to one image after the other, where each call of it is a graph.

    The stride of that row, by which nothing is found, is another than before.
    """

    def attend(x: Tensor) -> Tensor:
        q = x.transpose(0, 1)[None]
        return scaled_dot_product_attention(q, q, q).transpose(1, 2).contiguous()

    assert_rewrites(Attention(), attend, torch.randn(6, 4, 8, requires_grad=True), to="attention")


# -- models ------------------------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LENGTH = 12
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(num_hidden_layers=2, **COMMON),
    "qwen3": lambda: Qwen3Config(head_dim=8, num_hidden_layers=1, **COMMON),
    "phi3": lambda: Phi3Config(num_hidden_layers=1, **COMMON),
    "mistral": lambda: MistralConfig(sliding_window=None, num_hidden_layers=1, **COMMON),
    "mistral, window": lambda: MistralConfig(sliding_window=8, num_hidden_layers=1, **COMMON),
}


def in_model(config: PretrainedConfig, dynamic: bool, **inputs: Tensor) -> list[Match | Miss]:
    """What is found in a model's graph, each proven mask compared with the tensor that the model would have used."""
    results: list[Match | Miss] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graph = retrace(gm)
        results.extend(Attention().find(graph.graph))
        values = [i.node.hint if isinstance(i, torch.SymInt) else i for i in example_inputs]
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.scaled_dot_product_attention.default and node.args[3:4] not in (
                (),
                (None,),
            ):
                _assert_proven_is_real(graph, node, values)
        return graph

    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    ids = torch.randint(1, 64, (2, LENGTH))
    torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(input_ids=ids, use_cache=False, **inputs)
    return results


def _assert_proven_is_real(gm: fx.GraphModule, node: fx.Node, inputs: Any) -> None:
    q, k, _, mask = node.args
    proof = prove(mask, (*q.meta["val"].shape[:3], k.meta["val"].shape[2]))  # type: ignore[union-attr]
    until = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for n in gm.graph.nodes:
        copied[n] = until.node_copy(n, copied.__getitem__)
        if n is mask:
            break
    until.output(copied[mask])  # type: ignore[index]
    real = fx.Interpreter(fx.GraphModule(gm, until)).run(*inputs)
    back = torch.arange(real.shape[2])[:, None] - torch.arange(real.shape[3])
    window = getattr(proof, "window", None) or real.shape[3]
    if hasattr(proof, "kinds"):
        assert torch.equal(real, ((back >= 0) & (back < window)).expand_as(real))


@pytest.mark.parametrize(("name", "dynamic"), [("llama", True), ("qwen3", False), ("phi3", True), ("mistral", False)])
def test_every_attention_of_a_model(name: str, dynamic: bool) -> None:
    config = CONFIGS[name]()
    results = in_model(config, dynamic)
    assert len(results) == config.num_hidden_layers
    for match in results:
        assert isinstance(match, Match) and match.variant == "causal" and match.args[3] is True
        assert [a.meta["val"].shape[1] for a in match.args[:3]] == [4, 2, 2]


@MODES
def test_a_model_with_a_window(dynamic: bool) -> None:
    (result,) = in_model(CONFIGS["mistral, window"](), dynamic)
    assert isinstance(result, Match) and result.variant == "causal ∧ window 8" and result.args[5] == 8


def rewritten(model: torch.nn.Module, dynamic: bool) -> Any:
    """The model, compiled with its attention as our operator and nothing else changed."""

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        result, (report,) = run_passes(retrace(gm), [Attention()], strict=True)
        assert report.rewritten and not report.missed
        assert "scaled_dot_product_attention" not in targets(result)
        return result

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)


@MODES
def test_a_window_is_as_wide_as_the_model_says(dynamic: bool) -> None:
    """In a model of one layer the token at i - window + 1 moves the logits at i, the one before it does not.

    Logits and gradients are eager's.
    """
    model = AutoModelForCausalLM.from_config(CONFIGS["mistral, window"](), attn_implementation="sdpa")
    compiled = rewritten(model, dynamic)
    window = model.config.sliding_window
    ids = torch.randint(1, 64, (2, LENGTH))
    results = []
    for run in (model, compiled):
        logits = run(input_ids=ids, use_cache=False).logits
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    query = LENGTH - 1
    before = results[1][0][:, query]
    for position, seen in ((query - window, False), (query - window + 1, True)):
        other = ids.clone()
        other[:, position] = ids[:, position] % 63 + 1
        after = compiled(input_ids=other, use_cache=False).logits[:, query]
        assert torch.equal(after, before) is not seen


def test_a_model_with_padding_hands_its_mask_over() -> None:
    ones = torch.ones(2, LENGTH, dtype=torch.int64)
    (result,) = in_model(CONFIGS["qwen3"](), dynamic=False, attention_mask=ones)
    assert isinstance(result, Match) and result.operator is masked_attention
    assert result.variant == "the mask is kept: depends on the input attention_mask (padding)"


# -- packed documents --------------------------------------------------------------------------------------------------

PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize(("name", "dynamic"), [("llama", True), ("mistral, window", False)])
def test_a_packed_batch(name: str, dynamic: bool) -> None:
    """No mask is left, layers share their offsets, and loss and gradients are eager's."""
    config = CONFIGS[name]()
    config.num_hidden_layers = 2
    config.sliding_window = 3 if "window" in name else None  # shorter than some documents
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    seen: list[str] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        result, (report,) = run_passes(retrace(gm), [Attention()], strict=True)
        expected = "causal ∧ documents" + (" ∧ window 3" if config.sliding_window else "")
        assert [s.detail for s in report.rewritten] == [expected] * 2 and not report.missed, report
        seen.extend(targets(result))
        sizes = [n.meta["val"].numel() for n in result.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        assert dynamic or 2 * LENGTH * LENGTH not in sizes
        return result

    torch._dynamo.reset()
    ids = torch.randint(1, 64, (2, LENGTH))
    gradients = []
    for run in (model, torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)):
        loss = run(input_ids=ids, position_ids=PACKED, labels=ids, use_cache=False).loss
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert [seen.count(name) for name in ("cu_seqlens", "extents", "packed_attention")] == [1, 1, 2]


def test_documents_of_a_packed_batch_are_apart() -> None:
    """Other words in the first document change not a bit of the second one's logits, nor of their gradients."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa")
    compiled = rewritten(model, dynamic=False)
    ids = torch.randint(1, 64, (1, LENGTH))
    other = ids.clone()
    other[:, :5] = ids[:, :5] % 63 + 1
    results = []
    for words in (ids, other):
        table = model.get_input_embeddings()(words).detach().requires_grad_()
        logits = compiled(inputs_embeds=table, position_ids=PACKED[:1], use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, 5:].square().sum(), table)
        assert not gradient[:, :5].any()
        results.append((logits[:, 5:], gradient[:, 5:]))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


# -- written out -------------------------------------------------------------------------------------------------------


def _softmax(scores: Tensor, v: Tensor) -> Tensor:
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.nn.functional.dropout(weights, p=0.0) @ v


def _added(q: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2])
    return torch.where(positions <= positions[:, None], 0.0, torch.finfo(q.dtype).min)


def _column(scores: Tensor, sinks: Tensor) -> Tensor:
    return torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)], dim=-1)


def _less_its_maximum(x: Tensor) -> Tensor:
    return x - x.max(dim=-1, keepdim=True).values


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


WRITTEN: dict[str, Callable[..., Tensor]] = {
    "times a scale": lambda q, k, v: _softmax(q @ k.transpose(2, 3) * 0.3 + _added(q), v),
    "over a divisor": lambda q, k, v: _softmax(q @ k.transpose(-1, -2) / 3.0 + _added(q), v),
    "scaled queries": lambda q, k, v: _softmax((q * 0.3) @ k.transpose(2, 3) + _added(q), v),
    "no mask": lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v,
    "grouped": lambda q, k, v: _softmax(
        q @ repeated(k[:, :2], 2).transpose(2, 3) * 0.3 + _added(q), repeated(v[:, :2], 2)
    ),
    "less its maximum": lambda q, k, v: _softmax(_less_its_maximum(q @ k.transpose(2, 3) * 0.3 + _added(q)), v),
}
SUNK: dict[str, Callable[..., Tensor]] = {
    "a sink as a column": lambda q, k, v, s: (
        _less_its_maximum(_column(q @ k.transpose(2, 3) * 0.3 + _added(q), s)).softmax(-1)[..., :-1] @ v
    ),
    "a sink as a factor": lambda q, k, v, s: (
        _softmax(x := q @ k.transpose(2, 3) * 0.3 + _added(q), v)
        * (x.logsumexp(-1) - s.view(1, -1, 1)).sigmoid().unsqueeze(-1)
    ),
}


@pytest.mark.parametrize("name", [*WRITTEN, *SUNK])
def test_written_out(name: str) -> None:
    arguments = (heads(4, 5), heads(4, 5), heads(4, 5))
    if name in SUNK:
        arguments += (torch.randn(4, requires_grad=True),)
    formula = WRITTEN.get(name) or SUNK[name]
    to = "sink_attention" if name in SUNK else "attention"
    assert_rewrites(Attention(), lambda *x: _flat(formula(*x)), *arguments, to=to)


NEARLY: dict[str, tuple[Callable[..., Tensor], str]] = {
    "dropped": (lambda q, k, v: torch.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v, "dropped with probability 0.5"),
    "over queries": (lambda q, k, v: (q @ k.mT * 0.3).softmax(-2) @ v, "not over the keys alone"),
    "capped, seeing ahead": (lambda q, k, v: _softmax(torch.tanh(q @ k.mT / 9.0) * 9.0, v), "capped by tanh"),
    "capped, a learnt bias": (
        lambda q, k, v: _softmax(torch.tanh(q @ k.mT / 9.0) * 9.0 + q[..., :1], v),
        "capped by tanh, for which there is no kernel here: the mask is kept",
    ),
    "a sink per query": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
        "the sinks are no number per head",
    ),
    "the first column cut off": (
        lambda q, k, v: _column(q @ k.mT, q[0, :, 0, 0]).softmax(-1)[..., 1:] @ v,
        "does not leave out the last column alone",
    ),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_attention_is_kept(name: str) -> None:
    function, because = NEARLY[name]
    assert_misses(Attention(), function, heads(4, 5), heads(4, 5), heads(4, 5), because=because)


# -- heads of two sizes ------------------------------------------------------------------------------------------------


def test_values_narrower_than_queries() -> None:
    """Multi-head latent attention: the operator's result and gradients are eager's."""

    def latent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, -1)

    arguments = (heads(4, 5, 24), heads(4, 5, 24), heads(4, 5, 16))
    assert_rewrites(Attention(), latent, *arguments, to="attention", variant="causal")


# -- masks that stay tensors -------------------------------------------------------------------------------------------


def _seen(q: Tensor, data: Tensor) -> Tensor:
    positions = torch.arange(q.shape[2])
    return (positions <= positions[:, None]) & (data[:, None, None, :] > -0.5)


EXPLICIT: dict[str, Callable[..., Tensor]] = {
    "boolean": lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=_seen(q, m)),
    "added": lambda q, k, v, m: scaled_dot_product_attention(
        q, repeated(k[:, :2], 2), repeated(v[:, :2], 2), attn_mask=torch.where(_seen(q, m), 0.0, float("-inf"))
    ),
    "a learnt bias": lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m[:, None, :, None] * m[0]),
    "written out": lambda q, k, v, m: _softmax(q @ k.mT * 0.3 + torch.where(_seen(q, m), 0.0, -1e9), v),
    "written out, a learnt bias": lambda q, k, v, m: (q @ k.mT * 0.3 + m[0]).softmax(-1) @ v,
    "written out, shifted": lambda q, k, v, m: (q @ k.mT * 0.3 + _added(q).roll(1, 0)).softmax(-1) @ v,
    "a sink": lambda q, k, v, m: (
        _column(q @ k.mT * 0.3 + torch.where(_seen(q, m), 0.0, -1e9), m[0, :4]).softmax(-1)[..., :-1] @ v
    ),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_mask_that_stays_a_tensor(name: str) -> None:
    """Results and gradients, those of what the mask is made of included, are eager's."""
    torch.manual_seed(0)
    data = torch.randn(2, 5, requires_grad="learnt" in name or "sink" in name)
    data.data[:, 0] = 1.0  # no query sees nothing
    to = "masked_sink_attention" if name == "a sink" else "masked_attention"
    arguments = heads(4, 5), heads(4, 5), heads(4, 5), data
    assert_rewrites(Attention(), lambda *x: _flat(EXPLICIT[name](*x)), *arguments, to=to)


@pytest.mark.parametrize("enabled", [False, True], ids=["as it is", "autocast"])
def test_what_is_added_is_converted_as_autocast_does(enabled: bool) -> None:
    """By PyTorch's attention, which is one of the operators that autocast casts for."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return _flat(scaled_dot_product_attention(q, k, v, attn_mask=mask))

    arguments = heads(4, 5), heads(4, 5), heads(4, 5), torch.randn(2, 1, 5, 5)
    assert_rewrites(Attention(), attend, *arguments, to="masked_attention", tolerance=2e-2 if enabled else 1e-5)


def test_sinks_in_packed_documents() -> None:
    """As gpt-oss has them: a column of the scores, and documents that positions tell apart."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, position_ids: Tensor) -> Tensor:
        document = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        seen = torch.arange(5) <= torch.arange(5)[:, None]
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
        scores = _column(q @ repeated(k, 2).mT * 0.3 + torch.where(seen, 0.0, torch.finfo(q.dtype).min), sinks)
        return _flat(_less_its_maximum(scores).softmax(-1)[..., :-1] @ repeated(v, 2))

    arguments = heads(4, 5), heads(2, 5), heads(2, 5), torch.randn(4, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    variant = "causal ∧ documents, sinks, a sink as a column"
    assert_rewrites(Attention(), attend, *arguments, positions, to="packed_sink_attention", variant=variant)


CAPPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as Gemma 2 writes it": lambda q, k: torch.tanh(q @ k.mT * 0.3 / 1.5) * 1.5,
    "times the inverse": lambda q, k: 1.5 * torch.tanh((q @ k.mT * 0.3) * (1 / 1.5)),
    "in one factor": lambda q, k: 1.5 * torch.tanh(q @ k.mT * 0.2),
}


@pytest.mark.parametrize("name", CAPPED)
def test_capped_scores(name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flat(_softmax(CAPPED[name](q, repeated(k, 2)) + _added(q), repeated(v, 2)))

    arguments = heads(4, 5), heads(2, 5), heads(2, 5)
    assert_rewrites(Attention(), attend, *arguments, to="capped_attention", variant="causal, capped by tanh")


def test_capped_scores_in_a_model_with_windows_and_documents() -> None:
    """Gemma 2's two kinds of layers on a packed batch: no mask is left, loss and gradients are eager's."""
    config = Gemma2Config(
        **COMMON, head_dim=8, num_hidden_layers=2, sliding_window=3, attn_logit_softcapping=1.0, query_pre_attn_scalar=2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        result, (report,) = run_passes(retrace(gm), [Attention()], strict=True)
        expected = {"causal ∧ documents ∧ window 3, capped by tanh", "causal ∧ documents, capped by tanh"}
        assert {s.detail for s in report.rewritten} == expected and not report.missed, report
        assert targets(result).count("document_starts") == 2  # transformers counts documents once per kind of mask
        return result

    torch._dynamo.reset()
    ids = torch.randint(1, 64, (2, LENGTH))
    gradients = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        loss = run(input_ids=ids, position_ids=PACKED, labels=ids, use_cache=False).loss
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_sinks_in_a_model_on_a_packed_batch() -> None:
    """gpt-oss: sinks, a window in every other layer, documents; no mask is left, loss and gradients are eager's.

    Its model in transformers tells no documents apart by itself, but takes masks that do.
    """
    config = GptOssConfig(
        **COMMON, head_dim=8, num_hidden_layers=2, sliding_window=3, num_local_experts=2, num_experts_per_tok=1
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)

    def loss_of(ids: Tensor, position_ids: Tensor) -> Tensor:
        given = {
            "config": config, "inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": None,
            "past_key_values": None, "position_ids": position_ids,
        }  # fmt: skip
        masks = {
            "full_attention": masking_utils.create_causal_mask(**given),
            "sliding_attention": masking_utils.create_sliding_window_causal_mask(**given),
        }
        return model(input_ids=ids, attention_mask=masks, position_ids=position_ids, labels=ids, use_cache=False).loss

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        result, (report,) = run_passes(retrace(gm), [Attention()], strict=True)
        expected = {f"causal ∧ documents{window}, sinks, a sink as a column" for window in ("", " ∧ window 3")}
        assert {s.detail for s in report.rewritten} == expected and not report.missed, report
        return result

    torch._dynamo.reset()
    ids = torch.randint(1, 64, (2, LENGTH))
    gradients = []
    for run in (loss_of, torch.compile(loss_of, backend=backend, fullgraph=True)):
        loss = run(ids, PACKED)
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_products_of_a_batch_of_heads() -> None:
    """The scores as ``baddbmm`` of zeros."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batched = (x.reshape(-1, 5, 8) for x in (q, k))
        scores = torch.baddbmm(torch.zeros(8, 5, 5), next(batched), next(batched).transpose(1, 2), beta=1.0, alpha=0.3)
        return _flat((scores.view(2, 4, 5, 5) + _added(q)).softmax(-1) @ v)

    assert_rewrites(Attention(), attend, *(heads(4, 5) for _ in range(3)), to="attention")


@pytest.mark.parametrize(("packed", "dynamic"), [(False, False), (False, True), (True, False)])
def test_chunks_are_documents(packed: bool, dynamic: bool) -> None:
    """As Llama 4 has them; in a packed batch a chunk and a document both end what a query sees. Layers share both."""

    def attend(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor | None = None) -> Tensor:
        index = torch.arange(q.shape[2])
        seen = (index <= index[:, None]) & (index // 3 == index[:, None] // 3)
        if position_ids is not None:
            document = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
            seen = seen & (document[:, None, :, None] == document[:, None, None, :])
        seen = seen.expand(q.shape[0], 1, -1, -1)
        x = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return _flat(scaled_dot_product_attention(x, k, v, attn_mask=seen))

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        result, (report,) = run_passes(retrace(gm), [Attention()], strict=True)
        variant = "causal ∧ chunks of 3" + " ∧ documents" * packed
        assert [s.detail for s in report.rewritten] == [variant] * 2 and not report.missed, report
        assert [targets(result).count(name) for name in ("cu_seqlens", "packed_attention")] == [1, 2]
        return result

    torch._dynamo.reset()
    args = heads(4), heads(2), heads(2)
    args = args[0], *(repeated(x, 2).detach().requires_grad_() for x in args[1:])
    positions = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0]])
    function = symbolic(attend, *args) if dynamic else attend
    given = (*args, positions) if packed else args
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    got, wanted = (torch.autograd.grad(f(*given).square().sum(), args) for f in (compiled, function))
    torch.testing.assert_close(got, wanted)


FILLED: dict[str, Callable[..., Tensor]] = {
    "masked_fill": lambda s, seen, bias: s.masked_fill(~seen, torch.finfo(s.dtype).min),
    "masked_fill of biased scores": lambda s, seen, bias: (s + bias).masked_fill(~seen, float("-inf")),
    "where, and a bias": lambda s, seen, bias: torch.where(seen, s, torch.finfo(s.dtype).min) + bias,
}


@pytest.mark.parametrize("name", FILLED)
def test_scores_that_are_replaced(name: str) -> None:
    """As GPT-Neo and MPT hide them; the bias keeps its gradient."""

    def attend(q: Tensor, k: Tensor, v: Tensor, data: Tensor, bias: Tensor) -> Tensor:
        return _flat(FILLED[name](q @ k.mT * 0.3, _seen(q, data), bias).softmax(-1) @ v)

    data, bias = torch.randn(2, 5), torch.randn(4, 1, 5, requires_grad=name != "masked_fill")
    data[:, 0] = 1.0
    arguments = (*(heads(4, 5) for _ in range(3)), data, bias)
    if name == "masked_fill":
        assert_rewrites(Attention(), lambda *x: attend(*x, bias), *arguments[:4], to="masked_attention")
    else:
        assert_rewrites(Attention(), attend, *arguments, to="masked_attention", variant=f"{KEPT_IN_PLACE}, filled in")


KEPT_IN_PLACE = "the mask is kept: it stands in the place of scores"


def test_a_number_that_hides_nothing_is_no_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.3).masked_fill(q[..., :1] > 0, -1.0).softmax(-1) @ v

    assert_misses(Attention(), attend, *(heads(4, 5) for _ in range(3)), because="-1.0 does not hide it")
