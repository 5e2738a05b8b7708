"""What a recogniser finds, and how a find becomes one operator.

A recogniser only *reads* the graph: it yields a :class:`Match` (these nodes are that operator of these arguments) or
a :class:`Miss` (they nearly are, and this is why not). All mutation happens in :func:`apply`, in one place, behind the
soundness checks, so no pattern has to get them right by itself.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from ..kernels.operator import Operator
from .fakes import fake_execution


@dataclass(frozen=True)
class Call:
    """An argument that the rewrite has to compute first.

    Attributes:
        target: an operator of ours, or of ATen.
        args: graph nodes, numbers, lists of them, and further calls.
        kwargs: likewise.
        shared: whether one node serves all matches that ask for the same.
    """

    target: Operator | OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False


@dataclass(frozen=True)
class Match:
    """A subgraph that computes an operator.

    Attributes:
        operator: what replaces the subgraph: an operator of ours, or of ATen.
        args: its arguments in schema order: graph nodes, plain values, and :class:`Call` for what is to be computed.
        outputs: each node whose value the operator returns, with the index of that output.
        interior: every node that the formula consumed, ``outputs`` included. Nodes other than outputs may have no
            user outside (soundness rule 1).
        variant: which spelling of the formula it was, for ``explain``.
        autocast: positions in ``args`` that the original operators would cast to the ambient autocast dtype. They are
            cast to the first output's dtype where they differ from it.
    """

    operator: Operator | OpOverload
    args: tuple[Any, ...]
    outputs: dict[fx.Node, int]
    interior: frozenset[fx.Node]
    variant: str = ""
    autocast: tuple[int, ...] = ()

    @property
    def anchor(self) -> fx.Node:
        return next(iter(self.outputs))

    def reading(self, replaced: Mapping[fx.Node, fx.Node]) -> Match:
        """The same match after nodes that it reads have been replaced."""
        return replace(self, args=tuple(_substitute(a, replaced) for a in self.args))


@dataclass(frozen=True)
class Miss:
    """Why a subgraph that looked like an operator is left alone.

    Attributes:
        reason: one clause a user understands ("x is not the same value twice").
        node: the node at which the formula stopped fitting.
        source_line: ``file.py:line`` of the model's source, or None when the graph does not know.
        how_far: how many nodes had matched; the deepest miss at an anchor is the one worth showing.
    """

    reason: str
    node: fx.Node
    source_line: str | None
    how_far: int


class Recogniser(Protocol):
    """Finds one operator family. ``name`` is what ``options={"disable": [...]}`` and ``explain`` call it."""

    name: str

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        """Yield matches and near misses in graph order. Must not change the graph."""
        ...


@dataclass(frozen=True)
class Refused:
    """Why a match was not applied."""

    reason: str


Known = dict[Any, Any]
"""What :func:`apply` has learnt of operators on arguments of a shape; the layers of a model share nearly all of it."""


def apply(
    graph: fx.Graph, match: Match, region: Mapping[fx.Node, Region], known: Known | None = None
) -> dict[fx.Node, fx.Node] | Refused:
    """Replace a match by its operator, or say which soundness rule or guard forbids it.

    Args:
        graph: the graph to change. Dead interior nodes stay behind for dead-code elimination.
        match: what to replace.
        region: from :func:`regions`. What a gradient flows through may not span two of them; a statistic, which has
            none, may be taken in another grad mode.
        known: handed from match to match of one graph, so that no operator is asked the same twice.

    Returns:
        The new node for each of the match's outputs, or the refusal (the graph is then unchanged).
    """
    if reason := _unsound(match, region):
        return Refused(reason)
    if (place := _place(match, region)) is None:
        return Refused("an output is used before every argument of the operator exists")
    new = Call(match.operator, _under_autocast(match))
    with torch.no_grad():
        values = _evaluate(new, {} if known is None else known)
    if isinstance(values, Refused):
        return values
    result = values[id(new)]
    results = result if isinstance(result, tuple) else (result,)
    for node, index in match.outputs.items():
        if difference := _changes(node, results[index]):
            return Refused(f"the operator would return {difference}")
    with graph.inserting_before(place):
        call = _insert(graph, new, values, match.anchor, place)
        outputs = {
            node: _called(graph, operator.getitem, (call, index), {}, results[index], match.anchor)
            if isinstance(result, tuple)
            else call
            for node, index in match.outputs.items()
        }
    for old, replacement in outputs.items():
        # Not in what dies with it: the operator may stand after parts of the formula.
        old.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in match.interior)
    return outputs


def _unsound(match: Match, region: Mapping[fx.Node, Region]) -> str | None:
    for node in match.interior:
        if node not in match.outputs and (outside := [u for u in node.users if u not in match.interior]):
            return f"its inner value {node.name} is used outside, by {outside[0].name}"
        if is_random(node):
            return f"it contains the random operator {node.name}"
    if name := _unknown_number(match):
        return f"its {name} is not known when compiling: Dynamo made it symbolic (dynamic=True does)"
    graded = _graded(match)
    for node in match.outputs:
        if node not in graded and value(node).is_floating_point() and region[node].grad_enabled:
            return f"{node.name} may want a gradient, which the operator does not have"
    stretches = {region[node].stretch for node in match.interior}
    modes = {region[node].grad_enabled for node in _inner(graded, match)}
    if len(stretches) > 1 or len(modes) > 1:
        return "it spans a mutation, a change of grad mode or an autocast boundary"
    return None


def _unknown_number(match: Match) -> str | None:
    """The first real argument whose value is symbolic: calling the operator with it would guard on it."""
    if not isinstance(match.operator, Operator):
        return None
    arguments = zip(match.operator.schema.arguments, match.args, strict=False)
    return next((a.name for a, given in arguments if isinstance(value(given), torch.SymFloat)), None)


def _graded(match: Match) -> list[fx.Node]:
    """The outputs that the operator has a gradient of: all but the statistics.

    An operator that is not differentiable at all raises where a gradient reaches its inputs: nothing is lost silently.
    """
    op = match.operator
    if not isinstance(op, Operator) or not op.differentiable:
        return list(match.outputs)
    return [n for n, i in match.outputs.items() if op.outputs[i] in op.gradients_of]


def _inner(outputs: list[fx.Node], match: Match) -> set[fx.Node]:
    """The interior nodes that these outputs are computed by, themselves included."""
    found, todo = set(outputs), list(outputs)
    while todo:
        new = match.interior.intersection(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


def _place(match: Match, region: Mapping[fx.Node, Region]) -> fx.Node | None:
    """The node before which the operator goes: after all its arguments, before the first use of any output.

    Arguments that come later, such as a weight that is dequantised where it is used, are moved up where they can be.
    """
    if (place := _between(match)) is None and (late := _late(match, region)):
        first = min(_graded(match))
        for node in late:
            first.prepend(node)
        place = _between(match)
    return place


def _late(match: Match, region: Mapping[fx.Node, Region]) -> list[fx.Node]:
    """What has to move before the first output for the arguments to exist there, in order; none if it may not."""
    if not (graded := _graded(match)):
        return []
    first = min(graded)
    late, todo = set[fx.Node](), list(_nodes(match.args))
    while todo:
        node = todo.pop()
        if node < first or node in late:
            continue
        pure = node.op == "call_function" and not is_random(node) and not _is_boundary(node)
        if node in match.interior or region[node] != region[first] or not pure:
            return []
        late.add(node)
        todo += node.all_input_nodes
    return sorted(late)


def _between(match: Match) -> fx.Node | None:
    arguments = list(_nodes(match.args))
    last = max(arguments) if arguments else None
    candidates = [n for n in _graded(match) if last is None or n > last]  # in the grad mode of what has a gradient
    outside = [u for node in match.outputs for u in node.users if u not in match.interior]
    if not candidates:
        return None
    place = min(candidates)
    return place if not outside or place <= min(outside) else None


def _changes(node: fx.Node, new: torch.Tensor) -> str | None:
    old = value(node)
    if old.dtype != new.dtype:
        return f"{new.dtype} instead of {old.dtype}"
    if old.dim() != new.dim() or not statically_known_true(sym_eq(tuple(old.shape), tuple(new.shape))):
        return f"shape {tuple(new.shape)} instead of {tuple(old.shape)}"
    is_output = any(user.op == "output" for user in node.users)
    if is_output and not statically_known_true(sym_eq(tuple(old.stride()), tuple(new.stride()))):
        return f"a graph output with strides {new.stride()} instead of {old.stride()}"
    return None


# -- arguments ---------------------------------------------------------------------------------------------------------


def _nodes(argument: Any) -> Iterator[fx.Node]:
    """Every graph node in an argument."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, Call):
        yield from _nodes((*argument.args, *argument.kwargs.values()))
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _nodes(part)


