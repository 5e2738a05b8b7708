"""The joint graph of a model's step, traced without running anything: for planning, with or without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode

from ..passes.memory.joint import Joint
from ..passes.memory.partition import joint_of
from .backend import rewritten
from .options import Options
from .run import sizes_in_graph


class TraceError(ValueError):
    """The step is not one graph, so that there is no one peak to plan."""


@dataclass(frozen=True)
class Traced:
    """A joint graph.

    Attributes:
        joint: as the memory floor sees it.
        gradients: its outputs that backward returns.
    """

    joint: Joint
    gradients: list[Any]


class _Done(BaseException):
    """Leaves the compilation once there is a joint graph; no handler of failures takes it for one."""


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A model of the meta device as one of fake CPU tensors, in place: shapes and dtypes without storage."""
    made: dict[int, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
                held[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
    return model


def trace(model: nn.Module, batch: Mapping[str, Tensor], options: Options) -> Traced:
    """The joint graph of a training step.

    Args:
        model: of fake tensors (:func:`faked`) or real ones; called as ``model(**batch)``.
        batch: shapes and dtypes of a step's arguments.
        options: as for the backend.

    Raises:
        TraceError: where Dynamo breaks the step into several graphs.
    """
    found: list[Traced] = []

    def partition(gm: fx.GraphModule, _: Any, **kwargs: Any) -> Any:
        found.append(Traced(*joint_of(gm, kwargs["num_fwd_outputs"], kwargs.get("static_lifetime_input_indices"))[:2]))
        raise _Done

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graph, never = rewritten(gm, options), cast(Any, None)  # the partition leaves before there is a half to compile
        aot_module_simplified(
            graph,
            example_inputs,
            fw_compiler=never,
            bw_compiler=never,
            partition_fn=partition,
            keep_inference_input_mutations=True,
        )
        raise AssertionError("unreachable")

    torch._dynamo.reset()
    try:
        with sizes_in_graph():
            torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(**{**batch, "use_cache": False})
    except _Done:
        return found[0]
    except torch._dynamo.exc.Unsupported as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise TraceError(f"the step is no single graph: {str(error).splitlines()[0]}") from error
    finally:
        torch._dynamo.reset()
    raise TraceError("nothing in the step is trained: there is no backward to plan for")
