"""A language model's head and its loss: cross_entropy(softcap(scale · (hidden Wᵀ + bias)) / temperature, labels).

Between the head and the loss stand conversions, views and copies, in any order; where logits are cut along the
sequence, the hidden states are cut in their place. The entropy and the largest logit of each token, which trainers
compute from the same logits for their logs, become outputs of the same operator. A loss that is not reduced, as
policies are trained with, is another operator, in which the entropy may have a gradient. Nobody else may read the
logits: the operators exist in order not to have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels.linear_cross_entropy import linear_cross_entropy
from ...kernels.token_cross_entropy import token_cross_entropy
from ..pattern import Attempt, Found, Pattern, arguments, capture, cast, describe, function, is_cast, number
from ..rewrite import Call, Match, Miss, Region, regions, source_line, value
from ..search import search
from ..soundness import same_sizes
from ..vocabulary import tanh

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_COPIES = {aten.clone.default, aten.alias.default}


# -- the loss ----------------------------------------------------------------------------------------------------------


class _Arranged(Pattern):
    """A value behind any number of conversions, views that keep the vocabulary last, copies, and cuts of rows."""

    def __init__(self, inner: Pattern) -> None:
        self.inner, self.size = inner, inner.size

    def match(self, node: Any, found: Found, attempt: Attempt) -> Iterator[Found]:
        while isinstance(node, fx.Node) and _is_arrangement(node):
            if value(node).dim() == 0 or not _same_last(node, node.args[0]):
                return attempt.dead_end(f"the {describe(node)} does not keep the vocabulary", node, found)
            found, node = found.through(node), node.args[0]
        return self.inner.match(node, found, attempt)


def _same_last(a: Any, b: Any) -> bool:
    return value(b).dim() > 0 and statically_known_true(value(a).shape[-1] == value(b).shape[-1])


def _usual(node: fx.Node, rest: dict[str, Any]) -> str | None:
    if rest["weight"] is not None:
        return "the loss weighs classes"
    if rest["label_smoothing"] != 0.0:
        return f"the loss smooths labels by {rest['label_smoothing']}"
    logits, labels = (value(argument) for argument in node.args[:2])
    if labels.dtype != torch.int64:
        return "the labels are probabilities"
    return None if logits.dim() == 2 else f"the logits have {logits.dim()} dimensions, not rows and vocabulary"


def _known_numbers(node: fx.Node, found: Found) -> str | None:
    names = [name for name in ("scale", "divisor", "softcap", "temperature") if name in found.captures]
    unknown = [name for name in names if not isinstance(found[name], (int, float)) or found[name] == 0]
    return f"the {unknown[0]} of the logits is not known when compiling" if unknown else None


linear = function("linear", aten.linear.default)
cross_entropy = function("cross_entropy_loss", aten.cross_entropy_loss.default, check=_usual)

hidden, weight, bias, labels = map(capture, ("hidden", "weight", "bias", "labels"))
softcap = number("softcap")
head = _Arranged(linear(hidden, weight) | linear(hidden, weight, bias))
scaled = head | _Arranged(head * number("scale")) | _Arranged(head / number("divisor"))
capped = _Arranged(cast(tanh(cast(scaled / softcap))) * softcap)
temperature = number("temperature")

CROSS_ENTROPY = {
    "softcapped": cross_entropy(capped | _Arranged(capped / temperature), labels).where(_known_numbers),
    "plain": cross_entropy(scaled | _Arranged(scaled / temperature), labels).where(_known_numbers),
}
NEAR = {
    "the logits are a sum: an adapter on the head is not part of the operator": cross_entropy(
        _Arranged(capture("a") + capture("b")), labels
    )
}


class LinearCrossEntropy:
    """Finds the loss of a language model together with its head, and what else is computed from the logits."""

    name = "linear_cross_entropy"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        losses = frozenset({aten.cross_entropy_loss.default})
        for result in search(graph, CROSS_ENTROPY, heart=losses, close=1, near=NEAR):
            yield result if isinstance(result, Miss) else _site(graph, *result)


def _site(graph: fx.Graph, loss: fx.Node, found: Found) -> Match | Miss:
    path = _path(loss)
    cuts = [i for i, node in enumerate(path) if _is_cut(node)]
    before = path[: cuts[-1]] if cuts else []
    if any(n.target in _VIEWS and not same_sizes(value(n).shape, value(n.args[0]).shape) for n in before):
        return _miss("the logits are cut after their rows were rearranged", loss, path)
    final = path[max(i for i, node in enumerate(path) if _is_cut(node) or not _is_arrangement(node)) :]
    entropies, tops, inner = _statistics(graph, final, value(path[cuts[-1] if cuts else 0]).shape[:-1])
    interior = found.interior | inner
    for node in path:
        if outside := [user for user in node.users if user not in interior]:
            return _miss(_who_reads_them(outside[0]), outside[0], path)

    given, temperature = arguments(loss), float(found.captures.get("temperature", 1.0))
    scale = found.captures.get("scale", 1.0) / found.captures.get("divisor", 1.0)
    rows = (*_head(path, found), found["labels"], given["ignore_index"])
    # c tanh(s x / c) / T = (c / T) tanh((s / T) x / (c / T))
    numbers = (float(scale) / temperature, float(found.captures.get("softcap", 0.0)) / temperature)
    wants = _wants(graph, loss, found)
    variant = f"{found.variant}, with statistics" if inner else found.variant
    if given["reduction"] != _NOT_REDUCED:
        args = (*rows, given["reduction"] == 1, *numbers, bool(inner), wants)
        outputs = {loss: _LOSS, **dict.fromkeys(entropies, _ENTROPY), **dict.fromkeys(tops, _TOP1)}
        return Match(linear_cross_entropy, args, outputs, interior, variant)
    if tops:
        return _miss("the largest logit is not an output of the loss per token", tops[0], path)
    region = regions(graph)
    trained = any(wants) and any(region[node].grad_enabled for node in entropies)
    outputs = {loss: _LOSSES, **dict.fromkeys(entropies, _ENTROPY_TERM if trained else _ENTROPY_OF_TOKEN)}
    args = (*rows, *numbers, bool(entropies), trained, wants)
    return Match(token_cross_entropy, args, outputs, interior, f"{variant}, per token")


_NOT_REDUCED = 0
_LOSS, _ENTROPY, _TOP1 = (linear_cross_entropy.outputs.index(name) for name in ("loss", "entropy", "top1"))
_LOSSES, _ENTROPY_OF_TOKEN, _ENTROPY_TERM = (
    token_cross_entropy.outputs.index(name) for name in ("losses", "entropy", "entropy_term")
)


def _path(loss: fx.Node) -> list[fx.Node]:
    """From the head's product to what the loss reads: each node is computed from the one before it, and numbers."""
    path = loss.all_input_nodes[:1]
    while path[-1].target is not aten.linear.default:
        path += [node for node in path[-1].all_input_nodes if isinstance(value(node), Tensor)]
    return path[::-1]


