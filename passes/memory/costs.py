"""What a value costs: bytes to keep, seconds to compute again, and the workspace its operator needs meanwhile.

Nothing is run for it: FLOPs and bytes come from the operators' declarations, torch's FLOP formulas and the shapes in
the graph; seconds from a roofline over what a device reaches. On a machine without a device the figures are those of
the one that is asked about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from ...kernels.logit_chunks import chunk_rows, padded_width
from ...kernels.operator import NAMESPACE
from ...kernels.thin_products import up_workspace
from .joint import hint, is_free, is_view, maker, unpacks

LAUNCH_SECONDS = 3e-6
"""What a kernel takes at least."""
ATTENTION_EFFICIENCY = 0.8
"""Attention kernels against matrix products, measured on an H100 at 32k tokens."""
LIBRARY_WORKSPACE = 32 << 20
"""cuBLAS' own workspace, allocated at the first product and held: 32 MiB on Hopper, less elsewhere."""


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches, sustained.

    Attributes:
        name: the device.
        flops: per second, of products in half precision.
        bandwidth: bytes per second of device memory, read and written together.
        link: bytes per second between pinned host memory and the device, either way.
        memory: bytes of device memory.
    """

    name: str
    flops: float
    bandwidth: float
    link: float
    memory: int


_GIB = 1 << 30

# Measured on the H100; elsewhere data sheets (dense, half precision, float32 sums), at the shares that an H100 reaches.
DEVICES = {
    "H200": Ceilings("H200", 690e12, 4.1e12, 55e9, 141 * 10**9),
    "H100": Ceilings("H100", 690e12, 2.97e12, 55e9, 80 * _GIB),
    "B200": Ceilings("B200", 1550e12, 7.1e12, 55e9, 180 * 10**9),
    "A100": Ceilings("A100", 250e12, 1.75e12, 24e9, 80 * _GIB),
    "L40S": Ceilings("L40S", 250e12, 0.76e12, 24e9, 48 * _GIB),
    "4090": Ceilings("RTX 4090", 150e12, 0.9e12, 24e9, 24 * _GIB),
    "3090": Ceilings("RTX 3090", 62e12, 0.83e12, 24e9, 24 * _GIB),
    "T4": Ceilings("T4", 40e12, 0.27e12, 12e9, 16 * _GIB),
}
"""By a part of the device's name."""
MEASURED = ("H100",)
"""Devices whose row was measured."""


def ceilings(name: str | None = None) -> Ceilings:
    """What a device reaches; of the current CUDA device, or of an H100 where there is none.

    Args:
        name: as ``torch.cuda.get_device_name`` has it, or a part of it; None measures the current device the first time
            that anyone asks, unless its row of the table was measured.

    Returns:
        the table's row, an H100's for a name that it does not know.
    """
    if name is None and torch.cuda.is_available():
        from .measured import measured_ceilings

        card = torch.cuda.get_device_name()
        return _row(card) if any(part in card for part in MEASURED) else measured_ceilings(_row(card))
    return _row(name or "H100")


def _row(name: str) -> Ceilings:
    return next((row for part, row in DEVICES.items() if part.lower() in name.lower()), DEVICES["H100"])


# -- sizes -------------------------------------------------------------------------------------------------------------


