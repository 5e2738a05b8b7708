"""A frozen linear layer and its low-rank adapter (arXiv:2106.09685): x Wᵀ + bias + scale · (z Aᵀ) Bᵀ.

z is x itself or x after dropout; PEFT widens it where adapters are kept in float32. Under autocast the three products
convert what they read, and the operator is given the same; otherwise mixed types are the operator's to refuse.

DoRA (arXiv:2402.09353) gives each row of W + scale · B A a magnitude m. PEFT adds what that changes to the layer's
result r: r + (m - 1) (r - bias) + m · scale · (x Aᵀ) Bᵀ, which is m times an adapted layer without bias, and the bias.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from ...kernels.lora_linear import lora_linear
from ..pattern import Found, Pattern, capture, cast, function, number, widened
from ..rewrite import Call, Match, Miss, value
from ..search import search
from ..soundness import same_sizes

aten = torch.ops.aten
linear = function("linear", aten.linear.default)
clone = function("clone", aten.clone.default, check=lambda node, rest: None)


def low_rank(z: Pattern, which: str = "") -> Pattern:
    """xa = z Aᵀ."""
    return cast(capture(f"xa{which}", linear(z, capture(f"A{which}"))))


def adapter(z: Pattern, which: str = "") -> Pattern:
    """scale · xa Bᵀ, scaled after the product, before it, or not at all."""
    xa, B, scale = low_rank(z, which), capture(f"B{which}"), number(f"scale{which}")

    def update(xa: Pattern) -> Pattern:
        return cast(capture(f"update{which}", linear(xa, B)))

    return cast(update(xa) * scale) | update(cast(xa * scale)) | update(xa)


def is_one_layer(node: fx.Node, found: Found) -> str | None:
    base = value(found["base"]).dtype
    scaled = torch.promote_types(base, value(found["m"]).dtype) if "m" in found.captures else base
    if value(node).dtype != scaled:
        return f"the result is {value(node).dtype} and the base product is {base}"
    if not isinstance(found.captures.get("scale", 1.0), (int, float)):
        return "the scale is not known when compiling"
    if _is_trained(found["weight"]):
        return "the base weight is trained too"
    return None


def reads_one_value(node: fx.Node, found: Found) -> str | None:
    """Whether base and adapter multiply the same numbers, although each may convert x by itself."""
    x, read = value(found["x"]), value(found["read"])
    lossless = torch.promote_types(x.dtype, read.dtype) == read.dtype
    if lossless or (_is_uniform(found) and read.dtype == value(found["base"]).dtype):
        return None
    return f"the adapter reads x as {x.dtype} and the base product as {read.dtype}"


def magnifies_features(node: fx.Node, found: Found) -> str | None:
    if "unbiased" in found.captures and found["base"].args[2:] != (found["bias"],):
        return "what is subtracted from the base product is not its bias"
    shape, features = value(found["m"]).shape, value(found["base"]).shape[-1]
    if all(same_sizes((size,), (1,)) for size in shape[:-1]) and same_sizes(shape[-1:], (features,)):
        return None
    return f"the magnitude has shape {tuple(shape)}, not one value per feature"


def _is_uniform(found: Found) -> bool:
    """Whether all products are of the result's type; where they read another one, autocast converts for them."""
    return len({value(found[name]).dtype for name in ("base", "xa", "update")}) == 1


def _is_trained(weight: fx.Node) -> bool:
    """Whether a weight is, or is computed from, an input of the graph that wants a gradient."""
    seen, todo = set[fx.Node](), [weight]
    while todo:
        node = todo.pop()
        if node.op == "placeholder" and getattr(node.meta.get("example_value"), "requires_grad", False):
            return True
        todo += (n for n in node.all_input_nodes if n not in seen)
        seen.update(node.all_input_nodes)
    return False


x, weight, bias = capture("x"), capture("weight"), capture("bias")
read = capture("read", cast(x))
product = capture("base", linear(read, weight) | linear(read, weight, bias))
base = product | clone(product)  # PEFT copies the result of a 4-bit layer


def layer(z: Pattern) -> Pattern:
    return cast(base + adapter(z)).where(is_one_layer)


z, B, scale, m = capture("z"), capture("B"), number("scale"), capture("m")


def dora(z: Pattern) -> Pattern:
    update = cast(capture("update", linear(low_rank(z), B)))
    scaled = cast(m * update) * scale | m * update
    unbiased = capture("unbiased", base - bias) | base
    return (cast(base) + (cast((m - 1) * unbiased) + scaled)).where(magnifies_features).where(is_one_layer)


LORA = {
    "DoRA": dora(widened(x)).where(reads_one_value),
    "adapter on x": layer(widened(x)).where(reads_one_value),
    "adapter on another input": layer(z),
}
NEAR = {
    "a second adapter of the layer stays outside": layer(z) + adapter(capture("z 2"), " 2"),
    "B has a bias": base + cast(linear(low_rank(z), B, capture("bias of B")) * scale),
    "the update is scaled by a tensor": linear(low_rank(z), B) * capture("magnitude"),
    "the update is not added to the product of a linear layer": capture("other") + cast(linear(low_rank(z), B) * scale),
}


class LoraLinear:
    """Finds frozen linear layers with an adapter."""

    name = "lora_linear"

    def find(self, graph: fx.Graph) -> Iterator[Match | Miss]:
        for result in search(graph, LORA, heart=frozenset({aten.linear.default}), close=5, near=NEAR):
            yield result if isinstance(result, Miss) else _match(*result)


def _match(node: fx.Node, found: Found) -> Match:
    bound = found.captures
    tensors = (bound["read"], bound.get("z"), bound["weight"], bound.get("bias"), bound["A"], bound["B"])
    scale = float(bound.get("scale", 1.0))
    if found.variant == "DoRA":
        return _magnified(node, found, tensors, scale)
    converted = tuple(range(len(tensors))) if _is_uniform(found) else ()
    return Match(lora_linear, (*tensors, scale), {node: 0}, found.interior, found.variant, converted)


def _magnified(node: fx.Node, found: Found, tensors: tuple[fx.Node | None, ...], scale: float) -> Match:
    """m times the adapted layer without its bias, and the bias."""
    dtype = value(found["base"]).dtype

    def converted(tensor: fx.Node | None) -> fx.Node | Call | None:
        if tensor is None or value(tensor).dtype == dtype or not _is_uniform(found):
            return tensor
        return Call(aten._to_copy.default, (tensor,), {"dtype": dtype})  # as autocast does

    x, z, weight, bias, A, B = map(converted, tensors)
    inside, outside = (None, bias) if "unbiased" in found.captures else (bias, None)
    layer = Call(operator.getitem, (Call(lora_linear, (x, z, weight, inside, A, B, scale)), 0))
    if outside is None:
        return Match(aten.mul.Tensor, (layer, found["m"]), {node: 0}, found.interior, found.variant)
    scaled = Call(aten.mul.Tensor, (layer, found["m"]))
    return Match(aten.add.Tensor, (scaled, outside), {node: 0}, found.interior, found.variant)


RECOGNISER = LoraLinear()
