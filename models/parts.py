"""Where in a model of texts and images a layer sits, and what it does there, by the model's structure.

No name of a class is asked. The language model is the module around the text embedding that holds repeated blocks; what
lies beside it makes images into embeddings: towers, where pixels enter, and projectors behind them. In a block,
attention is what counts heads (or convolves over tokens), and all else works on each token alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from .source import ModelError

Part = Literal["language", "vision", "projector"]
Role = Literal["attention", "mlp"]

_LINEAR = (nn.Linear, Conv1D)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_COLOURS = 3
_ATTENTION_WORDS = ("attn", "attention")


class Place(NamedTuple):
    """Where a linear layer sits, and what it does there."""

    part: Part
    role: Role


def unwrapped(model: nn.Module) -> Any:
    """The model that PEFT wraps, its adapters in it, or the model."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def places(model: nn.Module) -> dict[str, Place]:
    """The place of every linear layer but the head, by its name.

    Layers inside of ``nn.MultiheadAttention`` are left out: their weights are read without calling them, and an adapter
    there would never learn.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = outer_parts(model)
    silent = {
        f"{name}.{inner}" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
        for inner, _ in m.named_modules() if inner
    }  # fmt: skip
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _LINEAR) and module is not head and name not in silent:
            inside: list[Part] = [part for root, part in outside.items() if f"{name}.".startswith(f"{root}.")]
            found[name] = Place(inside[0] if inside else "language", _role(model, name))
    return found


def outer_parts(model: nn.Module) -> dict[str, Part]:
    """The largest modules outside of the language model that hold layers, by name: what images pass through.

    Empty for a language model.
    """
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of a model that has none, or several
        embedding = None
    name = next((n for n, m in model.named_modules() if m is embedding), None)
    if embedding is None or name is None:
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    root = name
    while root and not _has_blocks(model.get_submodule(root)):
        root = root.rpartition(".")[0]
    beside = dict(_beside(model, root))
    # Where the language model is not apart from the rest, as in a body that holds a tower among its own blocks.
    beside |= {n: m for n, m in _children(model, root) if _takes_pixels(m) and not _holds(m, embedding)}
    beside = {n: m for n, m in beside.items() if m is not head and any(isinstance(i, _LINEAR) for i in m.modules())}
    towers = {n for n, m in beside.items() if _takes_pixels(m)} or {n for n, m in beside.items() if _has_blocks(m)}
    if not towers and not hasattr(getattr(model, "config", None), "vision_config"):
        return {}  # the head of a classifier, the pooler of an encoder
    found: dict[str, Part] = {}
    for name in beside:
        found[name] = "vision" if name in towers else "projector"
    return found


def targets(
    model: nn.Module,
    *,
    vision: bool = True,
    language: bool = True,
    attention: bool = True,
    mlp: bool = True,
    layers: Sequence[int] | int | None = None,
    names: Sequence[str] | None = None,
) -> str:
    """The linear layers to adapt, as one regular expression on their whole names, as PEFT takes it.

    Args:
        vision: those of towers and projectors. language: those of the language model.
        attention, mlp: those that attention has, and all others.
        layers: of the language model only the blocks of these numbers.
        names: only layers whose name ends so.

    Raises:
        ModelError: when nothing is left.
    """
    found = places(model)
    numbers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    kept = [
        name
        for name, (part, role) in found.items()
        if (language if part == "language" else vision)
        and (attention if role == "attention" else mlp)
        and (numbers is None or part != "language" or _block_number(name) in numbers)
        and (names is None or any(f".{name}".endswith(f".{end}") for end in names))
    ]
    if not kept:
        raise ModelError("the finetune_ arguments leave nothing to train")
    return expression(kept, set(found) - set(kept))


def expression(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """A regular expression that matches the names and none of the others; numbers of blocks are folded where it may.

    >>> expression(["layers.0.q", "layers.1.q"], ["layers.0.k"])
    'layers\\\\.\\\\d+\\\\.q'
    """
    others = list(others)
    patterns: dict[str, None] = {}
    for name in names:
        folded = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        if folded not in patterns and any(re.fullmatch(folded, other) for other in others):
            folded = re.escape(name)
        patterns[folded] = None
    return "|".join(patterns)


def _role(model: nn.Module, name: str) -> Role:
    """Attention, where a module between the layer and its block counts heads or convolves over tokens."""
    path = name.split(".")
    for end in range(len(path) - 1, 0, -1):
        if path[end - 1].isdigit():
            break  # the block itself
        around = model.get_submodule(".".join(path[:end]))
        if _counts_heads(around) or any(word in path[end - 1].lower() for word in _ATTENTION_WORDS):
            return "attention"
        if any(isinstance(child, nn.Conv1d) for child in around.children()):
            return "attention"
        if any(isinstance(child, nn.ModuleList) for child in around.children()):
            break  # outside of the blocks
    return "mlp"


def _counts_heads(module: nn.Module) -> bool:
    return any("head" in key and isinstance(value, int) for key, value in vars(module).items())


def _block_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _has_blocks(module: nn.Module) -> bool:
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList))
    return any(isinstance(inner, _LINEAR) for blocks in lists for inner in blocks.modules())


def _takes_pixels(module: nn.Module) -> bool:
    return any(isinstance(m, _CONVOLUTIONS) and m.in_channels == _COLOURS for m in module.modules())


def _holds(module: nn.Module, wanted: nn.Module) -> bool:
    return any(m is wanted for m in module.modules())


def _beside(model: nn.Module, root: str) -> Iterator[tuple[str, nn.Module]]:
    """What lies beside the modules on the way from the model to ``root``."""
    path = root.split(".") if root else []
    for depth in range(len(path)):
        above = ".".join(path[:depth])
        yield from ((n, m) for n, m in _children(model, above) if n != ".".join(path[: depth + 1]))


def _children(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    inside: Any = model.get_submodule(name)
    yield from ((f"{name}.{child}" if name else child, module) for child, module in inside.named_children())
