"""Compiles every kernel for cards that are not there: ``python -m tests.kernels.compile_for_cards 75 80 …``.

Prints a line of JSON for each kernel and card: what it takes of shared memory, and whether it spills. What is compiled
is what operators would launch on that card: their ``forward`` and ``backward`` get CPU tensors, Triton is told of the
card, and so are the few places of ours that ask for it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from unsloth.kernels import low_rank_product, reasons, thin_products
from unsloth.kernels.capped_attention import capped_attention
from unsloth.kernels.glu import geglu, swiglu
from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth.kernels.nf4 import nf4_dequantize
from unsloth.kernels.paged_attention import in_slices
from unsloth.kernels.rms_norm import add_rms_norm
from unsloth.kernels.rope import rope

PROCESSORS = 108


class Card:
    """The driver of a card that is not there."""

    capability = 90

    @classmethod
    def get_current_target(cls) -> GPUTarget:
        return GPUTarget("cuda", cls.capability, 32)

    @classmethod
    def get_current_device(cls) -> int:
        return cls.capability  # Triton keeps what it compiled by device

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of a launch."""
    started = time.process_time()
    try:
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        found = {"shared": made.metadata.shared, "spills": "st.local" in made.asm["ptx"]}
    except Exception as error:  # noqa: BLE001  a refusal of the compiler is a result
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    say(kernel=self.__name__, **found, seconds=round(time.process_time() - started, 2))


run = JITFunction.run


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def on_card(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that is only talked about."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def norms(dtype: torch.dtype, rows: int) -> None:
    x, weight = empty(rows, 8192, dtype=dtype), empty(8192, dtype=dtype)
    total, y, rstd = add_rms_norm.forward(x, x, weight, 1e-5, 0.0, True)
    add_rms_norm.backward(total, y, total, weight, rstd, 1e-5, 0.0, True, [True, True])


def gates(dtype: torch.dtype, rows: int) -> None:
    gate = empty(rows, 512, dtype=dtype)
    swiglu.forward(gate, gate)
    geglu.backward(gate, gate, gate, False, [True, True])


def rotation(dtype: torch.dtype, rows: int) -> None:
    q, k = (empty(1, heads, rows, 128, dtype=dtype) for heads in (32, 8))
    cos = empty(1, 1, rows, 128, dtype=dtype)
    rope.forward(q, k, cos, cos, False, False, False)


def weights(dtype: torch.dtype, rows: int) -> None:
    packed, blocks = empty(rows * 256, 1, dtype=torch.uint8), rows * 8
    nested = empty(blocks, dtype=torch.uint8), torch.zeros(256), torch.zeros(-(-blocks // 256)), torch.zeros(())
    nf4_dequantize.forward(packed, *nested, rows, 512, 64, 256, dtype)


def products(dtype: torch.dtype, rows: int) -> None:
    """By the tensor memory accelerator on Hopper; by pointers elsewhere, and where rows do not fit the accelerator."""
    p, q = empty(rows, 16, dtype=dtype), empty(512, 16, dtype=dtype)
    for depth in (256, 257) if Card.capability // 10 == 9 else (256,):
        a, b = empty(rows, depth, dtype=dtype), empty(512, depth, dtype=dtype)
        low_rank_product.low_rank_product(a, b.T, p, q.T)


def thin(dtype: torch.dtype, rows: int) -> str | None:
    if reason := thin_products.unsupported(on_card(rows, 512, dtype=dtype), thin_products.WIDEST):
        return reason
    rank = thin_products.WIDEST
    dys, Bs = [empty(rows, 512, dtype=dtype)] * 3, [empty(512, rank, dtype=dtype)] * 3
    thin_products.up_products(dys, empty(rows, 3 * rank, dtype=dtype), Bs, [1.0] * 3)
    x, weight = empty(rows, 512, dtype=dtype), empty(512, dtype=dtype)
    thin_products.down_product(empty(rows, rank, dtype=dtype), x, torch.zeros(rows), weight, 1.0)
    xas = empty(rows, rank, dtype=dtype), empty(rows, 2 * rank, dtype=dtype)
    thin_products.glu_products(*dys, 0, *xas, Bs[:2], [1.0] * 2)
    return None


def losses(dtype: torch.dtype, rows: int) -> None:
    hidden, weight = empty(rows, 16, dtype=dtype), empty(136, 16, dtype=dtype)
    settings = (-100, True, 0.5, 30.0, True, [True, True, False])
    linear_cross_entropy.forward(hidden, weight, None, torch.zeros(rows, dtype=torch.int64), *settings)


def capped(dtype: torch.dtype, rows: int) -> str | None:
    shapes = (1, 2, rows, 256), (1, 1, rows, 256)
    q, k = (on_card(*shape, dtype=dtype) for shape in shapes)
    if reason := capped_attention.supports(q, k, k, None, 0.1, 30, 50.0):
        return reason
    q, k = (empty(*shape, dtype=dtype) for shape in shapes)
    starts, lse = empty(1, rows, dtype=torch.int32), torch.zeros(1, 2, rows)
    capped_attention.forward(q, k, k, starts, 0.1, 30, 50.0)
    capped_attention.backward(q, q, k, k, starts, q, lse, 0.1, 30, 50.0, [True] * 3)
    return None


def paged(dtype: torch.dtype, rows: int) -> None:
    q, k, pages = (empty(*shape, dtype=dtype) for shape in ((2, 32, 1, 256), (2, 8, 1, 256), (8, 8, 32, 256)))
    tables, lengths = empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int32)
    in_slices(8, q, k, k, pages, pages, tables, lengths, 0.1, None, None)


SAMPLES: tuple[Callable[[torch.dtype, int], str | None], ...] = (
    norms, gates, rotation, weights, products, thin, losses, capped, paged,
)  # fmt: skip
"""Each compiles what its operators launch, or says why they refuse to. Widest first: they take most memory."""


def say(**found: Any) -> None:
    sys.stdout.write(json.dumps({"card": Card.capability, **found}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Compile for the cards named by their capability on the command line."""
    triton.runtime.driver.set_active(Card)
    JITFunction.run = compile_only
    low_rank_product._multiprocessors = thin_products._multiprocessors = lambda device: PROCESSORS
    reasons._capability = lambda device: divmod(Card.capability, 10)
    low_rank_product._is_hopper = lambda device: Card.capability // 10 == 9
    names = sys.argv[1:]
    for place, name in enumerate(names):
        Card.capability = int(name)
        # Launches are remembered by layout, of which the number of rows is part and what is compiled is not.
        rows = 64 + 16 * place
        for sample in SAMPLES:
            if reason := sample(torch.float16 if Card.capability < 80 else torch.bfloat16, rows):
                say(refused=sample.__name__, reason=reason)


if __name__ == "__main__":
    main()