def _substitute(argument: Any, replaced: Mapping[fx.Node, fx.Node]) -> Any:
    return _mapped(argument, lambda node: replaced.get(node, node), lambda call: _rebuilt(call, replaced))


def _rebuilt(call: Call, replaced: Mapping[fx.Node, fx.Node]) -> Call:
    kwargs = {key: _substitute(v, replaced) for key, v in call.kwargs.items()}
    return replace(call, args=tuple(_substitute(a, replaced) for a in call.args), kwargs=kwargs)


def _mapped(argument: Any, of_node: Callable[[fx.Node], Any], of_call: Callable[[Call], Any]) -> Any:
    if isinstance(argument, fx.Node):
        return of_node(argument)
    if isinstance(argument, Call):
        return of_call(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument)(_mapped(part, of_node, of_call) for part in argument)
    return argument


def _under_autocast(match: Match) -> tuple[Any, ...]:
    """The arguments, with the casts that the replaced operators would have made under the ambient autocast."""
    target, args = value(match.anchor).dtype, list(match.args)
    for i in match.autocast:
        if isinstance(args[i], fx.Node) and value(args[i]).dtype != target:
            args[i] = Call(torch.ops.aten._to_copy.default, (args[i],), {"dtype": target})
    return tuple(args)


def _evaluate(call: Call, known: Known) -> dict[int, Any] | Refused:
    """The fake result of a call and of every call inside it, by ``id``; or why an operator does not apply."""
    values: dict[int, Any] = {}

    def result(inner: Call) -> Any:
        args = [_mapped(a, value, result) for a in inner.args]
        kwargs = {key: _mapped(a, value, result) for key, a in inner.kwargs.items()}
        if isinstance(inner.target, Operator):
            values[id(inner)] = _answer(inner.target, args, known)
        else:
            values[id(inner)] = inner.target(*args, **kwargs)
        return values[id(inner)]

    try:
        with fake_execution(value(node) for node in _nodes(call)):
            result(call)
    except _NotSupported as refusal:
        return Refused(str(refusal))
    return values