def _head(path: list[fx.Node], found: Found) -> tuple[Any, Any, Any]:
    """hidden, weight and bias: cut as the logits were, and converted as autocast would have."""
    dtype = value(path[0]).dtype

    def converted(node: fx.Node | None) -> Any:
        if node is None or value(node).dtype == dtype:
            return node
        return Call(aten._to_copy.default, (node,), {"dtype": dtype})

    hidden = converted(found["hidden"])
    for node in filter(_is_cut, path):
        hidden = Call(aten.slice.Tensor, (hidden, *list(arguments(node).values())[1:]))
    return hidden, converted(found["weight"]), converted(found.captures.get("bias"))


def _is_arrangement(node: fx.Node) -> bool:
    return is_cast(node) or node.target in {*_VIEWS, *_COPIES, aten.slice.Tensor}


def _is_cut(node: fx.Node) -> bool:
    """Whether a node takes some of the rows. A slice of the vocabulary, if there is one on the path, takes it all."""
    return node.target is aten.slice.Tensor and arguments(node)["dim"] not in (-1, value(node).dim() - 1)


def _who_reads_them(user: fx.Node) -> str:
    if user.op == "output":
        return 'the logits are returned as well; options={"logits": "drop"} leaves them out'
    return f"the logits are read by {user.name} as well"


