"""``unsloth.plan``: what a training step of a model would need, and how it would fit; without weights, without a GPU.

The model is built from its configuration on the meta device and traced with a few layers, which stand for the others
(``passes/memory/repeated.py``).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ..compiler.joint import TraceError, faked, trace
from ..compiler.options import Options, parse_bytes
from ..kernels.nf4 import nf4_dequantize
from ..models import presets
from ..models.adapters import add_lora
from ..models.source import ModelError, explained, locate
from ..passes.memory.costs import LIBRARY_WORKSPACE, Ceilings, Sizes, ceilings
from ..passes.memory.floor import Floor
from ..passes.memory.liveness import MOMENTS
from ..passes.memory.partition import half_of_host_memory
from ..passes.memory.plan import Plan
from ..passes.memory.planner import Planner
from ..passes.memory.repeated import Deep
from ..passes.memory.timeline import Standing, Timeline
from ..passes.memory.within import fastest_within
from ..passes.memory.words import gib

SHARE_LEFT = 0.04
"""Of a device's memory, for what the allocator cannot use."""
CONTEXT = 600 << 20
"""Bytes that CUDA and its kernels take before anything is allocated."""
TRACED = 4
"""Periods of layers that are traced for all: two ends, one that is repeated, and one before it."""
PAIR = 2
"""Layers that a residual may span: so many are traced between the ends."""
ROUND = 64
"""Sequence lengths are given in multiples of so many tokens."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step needs; ``print`` it, or draw it.

    Attributes:
        model: its name, and what is trained.
        batch, seq: of the step.
        budget: peak bytes that it may have.
        plan: what is kept and what is computed again, with the predicted peak, its parts and the seconds it costs.
        host_memory: bytes of host memory that it may use.
        smallest, fastest: peak bytes of the two extremes; host memory is used for the smallest.
        timeline: bytes over the step.
        longest_sequence: tokens that fit at this batch; 0 where not even the weights do.
        largest_batch: sequences that fit at this length.
        seconds: of planning, the trace left out.
    """

    model: str
    batch: int
    seq: int
    budget: int
    host_memory: int
    plan: Plan
    smallest: int
    fastest: int
    timeline: Timeline
    longest_sequence: int
    largest_batch: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.plan.peak_bytes <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """All numbers, in bytes and seconds."""
        named = {n: getattr(self, n) for n in ("model", "batch", "seq", "budget", "fits", "smallest", "fastest")}
        more = {"longest_sequence": self.longest_sequence, "largest_batch": self.largest_batch}
        more |= {"host_memory": self.host_memory, "offloaded": self.plan.host_bytes}
        plan = {"peak": self.plan.peak_bytes, "parts": dict(self.plan.parts), "policy": self.plan.policy}
        return {
            **named,
            **more,
            **plan,
            "extra_seconds": self.plan.seconds,
            "words": self.plan.words,
            "note": self.plan.note,
        }

    def draw(self, path: str | Path) -> None:
        """The memory timeline of a step, as a picture.

        Args:
            path: a ``.png``, ``.svg`` or ``.pdf`` file.
        """
        from .timelines import Picture, draw

        title = f"{self.model}, {self.batch} x {self.seq}"
        draw(Picture(self.timeline, title, self.budget), Path(path))

    def __str__(self) -> str:
        lines = [f"{self.model}, batch {self.batch} x {self.seq} tokens, budget {gib(self.budget)}", ""]
        lines += [f"  {name:<20}{gib(size):>12}" for name, size in self.plan.parts.items()]
        lines += [f"  {'peak':<20}{gib(self.plan.peak_bytes):>12}" + ("" if self.fits else "   does not fit"), ""]
        lines.append(f"plan        {self.plan.policy}: {self.plan.words or 'no repeated layers'}")
        if self.plan.note:
            lines.append(f"            {self.plan.note}")
        lines.append(f"host        {gib(self.plan.host_bytes)} of {gib(self.host_memory)} hold residuals")
        waiting = " and waiting for the link" if self.plan.host_bytes else ""
        lines.append(f"time        {self.plan.seconds * 1e3:.1f} ms of a step go into computing again{waiting}")
        lines.append(f"range       {gib(self.smallest)} (as little as can be) to {gib(self.fastest)} (everything kept)")
        lines.append(f"longest     {self.longest_sequence:,} tokens per sequence at batch {self.batch}")
        lines.append(f"largest     batch {self.largest_batch:,} at {self.seq:,} tokens per sequence")
        lines.append(f"planned in  {self.seconds:.1f} s")
        return "\n".join(lines)


