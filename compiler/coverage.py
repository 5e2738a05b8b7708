"""How much of a graph became operators of ours: counted from what is there, without asking the matcher.

Two questions. *Places*: every ``rsqrt`` or library norm, rotation, softmax or attention, activation times gate, linear
layer, expert and loss is an anchor, found by its operators alone; it is recognised when a match took it. Layer norms
and experts are counted apart: we have no operator for them on purpose (:data:`LEFT`). *Cost*: every node
has floating-point operations and bytes that it would move if it ran alone; those of the nodes that matches took are
covered. A plain matrix product has no better form than the library's, so it is told apart from what is left over.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..passes.memory.torch_private import optimization_hint
from ..passes.pattern import is_cast
from ..passes.rewrite import module_path, source_line, value

aten = torch.ops.aten

FAMILIES = (
    "norm", "layer norm", "rotation", "attention", "gated MLP", "linear", "grouped expert product",
    "single expert product", "loss",
)  # fmt: skip
LEFT = {
    "layer norm": "left to Inductor, which makes one kernel of it and of what stands around it",
    "grouped expert product": "left to the library, whose torch._grouped_mm is one product for all experts",
    "single expert product": "left as they are, products of one expert's or one token's weights each; "
    "experts_implementation='grouped_mm' of transformers groups them",
}
"""Families that no operator of ours is for, and why."""
_ACTIVATIONS = {aten.silu.default, aten.gelu.default, aten.relu.default}
_LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default}
_PRODUCTS = {*_LINEAR, aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
_ATTENTION = {aten.scaled_dot_product_attention.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_GROUPED = {"_grouped_mm", "_scaled_grouped_mm", "grouped_mm_fallback"}
_PICKS = {aten.select.int, aten.index.Tensor, aten.index_select.default}
_TURNS = {aten.transpose.int, aten.t.default, aten.squeeze.dim, aten.unsqueeze.default}
_LAYER_NORMS = {aten.layer_norm.default, aten.native_layer_norm.default}
_LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default}
_SIZE_UNKNOWN = 4096  # a symbolic size that nothing hints at


@dataclass(frozen=True)
class Share:
    """A cost of a graph (FLOPs, or bytes moved by each operator alone), by what became of it.

    Attributes:
        fused: of nodes that an operator of ours took the place of.
        library: of the remaining matrix products and attentions, which run as the library's kernels.
        total: of all nodes.
    """

    fused: int = 0
    library: int = 0
    total: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.fused + other.fused, self.library + other.library, self.total + other.total)

    @property
    def covered(self) -> float:
        """The share that is fused, from 0 to 1."""
        return self.fused / self.total if self.total else 0.0


@dataclass(frozen=True)
class Place:
    """An anchor: where a graph holds what one of our operators might be.

    Attributes:
        family: of :data:`FAMILIES`.
        module: dotted path of the module it came from, ``""`` when unknown.
        source_line: ``file.py:line`` of the model's source, or None.
    """

    family: str
    module: str
    source_line: str | None


@dataclass(frozen=True)
class Coverage:
    """What of a graph was recognised.

    Attributes:
        places: by family (:data:`FAMILIES`) how many anchors a match took, and how many there are.
        flops: floating-point operations of the forward pass.
        bytes: bytes that the forward pass would move, each operator run alone.
        left: the anchors that no match took.
    """

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    flops: Share = Share()
    bytes: Share = Share()
    left: tuple[Place, ...] = ()

    def __add__(self, other: Coverage) -> Coverage:
        places = dict(self.places)
        for family, (taken, there) in other.places.items():
            before = places.get(family, (0, 0))
            places[family] = before[0] + taken, before[1] + there
        return Coverage(places, self.flops + other.flops, self.bytes + other.bytes, self.left + other.left)


def measure(graph: fx.Graph, taken: Iterable[str]) -> Coverage:
    """Measure a graph as it was before the passes.

    Args:
        graph: the retraced graph, whose nodes carry ``meta["val"]``.
        taken: names of the nodes that matches took.
    """
    gone = frozenset(taken)
    places: dict[str, tuple[int, int]] = {}
    flops, moved = Share(), Share()
    left: list[Place] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for family in _families(node):
            hit, there = places.get(family, (0, 0))
            places[family] = hit + (node.name in gone), there + 1
            if node.name not in gone:
                left.append(Place(family, module_path(node), source_line(node)))
        fused, library = node.name in gone, node.target in _PRODUCTS | _ATTENTION
        flops += _share(_flops(node), fused, library)
        moved += _share(_bytes(node), fused, library)
    return Coverage({f: places[f] for f in FAMILIES if f in places}, flops, moved, tuple(left))


def _share(cost: int, fused: bool, library: bool) -> Share:
    return Share(cost if fused else 0, cost if library and not fused else 0, cost)


# -- places -----------------------------------------------------------------------------------------------------------


def _families(node: fx.Node) -> Iterator[str]:
    if node.target in _LAYER_NORMS:
        yield "layer norm"
    elif node.target is aten.rms_norm.default:
        yield "norm"
    elif (statistic := _statistic_of_norm(node)) is not None:
        yield "layer norm" if _is_variance(statistic) else "norm"
    if _is_rotation(node):
        yield "rotation"
    if node.target in _ATTENTION or (node.target in _SOFTMAX and _weighs_values(node)):
        yield "attention"
    if _is_gated(node):
        yield "gated MLP"
    if _is_grouped_product(node):
        yield "grouped expert product"
    elif node.target in _PRODUCTS and _reads_an_expert(node):
        yield "single expert product"
    elif node.target in _LINEAR:
        yield "linear"
    if node.target in _LOSSES:
        yield "loss"


def _statistic_of_norm(node: fx.Node) -> fx.Node | None:
    """The mean of squares, or variance, of which a node is 1 / √ in any spelling, something small added."""
    if node.target is aten.pow.Tensor_Scalar:
        inverse = node.args[1] == -0.5
    elif node.target is aten.sqrt.default:
        inverse = any(user.target in (aten.div.Tensor, aten.reciprocal.default) for user in node.users)
    else:
        inverse = node.target is aten.rsqrt.default
    source = node.args[0] if inverse else None
    for _ in range(3):  # + eps, a conversion
        if not isinstance(source, fx.Node):
            return None
        if source.target in (aten.mean.dim, aten.var.correction):
            return source
        source = source.args[0] if source.args else None
    return None


def _is_variance(statistic: fx.Node) -> bool:
    """Whether it is the mean square of what the mean was subtracted from."""
    if statistic.target is aten.var.correction:
        return True
    squares = _under_views(statistic.args[0])
    centred = _under_views(squares.args[0]) if squares.args else squares
    if centred.target is not aten.sub.Tensor:
        return False
    mean = _under_views(centred.args[1])
    return mean.target is aten.mean.dim and _under_views(mean.args[0]) is _under_views(centred.args[0])


def _is_rotation(node: fx.Node) -> bool:
    """cat or stack of a negated part and another; sums and differences of products side by side; complex numbers."""
    if node.target is aten.view_as_complex.default:
        return any(user.target is aten.mul.Tensor for user in node.users)
    if node.target not in (aten.cat.default, aten.stack.default) or not node.args:
        return False
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return False
    kinds = [_under_views(p).target for p in parts if isinstance(p, fx.Node)]
    return aten.neg.default in kinds or set(kinds) == {aten.sub.Tensor, aten.add.Tensor}


def _weighs_values(softmax: fx.Node) -> bool:
    """Whether a matrix product reads the weights: a router's softmax is no attention."""
    todo, seen = list(softmax.users), set()
    through = {aten.dropout.default, aten.expand.default, aten.view.default, aten._unsafe_view.default}
    while todo:
        user = todo.pop()
        if user.target in _PRODUCTS - _LINEAR:
            return True
        slices = user.target is aten.slice.Tensor  # a sink's column is cut off
        if user not in seen and (user.target in through or slices or is_cast(user)):
            seen.add(user)
            todo += user.users
    return False


