"""Acts on a plan: cuts the joint graph into the forward and the backward graph that Inductor compiles."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from ...kernels.ahead import compile_ahead
from ..runner import CompilerWarning
from . import torch_private
from .adapters import fuse_adapter_gradients
from .costs import Sizes, ceilings
from .joint import Joint, hint, layers, read_joint, tokens
from .norms import merge_norms, split_norms
from .plan import Plan
from .planner import Planner
from .schedule import by_way_of_host, unpack_where_used
from .sliced import run_in_slices
from .slices import Slicing
from .spans import run_twice
from .timeline import Timeline
from .within import fastest_within
from .words import BudgetError, below_floor, gib, in_words, sequence_length, tokens_within

RESERVE = 0.05
"""Share of the free memory that is left free where no budget was given: for what no formula knows."""


class Partitioner(CustomPartitionerFn):
    """Inductor's ``custom_partitioner_fn``: plans the joint graph under a byte budget and cuts it accordingly.

    Inductor runs its joint-graph passes first, so dropout arrives here as a function of its seed. Keeping and
    recomputing give the same numbers where recomputed values round like kept ones, which the backend arranges by
    Inductor's ``emulate_precision_casts``. A graph that comes out of Inductor's cache was planned in an earlier
    process: ``last_plan`` is then what that one wrote down (remembered.py), or None.

    Attributes:
        last_plan, last_timeline: what was decided, and the step's memory under it; None before.
        last_floor: peak bytes of the smallest plan; 0 where everything is kept, and nobody asked.

    Args:
        budget: peak bytes of the whole step, the weights and the optimiser's state included; None means what the
            device has free now, less a reserve; 0 asks for as little as possible.
        policy: "keep" or "recompute", the extremes, or "auto": the fastest plan within the budget.
        host: bytes of host memory that values may wait in; None means half of the machine's where there is a CUDA
            device, and none elsewhere.
        strict: raise where planning fails, and where no plan is within the budget (:class:`BudgetError`), instead of
            going on with PyTorch's partition or the smallest plan, and a warning.
        sizes: the numbers that symbolic sizes have in the batch that is planned for. A graph of another process that
            was planned for other numbers is not taken for this one.
    """

    def __init__(
        self,
        budget: int | None = None,
        policy: str = "auto",
        *,
        strict: bool = False,
        host: int | None = None,
        sizes: str = "",
    ) -> None:
        if policy not in ("auto", "keep", "recompute"):
            raise ValueError(f"policy cannot be {policy!r}; it is 'auto', 'keep' or 'recompute'")
        self.policy, self.strict = policy, strict
        self.budget, self.sizes = budget, sizes
        # Resolved now and rounded, because a cached graph must not outlive the budget it was planned for.
        self.free = _free_bytes() if budget is None else None
        self.host = _host_bytes() if host is None else host
        self.told_host = host is not None  # its shortage is worth a warning only to those who named it
        self.last_plan: Plan | None = None
        self.last_timeline: Timeline | None = None
        self.last_floor = 0
        self.slicing: Slicing | None = None

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            return self._partition(
                gm,
                num_fwd_outputs=kwargs["num_fwd_outputs"],
                indices=kwargs.get("static_lifetime_input_indices"),
            )
        except Exception as error:
            if self.strict:
                raise
            message = f"unsloth: the memory plan was left out: {type(error).__name__}: {error}"
            warnings.warn(message, CompilerWarning, stacklevel=2)
            return torch_private.min_cut(gm, joint_inputs, **kwargs)

    def _partition(
        self, gm: fx.GraphModule, *, num_fwd_outputs: int, indices: list[int] | None
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint, gradients, long_lived = joint_of(gm, num_fwd_outputs, indices)
        plan = self.choose(joint, gradients)
        kept = set(plan.saved)
        if plan.inner:
            run_twice(joint, plan.inner, layers(joint), kept)
        # Symbolic numbers are saved where they are wanted; the cut drops whatever backward does not read.
        symbols = [n for n in joint.forward if torch_private.is_sym_node(n)]
        inputs = [n for n in joint.forward if n.op == "placeholder" and n not in symbols]
        saved = inputs + [n for n in joint.forward if n.name in kept]
        halves = torch_private.extract(gm, saved, symbols, num_fwd_outputs, long_lived)
        for half, stretches in zip(halves, plan.stretches, strict=True):
            if stretches and self.slicing is not None and run_in_slices(half.graph, stretches, self.slicing, plan.rows):
                half.recompile()
            if merge_norms(half.graph) + fuse_adapter_gradients(half.graph) + unpack_where_used(half.graph):
                half.recompile()
        compile_ahead(half.graph for half in halves)
        if plan.offloaded:
            by_way_of_host(*halves, plan.offloaded, num_fwd_outputs, plan.inner)
        self.last_plan = plan
        return halves

    def choose(self, joint: Joint, gradients: Sequence[Any]) -> Plan:
        """The plan for a joint graph under this partitioner's policy and budget."""
        planner, allowed = Planner(joint, gradients, Sizes()), None
        if self.policy == "recompute":
            found = planner.smallest
        elif self.policy == "keep" or (allowed := self.allowed(planner)) is None:
            found = planner.fastest
        else:
            found = fastest_within(planner, allowed, self.host)
            self.last_floor = (
                fastest_within(planner, 0, self.host)[0].peak_bytes if planner.layers else found[0].peak_bytes
            )
            found = (self._with_reason(found[0], planner, allowed), found[1])
            if found[0].peak_bytes > allowed and self.budget:
                self._refuse(below_floor(allowed, found[1], sequence_length(joint), planner.why_not_sliced()))
        plan, self.last_timeline = _with_guard(found, joint, allowed)
        planner = planner.with_inner(plan.inner) or planner
        self.slicing = planner.liveness.slicing if plan.rows else None
        if plan.policy == "keep" and not plan.offloaded and not plan.rows:  # the common case, without a look at layers
            return replace(plan, words="everything that backward wants is kept")
        if plan.note and self.told_host:
            warnings.warn(f"unsloth: {plan.note}", CompilerWarning, stacklevel=2)
        kept, away = ({planner.by_name[name] for name in names} for names in (plan.saved, plan.offloaded))
        gone, inner = (
            [i for i, layer in enumerate(planner.layers) if any(n in there for n in layer.values)]
            for there in (away, {planner.by_name[name] for name in plan.inner})
        )
        told = in_words(planner.layers, [kept] * len(planner.layers), gone, inner), planner.in_slices(plan)
        return replace(plan, words="; ".join(filter(None, told)))

    def allowed(self, planner: Planner) -> int | None:
        """Peak bytes that the step may have; None where there is no device to ask and no budget."""
        if self.budget is not None or self.free is None:
            return self.budget
        there = planner.liveness.standing  # what the graph reads is on the device already
        return int(self.free * (1 - RESERVE)) + there.weights + there.trained

    def _with_reason(self, plan: Plan, planner: Planner, allowed: int) -> Plan:
        needed = planner.fastest[0].peak_bytes
        if plan.policy == "keep":
            return replace(plan, why="it fits" if needed <= allowed else "recomputing saves nothing")
        return replace(plan, why=f"keeping everything needs {gib(needed)} of {gib(allowed)}")

    def _refuse(self, message: str) -> None:
        if self.strict:
            raise BudgetError(message)
        message = f"unsloth: {message}. The smallest plan is used"
        warnings.warn(message, CompilerWarning, stacklevel=2)

    def uuid(self) -> str:
        # Everything a plan depends on beside the graph: a constant here would bring back plans made for other budgets.
        asked = f"{self.policy}-{self.budget}-{self.free}-{self.host}-{self.sizes}"
        return f"unsloth-memory-{asked}-{ceilings()}-{_source_digest()}"

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "slicing": None,
            "last_plan": None,
            "last_timeline": None,
        }  # reports, no part of what the partitioner is