def plan(
    model: str,
    *,
    batch: int = 1,
    seq: int = 2048,
    budget: int | float | str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    device: str = "H100",
    lora_r: int | None = 16,
    quantization: Literal["nf4", "none"] | None = None,
) -> MemoryPlan:
    """Predict a training step's peak memory, and plan it under a budget.

    Args:
        model: a preset, a folder or its ``config.json``, or a hub id; only the configuration is read.
        batch, seq: sequences, and tokens in each.
        budget: peak bytes of the step, such as "24GiB".
        device_memory: memory of the device, of which a part is left to CUDA and the allocator; instead of a budget.
        host_memory: host memory in which values may wait for backward, as the option ``host_memory_budget``; None is
            half of this machine's, 0 none.
        device: whose speed is assumed ("H100", "A100", "4090", …), and whose memory where nothing else is given.
        lora_r: rank of adapters on every linear layer, in the weights' dtype; None trains the whole model.
        quantization: "nf4" for frozen weights in 4 bits.

    Raises:
        ModelError: for a model that cannot be found or built, or with quantised weights to train.
        OptionError: for a budget that is no size.
    """
    if quantization not in (None, "none", "nf4"):
        raise ModelError(f"quantization {quantization!r} is unknown: it is 'nf4' or 'none'")
    if quantization == "nf4" and lora_r is None:
        raise ModelError("quantization 'nf4' freezes the weights: give lora_r, the rank of the adapters to train")
    card = ceilings(device)
    allowed = parse_bytes(budget)
    if allowed is None:
        memory = parse_bytes(device_memory) or card.memory
        allowed = max(1, int(memory * (1 - SHARE_LEFT)) - CONTEXT)
    host = parse_bytes(host_memory, "host_memory")
    host = half_of_host_memory() if host is None else host
    question = _Question(model, _config(model), lora_r, quantization == "nf4", card)
    deep = question.ask(batch, seq)
    started = time.perf_counter()
    found, timeline = fastest_within(deep, allowed, host)
    smallest, fastest = _smallest(deep, host), deep.fastest[0].peak_bytes
    seconds = time.perf_counter() - started + question.planning
    most = question.tokens_within(allowed, host, batch, seq, deep)
    return MemoryPlan(
        question.described,
        batch,
        seq,
        allowed,
        host,
        found,
        smallest,
        fastest,
        timeline,
        max(0, most // batch // ROUND * ROUND),
        max(0, most // seq),
        seconds,
    )


def _smallest(deep: Deep, host: int) -> int:
    """Peak bytes of the smallest plan."""
    return fastest_within(deep, 0, host)[0].peak_bytes


def _config(name: str) -> Any:
    if name in presets.SHAPES:
        return presets.config(name)
    source = locate(name, tokenizer_only=True)
    with explained(name):
        return AutoConfig.from_pretrained(source.files)


class _Question:
    """One model, asked about steps of different sizes."""

    def __init__(self, name: str, config: Any, lora_r: int | None, nf4: bool, card: Ceilings) -> None:
        self.name, self.config, self.lora_r, self.nf4, self.card = name, config, lora_r, nf4, card
        self.planning = 0.0
        text = config.get_text_config()
        self.depth = int(text.num_hidden_layers)
        kinds = getattr(text, "layer_types", None) or []
        period = next((p for p in range(1, 9) if list(kinds[p:]) == list(kinds[:-p])), 0) if kinds else 1
        traced = max(TRACED * period, 3 * period + PAIR)
        repeats = period and self.depth % period == 0 and self.depth > traced
        self.traced = traced if repeats else self.depth
        self.period = period or 1
        whole = self._build(self.depth)
        self.standing = _standing(whole)
        count = sum(p.numel() for p in whole.parameters()) + sum(
            2 * b.numel() for n, b in whole.named_buffers() if n.endswith("packed")
        )
        trained = "all weights" if lora_r is None else f"LoRA rank {lora_r}"
        self.described = f"{name}: {count / 1e9:.1f} B parameters{' in NF4' if nf4 else ''}, {trained} trained"

    def ask(self, batch: int, seq: int) -> Deep:
        """The model's plans for a step of that size."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = faked(self._build(self.traced), mode)
        with mode:
            ids = torch.zeros(batch, seq, dtype=torch.long)
            # The loss does not read logits, and a trainer does not either.
            try:
                traced = trace(model, {"input_ids": ids, "labels": ids}, Options(logits="drop"))
            except TraceError as error:
                raise ModelError(f"{self.name!r} cannot be planned: {error}") from error
        started = time.perf_counter()
        planner = Planner(traced.joint, traced.gradients, Sizes(self.card))
        if len(planner.layers) != self.traced:
            raise ModelError(f"{self.name!r}: {len(planner.layers)} of {self.traced} layers were found in its graph")
        deep = Deep(planner, self._like(), self.standing, self.period if self.traced < self.depth else 0)
        self.planning += time.perf_counter() - started
        return deep

    def tokens_within(self, budget: int, host: int, batch: int, seq: int, here: Deep) -> int:
        """Tokens in a step whose smallest plan is within a budget; asked once more at another length.

        Args:
            host: bytes of host memory that may be used.
            here: the plans at ``batch`` and ``seq``.
        """
        fixed, peak = self.standing.total, _smallest(here, host)
        if peak <= fixed or budget <= fixed:
            return 0
        guess = max(ROUND, int((budget - fixed) / (peak - fixed) * seq) // ROUND * ROUND)
        guess += ROUND if guess == seq else 0
        counts, plans = (batch * seq, batch * guess), (here, self.ask(batch, guess))
        floor = Floor.through(counts, plans, spans=False)
        found = floor.tokens_within(budget, host)
        line = floor.lines[0]
        if line.room(found, host) == len(line.residuals):
            return found  # with all of them away residuals that span two layers spare nothing
        return Floor.through(counts, plans, spans=True).tokens_within(budget, host)

    def _like(self) -> list[int]:
        """The traced layer that each layer is like: the ends are themselves, all between are the last but those.

        Two periods stand before what is repeated: only there does backward fetch one layer's residual while it works
        with another one's.
        """
        p, n = self.period, self.traced
        if n == self.depth:
            return list(range(n))
        return [*range(2 * p), *(2 * p + i % p for i in range(self.depth - 3 * p)), *range(n - p, n)]

    def _build(self, depth: int) -> nn.Module:
        config = _shallow(self.config, depth, self.period)
        with explained(self.name), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if self.lora_r is not None:
            model = add_lora(model, rank=self.lora_r, autocast_adapter_dtype=False)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        if self.nf4:
            _quantise(model)
        return model.train()


def _shallow(config: Any, depth: int, period: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    old = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == old and depth < old:
            # The ends and what is between, as `_Question._like` repeats it.
            setattr(text, name, [*value[: depth - period], *value[old - period :]])
    text.num_hidden_layers = depth
    return config


def _standing(model: nn.Module) -> Standing:
    parameters = {id(p): p for p in model.parameters()}.values()
    trained = _bytes(p for p in parameters if p.requires_grad)
    frozen = _bytes(p for p in parameters if not p.requires_grad) + _bytes(model.buffers())
    return Standing(frozen, trained, MOMENTS * trained, LIBRARY_WORKSPACE)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Nf4Linear(nn.Module):
    """A frozen linear layer in NF4 with double quantisation, as bitsandbytes lays it out; shapes only."""

    BLOCK, NESTED = 64, 256

    def __init__(self, rows: int, columns: int, bias: Tensor | None) -> None:
        super().__init__()
        self.rows, self.columns, self.bias = rows, columns, bias
        blocks = -(-rows * columns // self.BLOCK)
        parts = {
            "packed": ((rows * columns // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "nested_code": ((256,), torch.float32),
            "nested_absmax": ((-(-blocks // self.NESTED),), torch.float32),
            "nested_offset": ((), torch.float32),
        }
        for name, (shape, dtype) in parts.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.packed, self.absmax, self.nested_code, self.nested_absmax, self.nested_offset)
        weight = nf4_dequantize(*parts, self.rows, self.columns, self.BLOCK, self.NESTED, torch.bfloat16)
        return F.linear(x, weight, self.bias)


def _quantise(model: nn.Module) -> None:
    """NF4 for every frozen linear layer that has adapters."""
    for module in list(model.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            module.base_layer = _Nf4Linear(base.out_features, base.in_features, base.bias)
