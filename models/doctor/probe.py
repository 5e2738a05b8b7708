"""A tiny model of the same class, and what can be measured on it in milliseconds.

Bugs that live in the code and not in a file show in numbers: which tokens an output depends on, where a value is
rounded, whether a setting has any effect. The configuration is the model's own, made small by
:mod:`unsloth.models.shrink`; what is measured is held against what the configuration declares.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..parts import unwrapped
from ..shrink import ORDINARY_TOKENS, ways

SPREAD = 0.5
"""Standard deviation of the tiny model's weights: large enough that scores and caps matter."""


class ProbeError(RuntimeError):
    """No tiny model of this class runs."""


class Probe:
    """Tiny models of one class.

    Args:
        config: the real configuration of the language model. It is not changed.
        model: a model of the class, in memory; None builds transformers' own class for the configuration.
        attn_implementation: as the real model is to run with.
    """

    def __init__(self, config: Any, model: nn.Module | None = None, attn_implementation: str | None = None) -> None:
        self.real = config
        self.attn_implementation = attn_implementation
        self.given = None if model is None else unwrapped(model)
        self._built: dict[Any, Any] = {}

    @cached_property
    def config(self) -> Any:
        """The tiny configuration: the first that a model of the class runs with.

        Raises:
            ProbeError: when none does.
        """
        failed: list[Exception] = []
        for tiny in ways(self.real):
            if getattr(tiny, "rope_parameters", None) and hasattr(tiny, "max_position_embeddings"):
                tiny.max_position_embeddings = self.real.max_position_embeddings  # which scalings are relative to
            try:
                with torch.no_grad():
                    self._build(tiny)(input_ids=tokens(1, 8), use_cache=False)
            except Exception as error:  # noqa: BLE001  the next way may suit this architecture
                failed.append(error)
            else:
                return tiny
        reason = (str(failed[0]).splitlines() or [""])[0][:160]
        raise ProbeError(f"no tiny {self.name} runs: {reason}") from failed[0]

    @cached_property
    def reference_class(self) -> type | None:
        """transformers' own class for this configuration."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM._model_mapping.get(type(self.real), None)  # pyright: ignore

    @property
    def is_reference(self) -> bool:
        """Whether the model is of transformers' own class, so that there is no other to compare it with."""
        return self.given is None or type(self.given) is self.reference_class

    @property
    def name(self) -> str:
        cls = self.reference_class if self.given is None else type(self.given)
        return "model" if cls is None else cls.__name__

    def build(self, *, dtype: torch.dtype = torch.float32, reference: bool = False, **changes: Any) -> Any:
        """A tiny model in evaluation mode, the same weights every time; who changes it puts it back.

        Args:
            reference: of transformers' own class instead.
            changes: settings that differ from the tiny configuration's.
        """
        key = (dtype, reference, repr(sorted(changes.items())))
        if key not in self._built:
            config = copy.deepcopy(self.config)
            for name, value in changes.items():
                setattr(config, name, value)
            self._built[key] = self._build(config, dtype, reference)
        return self._built[key]

    def _build(self, config: Any, dtype: torch.dtype = torch.float32, reference: bool = False) -> Any:
        cls: Any = self.reference_class if reference or self.given is None else type(self.given)
        if cls is None:
            raise ProbeError(f"transformers has no causal language model for {type(self.real).__name__}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # As loading does it: a model that is cast afterwards has cast its rotation, too.
            model = cls._from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=None if reference else self.attn_implementation
            )
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    if parameter.dim() > 1:
                        parameter.copy_(noise * SPREAD)
                    else:
                        parameter.add_((0.1 * noise).to(parameter.dtype))
        return model.eval()


def tokens(rows: int, length: int) -> Tensor:
    """Ordinary tokens, int64 [rows, length], the same every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(ORDINARY_TOKENS.start, ORDINARY_TOKENS.stop, (rows, length), generator=generator)


def reach(model: Any, length: int, positions: Iterable[int] | None = None, **inputs: Any) -> list[set[int]]:
    """Which tokens each output depends on: the positions whose embedding has a gradient that is not zero.

    Args:
        length: tokens of the one row that is asked about.
        positions: of the outputs; None asks about all.
        inputs: beside ``input_ids``.

    Returns:
        for every position of an output the set of positions that it sees.

    Raises:
        ProbeError: when the embedding is not a vector per token.
    """
    held: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1] * 1.0  # some models add to it in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = model(input_ids=tokens(1, length), use_cache=False, **inputs).logits[0]
    finally:
        hook.remove()
    if held[0].shape[:2] != (1, length):
        raise ProbeError(f"the embedding makes {tuple(held[0].shape)} of {length} tokens")
    seen = []
    for position in range(length) if positions is None else positions:
        (gradient,) = torch.autograd.grad(logits[position].float().square().sum(), held[0], retain_graph=True)
        seen.append(set(torch.nonzero(gradient[0].abs().sum(-1)).flatten().tolist()))
    return seen


def accepts(model: Any, name: str) -> bool:
    """Whether ``forward`` has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def takes_anything(model: Any) -> bool:
    """Whether ``forward`` takes keyword arguments that it does not name."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def modules(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of one module of each class among those that are wanted."""
    seen = set()
    for path, module in model.named_modules():
        if type(module) not in seen and wanted(path, module):
            seen.add(type(module))
            yield path, module
