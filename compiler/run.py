"""Running a model on a batch, compiled or not, for the functions that only want to know what happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..passes.rewrite import Recogniser
from . import shims
from .backend import compile_graph, trace_past_notes
from .options import Options
from .report import GraphReport

_UNCHECKED = "TRANSFORMERS_DISABLE_TORCH_CHECK"
_CHECKS_IN_GRAPHS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class BatchError(ValueError):
    """The batch cannot be given to the model, or yields no loss."""


def compiled(
    model: nn.Module | Callable[..., Any],
    options: Options,
    reports: list[GraphReport],
    recognisers: Sequence[Recogniser] | None = None,
) -> Any:
    """The model, or a function that runs one, compiled by the backend; reports get one entry per graph.

    A function of it that Dynamo fails to trace runs as written, and what it calls is compiled by itself. What the
    backend raises (under ``strict``) is raised.
    """

    def backend(gm: Any, example_inputs: Any) -> Any:
        try:
            return compile_graph(gm, example_inputs, options, recognisers=recognisers, observe=reports.append)
        except Exception:
            torch._dynamo.config.suppress_errors = False  # until the call ends
            raise

    trace_past_notes()  # of a transformers that was imported after the backend
    return _Compiled(torch.compile(model, backend=backend))


class _Compiled:
    """Compiled code, with the attributes of what was compiled; errors that are Dynamo's own do not end a call."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A limit on compilations that shall end the run excludes it.
        forgiving = not torch._dynamo.config.fail_on_recompile_limit_hit
        with torch._dynamo.config.patch(suppress_errors=forgiving):
            return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_run":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._run, name)


@contextmanager
def sizes_in_graph() -> Iterator[None]:
    """Let Dynamo keep what is read off a tensor as a symbol: how many tokens an image has, which images are real.

    Otherwise such a number ends the graph. What compiles under it has to run under it.

    PyTorch before 2.13 cannot put a check of a whole tensor into a graph that has such symbols (it forgets the one that
    the check makes, and raises at the next node), so there transformers' checks are left out, as it offers to: that a
    text has as many image tokens as there are features is what they ask.
    """
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        if _CHECKS_IN_GRAPHS:
            yield
            return
        before = os.environ.get(_UNCHECKED)
        os.environ[_UNCHECKED] = "1"
        try:
            with _symbols_in_texts():
                yield
        finally:
            if before is None:
                del os.environ[_UNCHECKED]
            else:
                os.environ[_UNCHECKED] = before


@contextmanager
def _symbols_in_texts() -> Iterator[None]:
    """Let a message name a size that is only known when the graph runs, by its symbol: Dynamo asked for its value.

    transformers writes such messages for its checks, before it knows whether they are needed.
    """
    from torch._dynamo.variables import lazy

    text = getattr(lazy, "LazySymNodeFormatString", None)
    if text is None:
        yield
        return
    known = text.__repr__

    def named(self: Any) -> str:
        number = self.sym_node_var.sym_num
        return str(number) if free_unbacked_symbols(number) else known(self)

    text.__repr__ = named
    shims.declare("torch._dynamo", "messages name sizes that are not known yet by their symbol")
    try:
        yield
    finally:
        text.__repr__ = known
        shims.withdraw("torch._dynamo")


def guards_of(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], bool] | None:
    """What Dynamo asks before it runs the code that it has compiled for a function called with these arguments.

    Args:
        function: as written, not as compiled.
        arguments: all of them by name, those left out included. They are kept alive.

    Returns:
        a function that says whether the same code would run with them now; None where no compiled code fits.
    """
    try:
        entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)  # type: ignore[attr-defined]
        found = next((e.guard_manager for e in entries if e.guard_manager.check(dict(arguments))), None)
    except (AttributeError, TypeError):  # private: a later PyTorch may keep it elsewhere
        return None
    return None if found is None else lambda: bool(found.check(dict(arguments)))


def loss_of(model: Any, batch: Any) -> Tensor:
    """Run the model and return its scalar loss.

    Args:
        model: called as ``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``.
        batch: what a training loop would give the model, labels included.

    Raises:
        BatchError: when the model returns no scalar loss.
    """
    if isinstance(batch, Mapping):
        # A training step has no use for a key-value cache, and returning one would keep every key and value alive.
        extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        output = model(**{**extra, **batch})
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None and isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise BatchError("the model returned no scalar loss: the batch needs the labels that training would give it")
    return loss


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave the model's gradients, buffers and the random state as they were, whatever happens inside."""
    gradients = {p: p.grad for p in model.parameters()}
    buffers = {b: b.clone() for b in model.buffers()}
    cuda = torch.cuda.is_available()
    state = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state_all(state[1])