def _miss(reason: str, node: fx.Node, path: list[fx.Node]) -> Miss:
    return Miss(reason, node, source_line(node) or source_line(path[-1]), len(path))


# -- statistics --------------------------------------------------------------------------------------------------------


def _over_the_last(node: fx.Node, rest: dict[str, Any]) -> str | None:
    dims = rest["dim"] if isinstance(rest["dim"], (list, tuple)) else [rest["dim"]]
    if list(dims) not in ([-1], [value(node.args[0]).dim() - 1]) or rest.get("keepdim"):
        return f"the {describe(node)} is not over the vocabulary alone"
    return None if rest.get("dtype") in (None, torch.float32) else f"the {describe(node)} changes the dtype"


log_softmax = function("log_softmax", aten.log_softmax.int, check=_over_the_last)
softmax = function("softmax", aten.softmax.int, check=_over_the_last)
exp = function("exp", aten.exp.default)
total = function("sum", aten.sum.dim_IntList, check=_over_the_last)
argmax = function("argmax", aten.argmax.default, check=_over_the_last)

logits = cast(capture("logits"))
log_p = capture("log_p", log_softmax(logits))
ENTROPY = -total((exp(log_p) | softmax(logits)) * log_p)
TOP1 = argmax(logits)


def _statistics(
    graph: fx.Graph, final: list[fx.Node], tokens: torch.Size
) -> tuple[list[fx.Node], list[fx.Node], frozenset[fx.Node]]:
    """Entropies and largest logits, one per token, of the final logits, and all nodes that they consist of."""

    def is_ours(node: fx.Node, found: Found) -> str | None:
        ours = found["logits"] in final and same_sizes(value(node).shape, tokens)
        return None if ours else "these are other logits, or other rows"

    results: dict[str, list[fx.Node]] = {"entropy": [], "top1": []}
    inner: frozenset[fx.Node] = frozenset()
    patterns = {"entropy": ENTROPY.where(is_ours), "top1": TOP1.where(is_ours)}
    for node in graph.nodes:
        if found := Attempt(node).first(patterns):
            results[found.variant].append(node)
            inner |= found.interior
    return results["entropy"], results["top1"], inner


# -- gradients ---------------------------------------------------------------------------------------------------------


def _wants(graph: fx.Graph, loss: fx.Node, found: Found) -> list[bool]:
    """Which of hidden, weight and bias may want a gradient: forward makes no other."""
    region = regions(graph)
    if not region[loss].grad_enabled:
        return [False] * 3
    wanting = _may_require_grad(graph, region)
    return [found.captures.get(name) in wanting for name in ("hidden", "weight", "bias")]


def _may_require_grad(graph: fx.Graph, region: dict[fx.Node, Region]) -> set[fx.Node]:
    """The values that depend on an input that requires grad, through real numbers and with gradients recorded.

    An operator without a gradient is taken for one that has it: a gradient too many costs time, one too few would fail
    in backward. The graph is functional, so nothing else makes a value depend on another.
    """
    wanting: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            requires = getattr(node.meta.get("example_value"), "requires_grad", False)
        elif node.op == "get_attr":
            requires = True
        else:
            recorded = region[node].grad_enabled and node.target is not aten.detach.default
            requires = recorded and _is_real(value(node)) and not wanting.isdisjoint(node.all_input_nodes)
        if requires:
            wanting.add(node)
    return wanting


def _is_real(result: Any) -> bool:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return any(part.is_floating_point() for part in parts if isinstance(part, Tensor))


RECOGNISER = LinearCrossEntropy()
