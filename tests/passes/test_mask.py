"""Masks are proven or kept: what is proven equals the tensor, at every size; what is nearly a known mask is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import masking_utils as hf

from tests.tracing import trace
from unsloth.passes.recognise.elements import Elements
from unsloth.passes.recognise.indexing import integer
from unsloth.passes.recognise.mask import BATCH, HEAD, KEY, QUERY, Causal, Chunks, Kept, Mask, Window, prove, visibility
from unsloth.passes.recognise.predicate import And, Atom, Formula, Or
from unsloth.passes.recognise.values import HIDDEN, Unknown, unknowns

Builder = Callable[..., Tensor]


def proven(builder: Builder, queries: int = 12, keys: int = 12, dynamic: bool = False, **inputs: Tensor) -> Mask | Kept:
    """What is proven about ``builder(queries, keys, **inputs)`` as a mask of 2 x 3 x queries x keys scores."""

    def scores(q: Tensor, k: Tensor, **kwargs: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, k, attn_mask=builder(q.shape[2], k.shape[2], **kwargs)
        )

    gm = trace(scores, torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), dynamic=dynamic, **inputs)
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default)
    q, k, _, mask = node.args
    return prove(mask, (*q.meta["val"].shape[:3], k.meta["val"].shape[2]))


def _rows(queries: int) -> Tensor:
    return torch.arange(queries)[:, None]


def _columns(keys: int) -> Tensor:
    return torch.arange(keys)[None, :]


def _causal(queries: int, keys: int) -> Tensor:
    return _columns(keys) <= _rows(queries)


def _hf_causal(queries: int, keys: int) -> Tensor:
    """As transformers builds it, offsets and constants included."""
    q, k = (torch.arange(queries) + 0)[None, None, :, None], (torch.arange(keys) + 0)[None, None, None, :]
    return (q.new_ones((), dtype=torch.bool) & (k <= q)).expand(2, -1, queries, keys)


def _one_document(queries: int, keys: int) -> Tensor:
    """The packed-sequence mask of transformers for positions that the model made itself: one document."""
    positions = torch.arange(queries).unsqueeze(0).expand(2, -1)
    document = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    b = torch.arange(2)[:, None, None, None]
    q, k = torch.arange(queries)[None, None, :, None], torch.arange(keys)[None, None, None, :]
    return (document[b, q] == document[b, k]) & (positions[b, k] <= positions[b, q])


def _added(mask: Tensor, hidden: float = float("-inf")) -> Tensor:
    return torch.where(mask, 0.0, hidden)


CAUSAL: dict[str, Builder] = {
    "key ≤ query": _causal,
    "query ≥ key": lambda q, k: _rows(q) >= _columns(k),
    "key < query + 1": lambda q, k: _columns(k) < _rows(q) + 1,
    "not key > query": lambda q, k: ~(_columns(k) > _rows(q)),
    "the difference": lambda q, k: (_rows(q) - _columns(k)) >= 0,
    "both shifted": lambda q, k: _columns(k) + 5 <= torch.arange(5, q + 5)[:, None],
    "counted by cumsum": lambda q, k: torch.ones(k, dtype=torch.int64).cumsum(0) <= _rows(q) + 1,
    "a slice": lambda q, k: torch.arange(k + 3)[3:] - 3 <= _rows(q),
    "a view": lambda q, k: torch.arange(k).view(1, 1, 1, k) <= torch.arange(q).view(1, 1, q, 1),
    "transposed twice": lambda q, k: (_rows(k) <= _columns(q)).transpose(0, 1),
    "transformers": _hf_causal,
    "transformers, one document": _one_document,
    "tril": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(),
    "tril of floats": lambda q, k: torch.tril(torch.ones(q, k)) != 0,
    "not triu": lambda q, k: torch.ones(q, k, dtype=torch.bool).triu(1).logical_not(),
    "twice": lambda q, k: _causal(q, k) & (_columns(k) <= _rows(q) + 3),
    "or nothing": lambda q, k: _causal(q, k) | torch.zeros(q, k, dtype=torch.bool),
    "added": lambda q, k: _added(_causal(q, k)),
    "added, the lowest float": lambda q, k: torch.where(_causal(q, k), torch.zeros(()), torch.finfo(torch.float32).min),
    "added, from a literal": lambda q, k: torch.where(_causal(q, k), torch.zeros(q, k), torch.tensor(-1e30)),
    "full and triu": lambda q, k: torch.full((q, k), float("-inf")).triu(1),
    "masked_fill": lambda q, k: torch.zeros(q, k).masked_fill(_causal(q, k).logical_not(), float("-inf")),
    "one minus": lambda q, k: (1.0 - _causal(q, k).float()) * torch.finfo(torch.float32).min,
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str, dynamic: bool) -> None:
    assert proven(CAUSAL[name], dynamic=dynamic) == Mask(frozenset({Causal()}))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_everything_visible(dynamic: bool) -> None:
    for builder in (
        lambda q, k: torch.ones(q, k, dtype=torch.bool),
        lambda q, k: torch.zeros(1, 1, q, k),
        lambda q, k: (_rows(q) >= 0).expand(q, k),
        lambda q, k: _columns(k) < k,
        lambda q, k: _causal(q, k) | ~_causal(q, k),
    ):
        result = proven(builder, dynamic=dynamic)
        assert result == Mask() and str(result) == "everything visible"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_window(dynamic: bool) -> None:
    both = proven(lambda q, k: _causal(q, k) & (_columns(k) > _rows(q) - 8), dynamic=dynamic)
    assert both == Mask(frozenset({Causal(), Window(8)})) and str(both) == "causal ∧ window 8"
    alone = proven(lambda q, k: _rows(q) - _columns(k) < 8, dynamic=dynamic)
    assert alone == Mask(frozenset({Window(8)})) and isinstance(alone, Mask) and not alone.causal and alone.window == 8


def test_a_window_that_reaches_everything_is_none() -> None:
    def builder(q: int, k: int) -> Tensor:
        return _causal(q, k) & (_rows(q) - _columns(k) < 12)

    assert proven(builder) == Mask(frozenset({Causal()}))
    assert proven(builder, 13, 13) == Mask(frozenset({Causal(), Window(12)}))
    assert proven(builder, dynamic=True) == Mask(frozenset({Causal(), Window(12)}))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_chunks(dynamic: bool) -> None:
    for builder in (
        lambda q, k: _causal(q, k) & (_columns(k) // 4 == _rows(q) // 4),
        lambda q, k: _causal(q, k) & (torch.div(_rows(q), 4, rounding_mode="floor") == _columns(k) // 4),
        lambda q, k: _causal(q, k) & ((_columns(k) - torch.zeros(1, dtype=torch.int64)) // 4 == _rows(q) // 4),
    ):
        result = proven(builder, dynamic=dynamic)
        assert result == Mask(frozenset({Causal(), Chunks(4)})) and str(result) == "causal ∧ chunks of 4"


def test_one_chunk_is_none() -> None:
    assert proven(lambda q, k: _causal(q, k) & (_columns(k) // 12 == _rows(q) // 12)) == Mask(frozenset({Causal()}))


NEAR_CAUSAL: dict[str, tuple[Builder, str]] = {
    "strict": (lambda q, k: _columns(k) < _rows(q), "no kind of mask"),
    "shifted by one": (lambda q, k: _columns(k) <= _rows(q) + 1, "no kind of mask"),
    "queries start later": (lambda q, k: _columns(k) <= _rows(q) + 4, "no kind of mask"),
    "keys start later": (lambda q, k: _columns(k) + 1 <= _rows(q), "no kind of mask"),
    "diagonal of tril": (lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(1), "no kind of mask"),
    "diagonal of triu": (lambda q, k: torch.full((q, k), float("-inf")).triu(), "no kind of mask"),
    "steps of two": (lambda q, k: torch.arange(0, 2 * k, 2) <= _rows(q), "no kind of mask"),
    "shifted chunks": (lambda q, k: _causal(q, k) & (_columns(k) // 4 == (_rows(q) + 1) // 4), "no kind of mask"),
    "chunks of two sizes": (lambda q, k: _causal(q, k) & (_columns(k) // 4 == _rows(q) // 3), "no kind of mask"),
    "later chunks": (lambda q, k: _causal(q, k) & (_columns(k) // 4 != _rows(q) // 4), "no kind of mask"),
    "rounded towards zero": (
        lambda q, k: _causal(q, k) & (torch.div(_columns(k) - 5, 4, rounding_mode="trunc") == _rows(q) // 4),
        "of this rounding",
    ),
    "except one key": (lambda q, k: _causal(q, k) & (_columns(k) != 3), "no kind of mask"),
    "or the first keys": (lambda q, k: _causal(q, k) | (_columns(k) < 3), "no kind of mask"),
    "hides nothing it should": (lambda q, k: _added(_causal(q, k), -100.0), "the number -100.0"),
    "hides with a small number": (lambda q, k: _added(_causal(q, k), -1.0), "something else than 0 or -inf"),
    "adds a bias": (lambda q, k: torch.where(_causal(q, k), 1.0, float("-inf")), "something else than 0 or -inf"),
    "hides the past": (lambda q, k: _added(~_causal(q, k)), "no kind of mask"),
    "minus infinity cancelled": (lambda q, k: _added(_causal(q, k), -1e9) - _added(_causal(q, k), -1e9), "number nan"),
    "hides everything": (lambda q, k: _causal(q, k) & (_columns(k) > _rows(q)), "hides every key"),
    "random": (lambda q, k: _causal(q, k) & (torch.rand(q, k) > 0.5), "unknown operation aten.rand"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", NEAR_CAUSAL)
def test_near_misses_are_kept_with_a_reason(name: str, dynamic: bool) -> None:
    builder, reason = NEAR_CAUSAL[name]
    result = proven(builder, dynamic=dynamic)
    assert isinstance(result, Kept) and reason in result.reason
    assert result.source_line is not None and result.source_line.startswith("test_mask.py:")


def test_transposed_is_not_causal() -> None:
    result = proven(lambda q, k: _causal(q, k).transpose(0, 1))
    assert result == Mask(frozenset({Window(1)}))  # key ≥ query: no position back


def test_lengths_that_differ_keep_the_top_left_alignment() -> None:
    assert proven(_causal, 5, 9) == Mask(frozenset({Causal()}))
    bottom_right = proven(lambda q, k: _columns(k) <= _rows(q) + (k - q), 5, 9)
    assert isinstance(bottom_right, Kept)
    assert isinstance(proven(lambda q, k: _columns(k) <= _rows(q) + (k - q), 5, 9, dynamic=True), Kept)
    assert proven(lambda q, k: _columns(k) <= _rows(q) + (k - q), dynamic=True) == Mask(frozenset({Causal()}))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_data_is_kept_with_its_name(dynamic: bool) -> None:
    def padded(q: int, k: int, attention_mask: Tensor) -> Tensor:
        return _causal(q, k) & attention_mask.bool()[:, None, None, :]

    def numbered(q: int, k: int, document: Tensor) -> Tensor:
        return _causal(q, k) & (document[:, None, :, None] == document[:, None, None, :])

    def given(q: int, k: int, attention_mask: Tensor) -> Tensor:
        return attention_mask

    ones, positions = torch.ones(2, 12, dtype=torch.int64), torch.arange(12).expand(2, 12).contiguous()
    for builder, inputs, reason in (
        (padded, {"attention_mask": ones}, "depends on the input attention_mask (padding)"),
        (numbered, {"document": positions}, "depends on the input document (documents)"),
        (given, {"attention_mask": torch.ones(2, 1, 12, 12)}, "depends on the input attention_mask"),
        (given, {"attention_mask": torch.ones(12, 12, dtype=torch.bool)}, "depends on the input attention_mask"),
    ):
        result = proven(builder, dynamic=dynamic, **inputs)
        assert isinstance(result, Kept) and result.reason == reason


def _packed(q: int, k: int, position_ids: Tensor) -> Tensor:
    """As transformers finds documents: where a position does not follow the one before it."""
    document = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    b = torch.arange(position_ids.shape[0])[:, None, None, None]
    q_idx, kv_idx = torch.arange(q)[None, None, :, None], torch.arange(k)[None, None, None, :]
    return (position_ids[b, kv_idx] <= position_ids[b, q_idx]) & (document[b, q_idx] == document[b, kv_idx])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("rows", [1, 2])
def test_documents(rows: int, dynamic: bool) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]] * rows)

    def in_a_window(q: int, k: int, position_ids: Tensor) -> Tensor:
        return _packed(q, k, position_ids) & (_rows(q) - _columns(k) < 3)

    for builder, text in ((_packed, "causal ∧ documents"), (in_a_window, "causal ∧ documents ∧ window 3")):
        mask = proven(builder, dynamic=dynamic, position_ids=positions)
        assert isinstance(mask, Mask) and str(mask) == text and mask.causal
        assert mask.documents is not None and mask.documents.target is torch.ops.aten.cumsum.default


NEARLY_DOCUMENTS: dict[str, Builder] = {
    "numbers that may come back": lambda q, k, x: x[:, None, :, None] == x[:, None, None, :],
    "a sum, which may decrease": lambda q, k, x: x.cumsum(-1)[:, None, :, None] == x.cumsum(-1)[:, None, None, :],
    "counted along the batch": lambda q, k, x: _both((x != 1).cumsum(0)),
    "the key's neighbour": lambda q, k, x: _both((x != 1).cumsum(-1), 1),
    "not the same": lambda q, k, x: ~_both((x != 1).cumsum(-1)),
    "no later one": lambda q, k, x: (x != 1).cumsum(-1)[:, None, :, None] >= (x != 1).cumsum(-1)[:, None, None, :],
    "two counts": lambda q, k, x: (x != 1).cumsum(-1)[:, None, :, None] == (x != 2).cumsum(-1)[:, None, None, :],
    "of the first row": lambda q, k, x: _both((x != 1).cumsum(-1)[:1]),
}


def _both(numbers: Tensor, shift: int = 0) -> Tensor:
    return numbers[:, None, :, None] == numbers.roll(shift, -1)[:, None, None, :]


@pytest.mark.parametrize("name", NEARLY_DOCUMENTS)
def test_what_is_nearly_documents_is_kept(name: str) -> None:
    def builder(q: int, k: int, position_ids: Tensor) -> Tensor:
        return _causal(q, k) & NEARLY_DOCUMENTS[name](q, k, position_ids)

    result = proven(builder, position_ids=torch.randint(0, 3, (2, 12)))
    assert isinstance(result, Kept) and "depends on the input position_ids" in result.reason


# -- the decisive test: a formula equals the tensor that it was folded from, at any size -------------------------------

CONSTANTS = st.integers(-4, 4)
# Each builder makes an integer or boolean tensor that broadcasts to [batch, 1, queries, keys] from the environment.
Environment = dict[str, Any]
Piece = Callable[[Environment], Tensor]

_POSITIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "arange": lambda size, x: torch.arange(size, device=x.device),
    "from one": lambda size, x: torch.arange(1, size + 1) - 1,
    "sliced": lambda size, x: torch.arange(size + 2)[2:] - 2,
    "even": lambda size, x: torch.arange(0, 2 * size, 2),
    "counted": lambda size, x: torch.ones_like(x[0], dtype=torch.bool).cumsum(0),
    "int32": lambda size, x: torch.arange(size, dtype=torch.int32),
    "joined": lambda size, x: torch.cat([torch.arange(3) - 3, torch.arange(size)])[3:],
    "data": lambda size, x: x[0],
}


@st.composite
def positions(draw: Any) -> Piece:
    which, spelling = draw(st.sampled_from(["q", "k"])), draw(st.sampled_from(sorted(_POSITIONS)))
    view = draw(st.sampled_from(["unsqueeze", "view", "index"]))

    def build(env: Environment) -> Tensor:
        flat = _POSITIONS[spelling](env[which], env[f"{which}_data"])
        if view == "view":
            return flat.view((1, 1, env["q"], 1) if which == "q" else (1, 1, 1, env["k"]))
        if view == "index":
            flat = flat[torch.arange(env[which])]
        return flat[None, None, :, None] if which == "q" else flat[None, None, None, :]

    return build


@st.composite
def documents(draw: Any) -> Piece:
    which, own = draw(st.sampled_from(["q", "k"])), draw(st.booleans())

    def build(env: Environment) -> Tensor:
        data = torch.arange(env[which])[None].expand(env["b"], -1) if own else env[f"{which}_data"]
        document = (torch.diff(data, prepend=data[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        b, i = torch.arange(env["b"])[:, None, None, None], torch.arange(env[which])
        return document[b, i[None, None, :, None] if which == "q" else i[None, None, None, :]]

    return build


@st.composite
def combined(draw: Any, numbers: st.SearchStrategy[Piece]) -> Piece:
    kind, constant = draw(st.sampled_from(["add", "sub", "mul", "neg", "rsub", "where"])), draw(CONSTANTS)
    a, b = draw(numbers), draw(numbers)
    if kind == "where":
        condition = draw(comparisons)
        return lambda env: torch.where(condition(env), a(env), b(env))
    return {
        "add": lambda env: a(env) + constant,
        "sub": lambda env: a(env) - b(env),
        "mul": lambda env: a(env) * constant,
        "neg": lambda env: -a(env),
        "rsub": lambda env: constant - a(env),
    }[kind]


@st.composite
def near_causal(draw: Any) -> Piece:
    compare = getattr(torch, draw(st.sampled_from(["le", "lt", "ge", "gt"])))
    offset, swapped = draw(st.sampled_from([-3, -1, 0, 0, 1, 3])), draw(st.booleans())

    def build(env: Environment) -> Tensor:
        q, k = torch.arange(env["q"])[:, None] + offset, torch.arange(env["k"])
        return compare(k, q) if swapped else compare(q, k)

    return build


@st.composite
def compared(draw: Any) -> Piece:
    compare = getattr(torch, draw(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])))
    a, b, constant = draw(integers), draw(integers), draw(CONSTANTS)
    if draw(st.integers(0, 4)) == 0:
        return lambda env: compare(a(env), constant)
    return lambda env: compare(a(env), b(env))


@st.composite
def triangles(draw: Any) -> Piece:
    triangle, diagonal = draw(st.sampled_from([torch.tril, torch.triu])), draw(CONSTANTS)
    return lambda env: triangle(torch.ones(env["q"], env["k"]), diagonal).bool()


@st.composite
def connected(draw: Any, booleans: st.SearchStrategy[Piece]) -> Piece:
    kind, a, b = draw(st.sampled_from(["and", "and", "or", "not", "to int"])), draw(booleans), draw(booleans)
    return {
        "and": lambda env: a(env) & b(env),
        "or": lambda env: torch.logical_or(a(env), b(env)),
        "not": lambda env: ~a(env),
        "to int": lambda env: a(env).to(torch.int64) == b(env),
    }[kind]


comparisons = st.one_of(near_causal(), st.deferred(compared))
integers = st.recursive(st.one_of(positions(), positions(), documents()), combined, max_leaves=3)
padding = st.just(lambda env: env["k_data"][:, None, None, :].to(torch.bool))
leaves = st.one_of(near_causal(), near_causal(), triangles(), comparisons, comparisons, padding)
booleans = st.recursive(leaves, connected, max_leaves=4)

_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "boolean": lambda m: m,
    "where": lambda m: torch.where(m, 0.0, float("-inf")),
    "one minus": lambda m: (1.0 - m.float()) * torch.finfo(torch.float32).min,
    "masked_fill": lambda m: torch.zeros_like(m, dtype=torch.bfloat16).masked_fill(~m, torch.finfo(torch.bfloat16).min),
}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(st.tuples(booleans, st.sampled_from(sorted(_MASKS))), min_size=5, max_size=5),
    symbolic=st.booleans(),
    square=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_formulas_equal_tensors(pieces: list[tuple[Piece, str]], symbolic: bool, square: bool, seed: int) -> None:
    """Of 60 masks, five to a graph: tracing takes longer than what is tested."""

    def builder(q_data: Tensor, k_data: Tensor) -> list[Tensor]:
        env = {"b": q_data.shape[0], "q": q_data.shape[1], "k": k_data.shape[1], "q_data": q_data, "k_data": k_data}
        return [_MASKS[form](piece(env)) for piece, form in pieces]

    generator = np.random.default_rng(seed)
    traced = inputs_of(generator, 3, 7, 7 if square else 5)
    gm = make_fx(builder, pre_dispatch=True, tracing_mode="symbolic" if symbolic else "fake")(*traced)
    (masks,) = (n.args[0] for n in gm.graph.nodes if n.op == "output")
    q_node, k_node = (n.meta["val"].shape for n in gm.graph.nodes if n.op == "placeholder")
    scores = (q_node[0], 2, q_node[1], k_node[1])
    runs = [traced]
    if symbolic:
        runs = []
        for _ in range(2):
            queries = int(generator.integers(2, 9))
            keys = queries if square else queries + 2
            runs.append(inputs_of(generator, int(generator.integers(2, 5)), queries, keys))
    recordings = [(inputs, recorded(gm, *inputs)) for inputs in runs]
    for mask in masks:
        assert_folded(gm, mask, scores, recordings)


def assert_folded(gm: fx.GraphModule, mask: fx.Node, scores: Any, recordings: Any) -> None:
    """A mask's formula is the mask of every recorded run, and so is what is proven of it."""
    result = prove(mask, scores)
    elements = Elements(dict(zip((BATCH, HEAD, QUERY, KEY), map(integer, scores), strict=True)))
    try:
        formula = visibility(mask, tuple(map(integer, scores)), elements)
    except Unknown:
        assert isinstance(result, Kept)
        return
    for inputs, values in recordings:
        real = values[mask]
        batch, queries, keys = inputs[0].shape[0], inputs[0].shape[1], inputs[1].shape[1]
        visible = (real if real.dtype == torch.bool else real == 0).expand(batch, 2, queries, keys)
        if real.dtype != torch.bool:
            assert ((real == 0) | (real <= HIDDEN)).all()
        sizes = dict(zip(map(integer, scores), visible.shape, strict=True))
        grids = dict(zip((BATCH, HEAD, QUERY, KEY), np.ogrid[tuple(map(slice, visible.shape))], strict=True))
        folded = np.broadcast_to(evaluate(formula, grids, sizes, gm, values), visible.shape)
        np.testing.assert_array_equal(folded, visible.numpy())
        if isinstance(result, Mask):
            promised = meaning(result, queries, keys, values).expand_as(visible)
            np.testing.assert_array_equal(promised.numpy(), visible.numpy())


