"""bitsandbytes' 4-bit weights (arXiv:2305.14314): each product with one becomes a linear layer with an unpacked weight.

Three spellings come out of one library. ``gemm_4bit`` where the activation needs no gradient; an autograd function
around it, whose body computes the product and whose backward unpacks the weight again; and a weight unpacked by
``dequantize_4bit`` for whatever uses it. A frozen weight that the graph unpacks itself costs nothing to keep, since
backward can unpack it again, and an adapter beside the layer sees an ordinary product.

The two bodies of an autograd function are Dynamo's, not ours. They are evaluated on symbols: every call in them has to
have a rule here, forward has to be x Wᵀ + bias, and backward grad W for x, with the same W, and nothing for the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...kernels.nf4 import nf4_dequantize
from ..pattern import arguments, describe
from ..rewrite import Call, Match, Miss, source_line, value

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


class Nf4:
    """Finds products with NF4 weights."""

    name = "nf4"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        for node in graph.nodes:
            read = _READERS.get(_name(node))
            if read is None:
                continue
            try:
                if match := read(node):
                    yield match
            except Unreadable as miss:
                yield Miss(str(miss), node, source_line(node), 1)


class Unreadable(Exception):
    """Why a product with a 4-bit weight is left as it is."""


# -- what a value is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """The bytes of a packed weight, in whatever shape."""

    node: fx.Node


@dataclass(frozen=True)
class Scales:
    """One scale per block: ``absmax``, or ``code[absmax] * nested_absmax + offset``."""

    absmax: fx.Node
    code: fx.Node | None = None
    nested_absmax: fx.Node | None = None
    offset: fx.Node | None = None
    nested_block: int = 0


@dataclass(frozen=True)
class Weight:
    """A packed weight. Equal ones have equal values, up to the dtype that they are unpacked to."""

    packed: fx.Node
    scales: Scales
    shape: tuple[Any, ...]
    block: int

    def unpacked(self, dtype: torch.dtype) -> Call:
        s = self.scales
        scales = (s.absmax, s.code, s.nested_absmax, s.offset)
        return Call(nf4_dequantize, (self.packed, *scales, *self.shape, self.block, s.nested_block, dtype))


@dataclass(frozen=True)
class Product:
    """x W, or x Wᵀ + bias if ``transposed``."""

    x: Any
    weight: Weight
    transposed: bool
    bias: fx.Node | None = None


GRADIENT = "the gradient of the product"
SIZE = "a size of its activation, or whether it is 0"


# -- rules: one per call that a body may make, with its arguments in order ---------------------------------------------


def _codes(x: fx.Node | Codes, *_: Any) -> Codes:
    node: Any = x.node if isinstance(x, Codes) else x
    while node.target in _VIEWS:
        node = node.args[0]
    return Codes(node)


def _scales(quantised: fx.Node, absmax: fx.Node, code: fx.Node, block: int, dtype: torch.dtype) -> Scales:
    if dtype != torch.float32:
        raise Unreadable(f"the scales of its weight are rounded to {dtype}")
    return Scales(quantised, code, absmax, None, block)


def _shifted(scales: Scales, offset: fx.Node) -> Scales:
    if not isinstance(scales, Scales) or scales.code is None or scales.offset is not None:
        raise Unreadable("it adds something that is no offset of scales")
    return replace(scales, offset=offset)


def _weight(packed: fx.Node | Codes, scales: Scales | fx.Node, block: int, kind: str, shape: Any, *_: Any) -> Weight:
    if kind != "nf4":
        raise Unreadable(f"its weight is {kind}, not nf4")
    if len(shape) != 2:
        raise Unreadable(f"its weight has {len(shape)} dimensions")
    if not isinstance(scales, Scales):
        scales = Scales(scales)
    elif scales.offset is None and scales.code is not None:
        raise Unreadable("the nested scales of its weight have no offset")
    return Weight(_codes(packed).node, scales, tuple(shape), block)


def _product(
    x: Any,
    packed: fx.Node | Codes,
    shape: Any,
    absmax: fx.Node,
    block: int,
    kind: str,
    bias: fx.Node | None,
    quantised: fx.Node | None,
    code: fx.Node | None,
    offset: fx.Node | None,
) -> Product:
    # bitsandbytes' operator nests 256 scales, always.
    scales = Scales(absmax) if quantised is None else Scales(quantised, code, absmax, offset, 256)
    return Product(x, _weight(packed, scales, block, kind, shape), True, bias)


def _gradient(x: Any, weight: Any) -> Product:
    if not isinstance(weight, Weight):
        raise Unreadable("it has a product with something else than its weight")
    return Product(x, weight, False)


_RULES: Mapping[str, Callable[..., Any]] = {
    "view": _codes,
    "dequantize_blockwise": _scales,
    "iadd": _shifted,
    "add": _shifted,
    "dequantize_4bit": _weight,
    "gemm_4bit": _product,
    "matmul": _gradient,
    "numel": lambda x: SIZE,
    "eq": lambda size, number: SIZE,
}


def _evaluated(body: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """What a body returns for these inputs."""
    placeholders = body.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(inputs):
        raise Unreadable(f"its body takes {len(placeholders)} inputs and is given {len(inputs)}")
    values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    for node in body.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if node.op != "placeholder":
            values[node] = _called(node, values)
    raise AssertionError("a graph without an output")


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    name = _name(node)
    if name == "_set_grad_enabled":  # neither body is differentiated
        return None
    if name == "to":
        # bitsandbytes unpacks to the dtype of the original weight and converts, which may round twice; ours rounds
        # once. Whatever is not the weight has to stay what it is.
        source: Any = node.args[0]
        if isinstance(values[source], Weight) or _dtype(source) == _dtype(node):
            return values[source]
    rule, is_operator = _RULES.get(name), isinstance(node.target, torch._ops.OpOverload)
    if rule is None or (node.kwargs and not is_operator):
        raise Unreadable(f"its body calls {describe(node)}, which is no part of a product with a 4-bit weight")
    given: Any = tuple(arguments(node).values()) if is_operator else node.args
    return rule(*fx.map_arg(given, values.__getitem__))


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["example_value"].dtype


# -- the three spellings -----------------------------------------------------------------------------------------------


def _from_gemm(node: fx.Node) -> Match:
    return _linear(node, _product(*arguments(node).values()), frozenset({node}), "without gradient")


def _from_unpacking(node: fx.Node) -> Match:
    packed, absmax, *rest, dtype = arguments(node).values()
    weight = _weight(packed, _read_scales(absmax), *rest)
    unpacked = weight.unpacked(dtype)
    return Match(nf4_dequantize, unpacked.args, {node: 0}, frozenset({node}), "unpacked weight")


def _read_scales(absmax: fx.Node) -> Scales:
    """Scales that the graph computes before it unpacks a weight; where they are something else, they are plain."""
    inner = absmax.args[0] if _name(absmax) == "add" else None
    if isinstance(inner, fx.Node) and _name(inner) == "dequantize_blockwise":
        given = arguments(absmax)
        if given["alpha"] == 1 and isinstance(given["other"], fx.Node):
            return _shifted(_scales(*arguments(inner).values()), given["other"])
    return Scales(absmax)


def _from_function(node: fx.Node) -> Match | None:
    """A product in an autograd function; None for functions that have nothing to do with 4-bit weights."""
    bodies, inputs = node.args[:2], node.args[2:]
    forward, backward = (_body(body) for body in bodies)
    if not any(_name(n) in ("gemm_4bit", "dequantize_4bit") for n in forward.graph.nodes):
        return None
    match _evaluated(forward, inputs):
        case ((Product(transposed=True) as product, *others), saved):
            pass
        case (Product(transposed=True) as product, saved):
            others = []
        case _:
            raise Unreadable("its forward is not one product")
    if any(node.kwargs.get(key) for key in ("non_differentiable_idx", "dirty_idx")):
        raise Unreadable("its product is not differentiable")
    # Before torch 2.13 Dynamo also returns what else forward computes: codes in another shape, sizes.
    results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if any(not isinstance(o, Codes) and o != SIZE for o in others) or any(
        i != 0 and r.users for i, r in results.items()
    ):
        raise Unreadable("its forward has other results beside the product")
    _check_backward(_evaluated(backward, (GRADIENT, *(None for _ in others), *saved)), inputs, product)
    result = results.get(0, node)
    return _linear(result, product, frozenset({node, result}), "autograd function")


def _check_backward(gradients: Any, inputs: Sequence[Any], product: Product) -> None:
    if not isinstance(gradients, (tuple, list)) or len(gradients) != len(inputs):
        raise Unreadable("its backward does not return one gradient per input")
    for given, gradient in zip(inputs, gradients, strict=True):
        if given is product.x and gradient != Product(GRADIENT, product.weight, False):
            raise Unreadable("its backward is not the product with the same weight")
        if given is not product.x and gradient is not None:
            raise Unreadable("its backward gives a gradient to something else than x")


def _linear(node: fx.Node, product: Product, interior: frozenset[fx.Node], variant: str) -> Match:
    x, bias = product.x, product.bias
    if not isinstance(x, fx.Node) or value(x).dtype != value(node).dtype:
        raise Unreadable("its activation is not an input of the product")
    if bias is not None and value(bias).dtype != value(x).dtype:
        raise Unreadable(f"its bias is {value(bias).dtype} and x is {value(x).dtype}")
    weight = product.weight.unpacked(value(x).dtype)
    args = (x, weight) if bias is None else (x, weight, bias)
    return Match(aten.linear.default, args, {node: 0}, interior, variant)


_READERS: Mapping[str, Callable[[fx.Node], Match | None]] = {
    "gemm_4bit": _from_gemm,
    "dequantize_4bit": _from_unpacking,
    "autograd_function_apply": _from_function,
}


# -- names -------------------------------------------------------------------------------------------------------------


def _name(node: fx.Node) -> str:
    """What a node calls, in a graph of ATen operators as in one of Dynamo's; "" for an input."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname if node.target.namespace in ("aten", "bitsandbytes") else str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _body(node: Any) -> fx.GraphModule:
    root = node.graph.owning_module
    body = root.get_submodule(node.target)
    assert isinstance(body, fx.GraphModule)
    return body


RECOGNISER = Nf4()