class Sizes:
    """Bytes, FLOPs and seconds of a graph's values, at the sizes it was traced with or at others.

    Args:
        device: what seconds are counted on.
        at: a number for each symbol that is to have another size, by the symbol's name.
    """

    def __init__(self, device: Ceilings | None = None, at: Mapping[str, int] | None = None) -> None:
        self.device = device or ceilings()
        self.at = dict(at or {})
        self._evaluated: dict[Any, int] = {}
        self._prices: dict[Any, tuple[float, int]] = {}
        self._of_node: dict[fx.Node, tuple[float, int]] = {}

    def number(self, size: Any) -> int:
        """An integer for a possibly symbolic size."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._evaluated:
            symbols = {s: self.at[str(s)] for s in expression.free_symbols if str(s) in self.at}
            known = sympy.sympify(expression.xreplace(symbols))
            self._evaluated[expression] = int(known) if known.is_number else hint(size)
        return self._evaluated[expression]

    def bytes(self, node: fx.Node) -> int:
        """Bytes of a tensor as it lies in memory."""
        return self._nbytes(node.meta["val"])

    def _nbytes(self, tensor: Tensor) -> int:
        shape, strides = [self.number(s) for s in tensor.shape], [self.number(s) for s in tensor.stride()]
        if 0 in shape:
            return 0
        span = 1 + sum((s - 1) * stride for s, stride in zip(shape, strides, strict=True))
        return max(span, 1) * tensor.element_size()

    def seconds(self, node: fx.Node) -> float:
        """Time of the operator behind a value: arithmetic or traffic, whichever takes longer.

        A packed weight that it reads is unpacked for it, and that counts too.
        """
        operation = maker(node)
        if operation.op != "call_function" or is_view(operation):
            return 0.0
        own = self._price(operation)[0]
        packed = [n for n in operation.all_input_nodes if unpacks(n.target) and all(map(is_free, n.all_input_nodes))]
        return own + sum(self._price(n)[0] for n in packed)

    def flops(self, node: fx.Node) -> float:
        """Floating-point operations of a call."""
        given = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
        args, kwargs = pytree.tree_map_only((Tensor, torch.SymInt), self._concrete, given)
        results = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        return _flops(node.target, args, kwargs, [self._concrete(r) for r in results])

    def workspace(self, node: fx.Node) -> int:
        """Bytes that the operator behind a value holds while it runs, beside what it reads and returns."""
        operation = maker(node)
        return self._price(operation)[1] if operation.op == "call_function" else 0

    def _price(self, node: fx.Node) -> tuple[float, int]:
        if node not in self._of_node:
            self._of_node[node] = self._price_alike(node)
        return self._of_node[node]

    def _price_alike(self, node: fx.Node) -> tuple[float, int]:
        """Layers repeat, and so do their prices."""
        given = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
        leaves, _ = pytree.tree_flatten(given)
        results = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        key = (node.target, *(self._key(v) for v in (*leaves, *results)))
        if key not in self._prices:
            self._prices[key] = self._priced(node.target, given, results)
        return self._prices[key]

    def _key(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return (tuple(self.number(s) for s in value.shape), value.dtype)
        return self.number(value) if isinstance(value, torch.SymInt) else repr(value)

    def _priced(self, target: Any, given: Any, results: list[Tensor]) -> tuple[float, int]:
        args, kwargs = pytree.tree_map_only((Tensor, torch.SymInt), self._concrete, given)
        read = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        written = [self._concrete(r) for r in results]
        traffic = sum(t.numel() * t.element_size() for t in (*read, *written))
        wide = any(t.dtype in (torch.float32, torch.float64) for t in written) and not _is_ours(target)
        rate = self.device.flops / (8 if wide else 1)
        if "attention" in str(target):
            rate *= ATTENTION_EFFICIENCY
        flops = _flops(target, args, kwargs, written)
        seconds = max(LAUNCH_SECONDS, flops / rate, traffic / self.device.bandwidth)
        return seconds, _workspace(target, args, read, written)

    def _concrete(self, value: Any) -> Any:
        """The value without data, at the sizes asked for."""
        if isinstance(value, torch.SymInt):
            return self.number(value)
        return torch.empty([self.number(s) for s in value.shape], dtype=value.dtype, device="meta")


def _is_ours(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


def _flops(target: Any, args: Any, kwargs: Any, written: list[Tensor]) -> float:
    """By formula; an operator without one does one per element, so that nothing is free."""
    formula = flop_registry.get(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else None
    if formula is not None:
        # Before PyTorch 2.13 each size that depends on data is guessed by itself; a formula may ask whether they fit.
        with contextlib.suppress(AssertionError):
            return float(formula(*args, **kwargs, out_val=_outputs(target, args, written)))
    return float(sum(t.numel() for t in written))


def _outputs(target: torch._ops.OpOverload, args: Any, written: list[Tensor]) -> Any:
    """An operator's results as it returns them: backward of a convolution has None where no gradient is wanted."""
    masks = [a for a in args if isinstance(a, (list, tuple)) and a and all(isinstance(flag, bool) for flag in a)]
    if masks and len(masks[-1]) == len(target._schema.returns) and sum(masks[-1]) == len(written):
        results = iter(written)
        return tuple(next(results) if wanted else None for wanted in masks[-1])
    return written[0] if len(written) == 1 else tuple(written)