def inputs_of(generator: np.random.Generator, batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(generator.integers(0, 4, (batch, n))) for n in (queries, keys))  # type: ignore


def recorded(gm: fx.GraphModule, *inputs: Tensor) -> dict[fx.Node, Any]:
    """The value of every node of a graph."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(gm).run(*inputs)
    return values


def evaluate(formula: Formula, grids: Any, sizes: Any, gm: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    """A formula over whole index grids, its unknown elements read from the values of a run."""
    if isinstance(formula, bool):
        return np.array(formula)
    if isinstance(formula, (And, Or)):
        parts = [evaluate(p, grids, sizes, gm, values) for p in formula.parts]
        return (np.logical_and if isinstance(formula, And) else np.logical_or).reduce(np.broadcast_arrays(*parts))
    nodes = {n.name: n for n in gm.graph.nodes}

    def read(name: str) -> Callable[..., Any]:
        # An index may be out of bounds in the branch that is not taken.
        array = values[nodes[name]].numpy().astype(np.int64)
        return lambda *index: array[tuple(np.clip(i, 0, s - 1) for i, s in zip(index, array.shape, strict=True))]

    functions = {str(u.func): read(str(u.func)) for u in unknowns(formula)}
    expression = formula.expression.subs({s: n for s, n in sizes.items() if isinstance(s, sympy.Symbol)})
    number = sympy.lambdify(list(grids), expression, [functions, "numpy"])(*grids.values())
    return {">=": np.greater_equal, "==": np.equal, "!=": np.not_equal}[formula.relation](number, 0)


def meaning(mask: Mask, queries: int, keys: int, values: dict[fx.Node, Any]) -> Tensor:
    """What the names of the kinds promise: [1 or batch, 1, queries, keys]."""
    back = torch.arange(queries)[:, None] - torch.arange(keys)
    visible = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if mask.causal:
        visible = visible & (back >= 0)
    if mask.window is not None:
        visible = visible & (back < mask.window)
    for size in mask.chunks:
        visible = visible & (torch.arange(queries)[:, None] // size == torch.arange(keys) // size)
    if mask.documents is not None:
        numbers = values[mask.documents]
        assert (numbers.diff() >= 0).all()  # a document lies in one piece
        visible = visible & (numbers[:, None, :, None] == numbers[:, None, None, :])
    return visible


# -- as transformers builds them ---------------------------------------------------------------------------------------

_FUNCTIONS = st.one_of(
    st.sampled_from(["causal", "bidirectional", "documents", "padding", "prefix of the row"]),
    st.tuples(st.sampled_from(["window", "window both ways", "chunks", "prefix"]), st.integers(1, 9)),
)


def _function(name: Any, inputs: dict[str, Tensor], documents: Tensor) -> Callable[..., Any]:
    match name:
        case "causal":
            return hf.causal_mask_function
        case "bidirectional":
            return hf.bidirectional_mask_function
        case "documents":
            return hf.packed_sequence_mask_function(documents)
        case "padding":
            return hf.padding_mask_function(inputs["attention_mask"].bool())
        case "prefix of the row":
            return hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: k < inputs["prefix"][b])
        case ("prefix", length):
            return hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: k < length)
        case ("window", width):
            return hf.sliding_window_overlay(width)
        case ("window both ways", width):
            return hf.sliding_window_bidirectional_overlay(width)
        case (_, size):
            return hf.chunked_overlay(size, torch.zeros(2, dtype=torch.int64))


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    conjunctions=st.lists(st.lists(_FUNCTIONS, min_size=1, max_size=4), min_size=10, max_size=10),
    remapped=st.booleans(),
    additive=st.booleans(),
    rows=st.lists(st.lists(st.integers(1, 5), min_size=4, max_size=4), min_size=2, max_size=2),
    start=st.integers(0, 3),
    pads=st.lists(st.integers(0, 3), min_size=2, max_size=2),
    left=st.booleans(),
)
def test_conjunctions_of_transformers(
    conjunctions: list[list[Any]], remapped: bool, additive: bool, rows: list[list[int]], start: int,
    pads: list[int], left: bool,
) -> None:  # fmt: skip
    """500 random conjunctions of its mask functions are proven to be exactly the tensor they make, or kept.

    Under the promise of padding on the right they are, in the rows of tokens, where the promise holds.
    """
    length = 7
    positions = torch.stack([torch.cat([torch.arange(start, start + n) for n in row] * 2)[:length] for row in rows])

    def build(position_ids: Tensor, attention_mask: Tensor, prefix: Tensor) -> list[Tensor]:
        given = {"attention_mask": attention_mask, "prefix": prefix}
        documents = hf.find_packed_sequence_indices(position_ids)
        assert documents is not None
        arange = torch.arange(length)
        index = (torch.arange(2)[:, None, None, None], torch.arange(1)[None, :, None, None])
        index += (arange[None, None, :, None], arange[None, None, None, :])
        masks = []
        for names in conjunctions:
            function = hf.and_masks(*(_function(name, given, documents) for name in names))
            if remapped and not {"documents", "padding", "prefix of the row"} & set(
                map(str, names)
            ):  # those are read at indices
                function = hf.remap_positions_for_packed_sequence(function, position_ids)
                function = hf.and_masks(function, hf.packed_sequence_mask_function(documents))
            mask = function(*index).expand(2, 1, length, length)
            masks.append(torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask)
        return masks

    padding = [[0] * n + [1] * (length - n) if left else [1] * (length - n) + [0] * n for n in pads]
    inputs = positions, torch.tensor(padding), torch.tensor([2, 4])
    gm = make_fx(build, pre_dispatch=True, tracing_mode="fake")(*inputs)
    (nodes,) = (n.args[0] for n in gm.graph.nodes if n.op == "output")
    values = recorded(gm, *inputs)
    for mask, names in zip(nodes, conjunctions, strict=True):
        result = prove(mask, (2, 4, length, length))
        if "padding" in names and not left:
            promised = prove(mask, (2, 4, length, length), right_padded=True)
            if isinstance(promised, Mask):
                real, tokens = (values[mask] == 0 if additive else values[mask]), inputs[1].bool()
                meant = meaning(promised, length, length, values).expand_as(real)
                assert torch.equal(meant.transpose(1, 2)[tokens], real.transpose(1, 2)[tokens]), str(promised)
        if isinstance(result, Kept):
            simple = all(name in ("causal", "documents") or name[0] in ("window", "chunks") for name in names)
            simple = simple and not (remapped and "chunks" in {name[0] for name in names})  # at positions: not indices
            assert not simple, result.reason
            continue
        assert "padding" not in names
        real = values[mask] == 0 if additive else values[mask]
        assert torch.equal(meaning(result, length, length, values).expand_as(real), real), str(result)


def test_an_atom_prints_as_it_is_read() -> None:
    assert str(Atom(QUERY - KEY, ">=")) == "-key + query ≥ 0"