def _with_guard(found: tuple[Plan, Timeline], joint: Joint, allowed: int | None) -> tuple[Plan, Timeline]:
    """The plan with the tokens that it was made for, and those that it would hold."""
    plan, timeline = found
    if (shape := tokens(joint)) is None:
        return found
    count = hint(shape[0] * shape[1])
    dynamic = not all(isinstance(size, int) for size in shape)
    limit = tokens_within(allowed, timeline, count) if dynamic and allowed is not None else 0
    return replace(plan, tokens=count, limit=limit), timeline


def joint_of(gm: fx.GraphModule, num_fwd_outputs: int, indices: list[int] | None) -> tuple[Joint, list[Any], Any]:
    """Make a joint graph ready to be planned, in place.

    Returns:
        the graph, its outputs that backward returns, and the inputs that outlive the step.
    """
    torch_private.tidy(gm)
    split_norms(gm.graph)
    sides = torch_private.sides(gm, indices, num_fwd_outputs)
    mutated = torch_private.inputs_mutated_outside(gm)
    joint = read_joint(gm, sides.backward, sides.needed, sides.gradients, mutated)
    return joint, sides.gradients, sides.long_lived


@functools.cache
def _source_digest() -> str:
    """Hash of the code that plans: this folder, and what it knows of operators."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "rewrite.py", *sorted(here.parents[1].glob("kernels/*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _free_bytes() -> int | None:
    """What the current CUDA device has free, caches included, in whole GiB; None without one."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return (free + cached) // 2**30 * 2**30


def _host_bytes() -> int:
    """Half of the machine's memory, in whole GiB; none without a device that could use it.

    Not of what is free: a cached graph is found by this number, and free memory differs from run to run.
    """
    return half_of_host_memory() if torch.cuda.is_available() else 0


def half_of_host_memory() -> int:
    """Half of this machine's memory, or of what its control group leaves the process (in a container), in whole GiB."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            memory = min(memory, int(Path(limit).read_text()))
    return memory // 2 // 2**30 * 2**30