def _is_grouped_product(node: fx.Node) -> bool:
    """PyTorch's product of rows with their experts' weights, or what transformers has where there is none."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _GROUPED


def _reads_an_expert(product: fx.Node) -> bool:
    """Whether a product reads weights that were picked from those of all experts, an input [experts, ...]."""
    for operand in product.all_input_nodes:
        node = operand
        while isinstance(node, fx.Node) and (is_cast(node) or node.target in _TURNS) and node.args:
            node = node.args[0]  # type: ignore[assignment]
        if isinstance(node, fx.Node) and node.target in _PICKS and isinstance(node.args[0], fx.Node):
            experts = _under_views(node.args[0])
            if experts.op == "placeholder" and value(experts).dim() == 3:
                return True
    return False


def _is_gated(node: fx.Node) -> bool:
    # A factor may be a symbolic number.
    tensors = all(isinstance(a, fx.Node) and isinstance(value(a), Tensor) for a in node.args)
    if node.target is not aten.mul.Tensor or not tensors:
        return False
    for activation, gate in (node.args, node.args[::-1]):
        inner = _under_views(activation)
        of = _activated(inner)
        same_shape = len(value(gate).shape) == len(value(activation).shape)
        if of is not None and same_shape and _under_views(gate) not in (of, inner):
            return True
    return False


def _activated(node: fx.Node) -> fx.Node | None:
    """What a node is the activation of."""
    if node.target in _ACTIVATIONS:
        return _under_views(node.args[0])
    if node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in node.args):  # x · sigmoid(slope · x)
        for x, factor in (node.args, node.args[::-1]):
            sigmoid = _under_views(factor)
            if sigmoid.target is not aten.sigmoid.default:
                continue
            inner = _under_views(sigmoid.args[0])
            if inner.target is aten.mul.Tensor and not isinstance(inner.args[1], fx.Node):
                inner = _under_views(inner.args[0])
            if inner is _under_views(x):
                return inner
    return None


def _under_views(node: Any) -> fx.Node:
    """The value behind conversions."""
    while isinstance(node, fx.Node) and is_cast(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


# -- cost -------------------------------------------------------------------------------------------------------------


def _flops(node: fx.Node) -> int:
    result = value(node)
    if node.target in _PRODUCTS:
        operands = [a for a in pytree.tree_leaves(node.args) if isinstance(a, fx.Node)]
        if node.target is aten.einsum.default:
            return 2 * max(_numel(value(a)) for a in operands) * max(1, _last(result))
        if node.target in (aten.addmm.default, aten.baddbmm.default):
            operands = operands[1:]
        return 2 * _numel(result) * _last(value(operands[0]))
    if node.target in _ATTENTION:
        q, k = value(node.args[0]), value(node.args[1])
        return 4 * _numel(q) * _hint(k.shape[-2])
    if _is_free(node):
        return 0
    return sum(_numel(v) for v in pytree.tree_leaves(result) if isinstance(v, Tensor))


def _bytes(node: fx.Node) -> int:
    if _is_free(node):
        return 0
    read = [value(n) for n in node.all_input_nodes]
    moved = [v for v in (*read, *pytree.tree_leaves(value(node))) if isinstance(v, Tensor)]
    return sum(_numel(v) * v.element_size() for v in moved)


def _is_free(node: fx.Node) -> bool:
    """Whether a node moves nothing: a view, an element of a tuple, arithmetic on sizes."""
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target.is_view


def _numel(tensor: Tensor) -> int:
    return math.prod(map(_hint, tensor.shape))


def _last(tensor: Tensor) -> int:
    return _hint(tensor.shape[-1]) if tensor.dim() else 1


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else optimization_hint(size, _SIZE_UNKNOWN)
