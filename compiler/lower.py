"""From a rewritten graph to something that runs: through Inductor with our memory floor, or under eager autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from ..kernels.operator import OPERATORS
from ..passes.memory import remembered
from ..passes.memory.partition import Partitioner
from .inline import InlineReferences
from .options import Options
from .report import GraphReport


def lower(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    report: GraphReport,
) -> Any:
    """Lower a rewritten graph as ``options.lowering`` says."""
    if options.lowering == "eager":
        return graph.forward
    from torch._inductor.compile_fx import compile_fx

    _name_constants(graph)
    _declare_opaque()
    report.partitioner = partitioner = Partitioner(
        options.memory_budget,
        strict=options.strict,
        host=options.host_memory_budget,
        sizes=remembered.sizes_of(example_inputs),
    )
    patches = {
        **_mode(mode),
        "custom_partitioner_fn": partitioner,
        "post_grad_custom_pre_pass": InlineReferences(),
        # A plan never changes numbers: recomputed values must round where the kept ones did.
        "emulate_precision_casts": True,
    }
    key = remembered.key_of(graph, example_inputs, partitioner.uuid())
    run = compile_fx(graph, list(example_inputs), config_patches=patches)
    if partitioner.last_plan is not None:
        remembered.remember(key, partitioner.last_plan, partitioner.last_floor)
    elif (earlier := remembered.recall(key)) is not None:  # the graph came out of a cache, cut already
        partitioner.last_plan, partitioner.last_floor = earlier
    return run


def _declare_opaque() -> None:
    """Have Inductor know that it calls our operators as they are.

    It would find out by itself. But up to torch 2.12 it then writes out the operator's arguments, for a log that nobody
    reads, and all that those were computed from: exponential in the depth at which an operator is first met.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for operator in OPERATORS.values():
        for launch in operator.launch.values():
            if launch not in lowerings:
                tag = get_layout_constraint_tag(launch, with_default=True)
                make_fallback(launch, layout_constraint=tag_to_layout_constraint(tag), warn=False)


def _name_constants(graph: fx.GraphModule) -> None:
    """Say where tensors come from that the retrace found in the model's source (Falcon's ``torch.tensor(0.0)``).

    AOTAutograd asks it of everything that a graph from Dynamo holds; Dynamo itself would have made them inputs.
    """
    if (sources := getattr(graph, "_param_name_to_source", None)) is None:
        return
    held = [name for name, _ in (*graph.named_parameters(), *graph.named_buffers())]
    made: Any = {name: ConstantSource(name) for name in held if name not in sources}
    vars(graph)["_param_name_to_source"] = {**sources, **made}


def lower_plain(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> Any:
    """What would have run without us: Inductor, or Dynamo's graph itself under ``lowering="eager"``."""
    if options.lowering == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs), config_patches=_mode(mode))


def _mode(mode: str | None) -> dict[str, Any]:
    return dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}
