"""How long did each stage of a compilation take? Read off the timers that PyTorch keeps itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo import utils as dynamo_utils

from ..passes.memory.partition import Partitioner

# Our stages as sums and differences of PyTorch's timers, which nest; what a version does not have counts as zero.
_STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dynamo": (("_compile.compile_inner",), ("OutputGraph.call_user_compiler",)),
    "joint trace": (("aot_trace_joint_graph", "aot_collect_metadata", "_recursive_joint_graph_passes"), ()),
    "partition": ((Partitioner.__name__,), ()),
    "inductor": (("fx_codegen_and_compile",), ()),
    "cache": (("AOTAutogradCache.inductor_load",), ()),
}


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Fill a dictionary with the seconds by stage of what is compiled inside, forward and backward together.

    Dynamo traces, the joint graph is traced and cut in two, Inductor compiles both; where graphs come out of a cache,
    loading them is all that is left. Capture and passes are in the graphs' reports.
    """
    seconds: dict[str, float] = {}
    before = _timers()
    yield seconds
    spent = {name: total - before.get(name, 0.0) for name, total in _timers().items()}
    for stage, (plus, minus) in _STAGES.items():
        total = sum(spent.get(name, 0.0) for name in plus) - sum(spent.get(name, 0.0) for name in minus)
        if total > 0:
            seconds[stage] = total


def _timers() -> dict[str, float]:
    return {name: sum(times) for name, times in dynamo_utils.compilation_time_metrics.items()}
