"""Acts on a plan: cuts the joint graph into the forward and the backward graph that Inductor compiles."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from ..runner import CompilerWarning
from . import torch_private
from .joint import Joint, base, is_value, nbytes, read_joint
from .plan import Plan, keep_plan, recompute_plan
from .schedule import unpack_where_used


class Partitioner(CustomPartitionerFn):
    """Inductor's ``custom_partitioner_fn``: plans the joint graph under a byte budget and cuts it accordingly.

    Inductor runs its joint-graph passes first, so dropout arrives here as a function of its seed. Keeping and
    recomputing give the same numbers where recomputed values round like kept ones, which the backend arranges by
    Inductor's ``emulate_precision_casts``. A graph that comes out of Inductor's cache was planned in an earlier
    process: ``last_plan`` then stays None.

    Args:
        budget: peak bytes for inputs, gradients and kept values together; None means what the device has free now.
        policy: "keep" or "recompute", or "auto": keep if that fits the budget, else recompute.
        strict: raise where planning fails, instead of falling back to PyTorch's partition with a warning.
    """

    def __init__(self, budget: int | None = None, policy: str = "auto", *, strict: bool = False) -> None:
        if policy not in ("auto", "keep", "recompute"):
            raise ValueError(f"policy cannot be {policy!r}; it is 'auto', 'keep' or 'recompute'")
        self.policy, self.strict = policy, strict
        self.budget = budget
        # Resolved now and rounded, because a cached graph must not outlive the budget it was planned for.
        self.free = _free_bytes() if budget is None else None
        self.last_plan: Plan | None = None

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
        torch_private.tidy(gm)
        sides = torch_private.sides(gm, indices, num_fwd_outputs)
        mutated = torch_private.inputs_mutated_outside(gm)
        joint = read_joint(gm, sides.backward, sides.needed, sides.gradients, mutated)
        plan = self.choose(joint, sides.gradients)
        kept = set(plan.kept)
        # Symbolic numbers are saved where they are wanted; the cut drops whatever backward does not read.
        symbols = [n for n in joint.forward if torch_private.is_sym_node(n)]
        inputs = [n for n in joint.forward if n.op == "placeholder" and n not in symbols]
        saved = inputs + [n for n in joint.forward if n.name in kept]
        halves = torch_private.extract(gm, saved, symbols, num_fwd_outputs, sides.long_lived)
        for half in halves:
            if unpack_where_used(half.graph):
                half.recompile()
        self.last_plan = plan
        return halves

    def choose(self, joint: Joint, gradients: Sequence[Any]) -> Plan:
        """The plan for a joint graph under this partitioner's policy and budget."""
        if self.policy == "recompute":
            return recompute_plan(joint)
        keep = keep_plan(joint)
        if self.policy == "keep":
            return keep
        if self.budget is not None:
            needed, allowed = estimated_peak(joint, gradients, keep), self.budget
        elif self.free is not None:  # the inputs are on the device already
            needed, allowed = estimated_peak(joint, gradients, keep) - _input_bytes(joint), self.free
        else:
            return keep
        if needed <= allowed:
            return keep
        why = f"keeping needs about {needed / 2**30:.2f} of {allowed / 2**30:.2f} GiB"
        less = recompute_plan(joint, why)
        return less if less.saved_bytes < keep.saved_bytes else replace(keep, why=f"{why}; recomputing saves nothing")

    def uuid(self) -> str:
        # Everything a plan depends on beside the graph: a constant here would bring back plans made for other budgets.
        return f"unsloth-memory-{self.policy}-{self.budget}-{self.free}-{_source_digest()}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_plan": None}  # a report, not part of what the partitioner is


def estimated_peak(joint: Joint, gradients: Sequence[Any], plan: Plan) -> int:
    """Bytes alive at the start of backward, roughly: inputs, kept values, gradients, and the two largest values.

    The two largest values stand for what an operator reads and writes at the worst moment (usually the logits and
    their gradient). A later planner replaces this by liveness over both graphs.
    """
    values = sorted((nbytes(n) for n in joint.graph.nodes if n.op != "placeholder" and is_value(n)), reverse=True)
    gradient_bytes = sum(nbytes(n) for n in gradients if isinstance(n, fx.Node) and is_value(n))
    return _input_bytes(joint) + plan.saved_bytes + gradient_bytes + sum(values[:2])


def _input_bytes(joint: Joint) -> int:
    inputs = {base(n) for n in joint.forward if n.op == "placeholder" and is_value(n)}
    return sum(nbytes(n) for n in inputs)


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