def _answer(op: Operator, args: list[Any], known: Known) -> Any:
    """An operator's fake result, in tensors of its own; what it says depends on its arguments' metadata alone."""
    first = [next(j for j, other in enumerate(args) if other is a) for a in args]  # which are the same tensor
    key = op, *map(_metadata, args), *first
    if key not in known:
        reason = op.supports(*args)
        known[key] = reason or op.overload(*args)
    answer = known[key]
    if isinstance(answer, str):
        raise _NotSupported(answer)
    if isinstance(answer, tuple):
        return tuple(_empty_like(a) for a in answer)
    return _empty_like(answer)


def _metadata(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        sizes = tuple(map(_metadata, (*argument.shape, *argument.stride(), argument.storage_offset())))
        return sizes, argument.dtype, argument.device, argument.requires_grad
    if isinstance(argument, (list, tuple)):
        return tuple(map(_metadata, argument))
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return argument.node.expr
    return type(argument), argument  # True is not 1


def _empty_like(answer: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(answer.shape, answer.stride(), dtype=answer.dtype, device=answer.device)


class _NotSupported(Exception):
    """An operator's guard said no."""


def _insert(graph: fx.Graph, call: Call, values: dict[int, Any], origin: fx.Node, place: fx.Node) -> fx.Node:
    """Emit a call and those inside it before ``place``, which is the graph's insertion point."""

    def insert(inner: Call) -> fx.Node:
        return _insert(graph, inner, values, origin, place)

    args = tuple(_mapped(a, lambda node: node, insert) for a in call.args)
    kwargs = {key: _mapped(a, lambda node: node, insert) for key, a in call.kwargs.items()}
    if call.shared and (node := _same_call(_overload(call.target), args, kwargs, place)) is not None:
        return node
    return _called(graph, _overload(call.target), args, kwargs, values[id(call)], origin)


def _same_call(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], place: fx.Node) -> fx.Node | None:
    """A node before ``place`` that is this call."""
    for argument in (a for a in args if isinstance(a, fx.Node)):
        for user in argument.users:
            if user.target is target and user.args == args and user.kwargs == kwargs and user < place:
                return user
    return None


def _called(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any, origin: fx.Node
) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = {k: v for k, v in origin.meta.items() if k in ("stack_trace", "nn_module_stack", "seq_nr")}
    node.meta["val"] = val
    return node


def _overload(target: Operator | OpOverload) -> OpOverload:
    return target.overload if isinstance(target, Operator) else target


# -- what a graph forbids ----------------------------------------------------------------------------------------------


class Region(NamedTuple):
    """Where in a graph a node is: values of one region may be combined into one operator.

    Attributes:
        stretch: counts mutations and autocast boundaries.
        grad_enabled: whether gradients are recorded.
    """

    stretch: int
    grad_enabled: bool


def regions(graph: fx.Graph) -> dict[fx.Node, Region]:
    """The region of every node. A graph begins in the ambient grad mode."""
    found: dict[fx.Node, Region] = {}
    stretch, grad_enabled = 0, torch.is_grad_enabled()
    for node in graph.nodes:
        if _is_call_of(node, "_set_grad_enabled"):
            grad_enabled = bool(node.args[0])
        boundary = _is_boundary(node)
        stretch += boundary
        found[node] = Region(stretch, grad_enabled)
        stretch += boundary
    return found


def _is_boundary(node: fx.Node) -> bool:
    """Whether values before and after a node may not be combined into one operator, in whatever grad mode."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return _is_call_of(node, "_enter_autocast", "_exit_autocast", "_enter_inference_mode")


def _is_call_of(node: fx.Node, *names: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in names


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers. Attention is tagged as if it did, but without dropout it does not.

    Neither does ``dropout`` that drops nothing.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if node.target is torch.ops.aten.dropout.default:
        return bool(node.args[1] != 0.0 and node.args[2])
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(given != 0.0)
    return True


def source_line(node: fx.Node) -> str | None:
    """The innermost line of the *model's* source that made a node, as ``modeling_foo.py:88``."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    outside_torch = [f for f in frames if "/torch/" not in f[0]] or frames
    if not outside_torch:
        return None
    path, line = outside_torch[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made a node (``model.layers.3.mlp``), or ``""``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # What the compiled function calls its model: L['self'], L['args'][0] where forward is wrapped, L['model'], …
    path = re.sub(r"^(L\['\w+'\](\[[^\]]*\])*|L__self__|self)", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    path = path.replace(".__dict__._modules", "")
    # A forward that was wrapped from outside (accelerate does) leads to its module through the wrapper.
    path = re.sub(r"\.forward(\.\w+)*?\.__self__", "", path)
    return re.sub(r"^[._]", "", path)


def value(node: Any) -> Any:
    """The fake tensor (or number) a node stands for; plain numbers stand for themselves."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