# -- workspace ---------------------------------------------------------------------------------------------------------


def _workspace(target: Any, args: Any, read: list[Tensor], written: list[Tensor]) -> int:
    name = getattr(target, "_opname", "")
    rule = _WORKSPACES.get(name)
    return int(rule(args, read, written)) if rule is not None else 0


def _of_chunks(hidden: Tensor, weight: Tensor, summed: bool = False) -> float:
    """A chunk of logits, and what it is reduced to."""
    rows = hidden.numel() // max(hidden.shape[-1], 1)
    step = chunk_rows(rows, weight.shape[0], hidden.element_size(), weight.shape[1] if summed else 0)
    return step * padded_width(weight.shape[0]) * hidden.element_size() + 4 * rows


def _of_loss(args: Any, read: list[Tensor], written: list[Tensor]) -> float:
    """The chunk, and where the head is trained the float32 sum of its gradient."""
    hidden, weight, wants = args[0], args[1], args[-1]
    return _of_chunks(hidden, weight, wants[1]) + (4 * weight.numel() if wants[1] else 0)


def _of_token_losses(args: Any, read: list[Tensor], written: list[Tensor]) -> float:
    hidden, weight = args[0], args[1]
    return _of_chunks(hidden, weight)


def _of_token_losses_backward(args: Any, read: list[Tensor], written: list[Tensor]) -> float:
    """None where forward has made slopes; else those of the loss."""
    hidden, weight, needs = args[2], args[3], args[-1]
    return 0 if hidden is None else _of_chunks(hidden, weight) + (4 * weight.numel() if needs[1] else 0)


def _of_attention_backward(args: Any, read: list[Tensor], written: list[Tensor]) -> float:
    """The libraries sum the gradient of q in float32, and that of keys and values per query head."""
    q, k = args[1], args[2]
    heads = q.shape[1] / max(k.shape[1], 1)
    per_head = 2 * k.numel() * heads * k.element_size() if heads > 1 else 0
    statistics = 4 * q.numel() / max(q.shape[-1], 1)
    return 4 * q.numel() + per_head + statistics


def _of_up_gradients(dys: Any, Bs: Any) -> int:
    """What the gradients that B passes on are in float32, for each block of a large matrix' columns."""
    half = dys[0].dtype in (torch.bfloat16, torch.float16)
    rows = dys[0].numel() // max(dys[0].shape[-1], 1)
    return up_workspace(rows, [dy.shape[-1] for dy in dys], [B.shape[1] for B in Bs]) if half else 0


def _of_up_backward(args: Any, read: list[Tensor], written: list[Tensor]) -> int:
    count = (len(args) - 1) // 3
    return _of_up_gradients(args[:count], args[count + 1 : 2 * count + 1])


def _of_lora_backward(args: Any, read: list[Tensor], written: list[Tensor]) -> int:
    return _of_up_gradients(args[:1], [args[5]]) if args[-1][-1] else 0


def _of_loras_backward(args: Any, read: list[Tensor], written: list[Tensor]) -> int:
    """Of a gradient per layer, x, A, a weight and a B per layer, xa, a scale per layer, and what is wanted."""
    count = (len(args) - 4) // 4
    return _of_up_gradients(args[:count], args[2 * count + 2 : 3 * count + 2]) if all(args[-1][-count:]) else 0


_WORKSPACES = {
    **{f"lora_up_backward_{count}": _of_up_backward for count in (1, 2, 3)},
    "lora_linear_backward": _of_lora_backward,
    **{f"lora_linears_{count}_backward": _of_loras_backward for count in (2, 3)},
    "linear_cross_entropy": _of_loss,
    "token_cross_entropy": _of_token_losses,
    "token_cross_entropy_backward": _of_token_losses_backward,
    "attention_backward": _of_attention_backward,
    "_scaled_dot_product_flash_attention_backward": _of_attention_backward,
    "_scaled_dot_product_cudnn_attention_backward": _of_attention_backward,
}
"""By the operator's name: bytes from its arguments, what it reads and what it writes."""
