"""TRL's and transformers' classes under the names of arguments that they had: the one change made to other libraries.

Scripts import ``SFTTrainer`` from TRL and give it ``tokenizer=``, ``max_seq_length=``, ``dataset_text_field=`` or
``packing=``, which it took once. :func:`install` gives those classes a ``__new__``, through which a trainer of a model
from ``FastLanguageModel`` becomes ours (a subclass of TRL's), and a configuration that is given names of old becomes
one that knows them. All other calls are as they were. ``from_pretrained`` installs it, no import does, and ``explain``
names it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from ...compiler import shims

logger = logging.getLogger(__name__)

MARK = "save_pretrained_merged"
"""What a model from ``FastLanguageModel`` has and no other."""

RENAMED = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "tokenizer": "processing_class",
}
GONE = {
    "overwrite_output_dir": "checkpoints are never overwritten unasked",
    "save_safetensors": "weights are always safetensors",
    "logging_dir": "the logger of report_to has a setting of its own for it",
    "max_prompt_length": "max_length cuts the whole",
    "max_target_length": "max_length cuts the whole",
    "dataset_batch_size": "rows are tokenised as they come",
    "num_of_sequences": "packing needs no estimate",
    "chars_per_token": "packing needs no estimate",
    "infinite": "max_steps says when to stop",
    "label_pad_token_id": "it is always -100",
    "is_encoder_decoder": "models are decoders",
    "generate_during_eval": "evaluation computes losses",
    "model_init_kwargs": "the model is loaded",
    "ref_model_init_kwargs": "the model is loaded",
    "push_to_hub_token": "hub_token is its name",
    "jit_mode_eval": "evaluation is compiled as training is",
    "use_mps_device": "the device is found",
}
OLD = {*RENAMED, *GONE, "warmup_ratio", "group_by_length"}

_explained: set[str] = set()
_changed: list[type] = []
_added: list[str] = []


def explain_once(name: str, why: str) -> None:
    """Say once in a process what becomes of an argument."""
    if name not in _explained:
        _explained.add(name)
        logger.warning("%s: %s", name, why)


def renamed(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Settings under the names that they have now.

    Args:
        given: as a script gives them.
        known: names of the configuration's fields. What is among them stays, whatever it was in another version.

    Returns:
        settings with names that are known, or were never any, which the configuration refuses by itself.
    """
    known, found = set(known), {}
    for name, value in given.items():
        if name in known:
            found[name] = value
        elif RENAMED.get(name) in known:
            found[RENAMED[name]] = value
        elif name == "warmup_ratio" and "warmup_steps" in known:
            if value and not given.get("warmup_steps"):
                found["warmup_steps"] = value  # below one it is a share
        elif name == "group_by_length" and "train_sampling_strategy" in known:
            if value:
                found["train_sampling_strategy"] = "group_by_length"
        elif name in GONE:
            explain_once(name, f"not needed any more: {GONE[name]}")
        else:
            found[name] = value
    return found


def fields_of(config: type) -> set[str]:
    """The names that a configuration's constructor takes."""
    return {field.name for field in dataclasses.fields(config) if field.init}


@functools.cache
def with_old_names(config: type) -> type:
    """A subclass of a configuration that takes old names as well, and a machine without a GPU as it is."""

    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        if _needs_cpu(config, settings):
            settings["use_cpu"] = True
        config.__init__(self, *args, **renamed(settings, fields_of(config)))

    def __reduce__(self: Any) -> Any:  # copied and pickled as what it is made of: nobody finds this class by its name
        return _blank, (config,), self.__dict__

    namespace = {"__init__": __init__, "__reduce__": __reduce__, "__module__": config.__module__}
    return type(config.__name__, (config,), {**namespace, "__qualname__": config.__qualname__})


def _blank(config: type) -> Any:
    return object.__new__(config)


@functools.cache
def install() -> None:
    """Have TRL's trainers and configurations take old names; once in a process."""
    import trl

    from ..preferences import ORPOConfig, _ORPOTrainer
    from .trainers import OURS

    for name, value in (("ORPOTrainer", _ORPOTrainer), ("ORPOConfig", ORPOConfig)):
        if not hasattr(trl, name):
            _added.append(name)
            setattr(trl, name, value)  # where TRL has moved them, scripts do not look
    for theirs, ours in OURS.items():
        _give_new(theirs, lambda cls, args, given, ours=ours: ours if _is_marked(cls, args, given) else None)
    for config in (trl.SFTConfig, trl.DPOConfig, ORPOConfig, TrainingArguments):
        _give_new(config, lambda cls, args, given: with_old_names(cls) if _is_old(cls, given) else None)
    shims.declare(
        "trl",
        f"{', '.join(c.__name__ for c in OURS)} of a model from FastLanguageModel are compiled and take the names "
        "of earlier versions (tokenizer, max_seq_length, dataset_text_field, packing, …), as their configurations do",
    )


def uninstall() -> None:
    """Have the classes do again what they did."""
    import trl

    for cls in _changed:
        # Not deleted: CPython then goes on calling the slot, and object's refuses the arguments that are __init__'s.
        cls.__new__ = staticmethod(_new)  # pyright: ignore[reportAttributeAccessIssue]
    for name in _added:
        delattr(trl, name)
    _changed.clear()
    _added.clear()
    install.cache_clear()
    shims.withdraw("trl")


def _new(asked: type, *args: Any, **given: Any) -> Any:
    return object.__new__(asked)


def _give_new(cls: type, choose: Callable[[type, tuple[Any, ...], dict[str, Any]], type | None]) -> None:
    def __new__(asked: type, *args: Any, **given: Any) -> Any:
        # A class of somebody's own, derived from this one, is what it says.
        chosen = choose(asked, args, given) if asked is cls else None
        return object.__new__(asked if chosen is None else chosen)

    cls.__new__ = staticmethod(__new__)
    _changed.append(cls)


def _is_marked(cls: type, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    model = given.get("model", args[0] if args else None)
    return hasattr(model, MARK)


def _is_old(config: Any, given: dict[str, Any]) -> bool:
    return _needs_cpu(config, given) or not (OLD & given.keys()) <= fields_of(config)


def _needs_cpu(config: Any, given: Mapping[str, Any]) -> bool:
    """Whether half precision is asked for where no GPU is, which is refused unless ``use_cpu`` is set.

    TRL's configurations ask for it by themselves.
    """
    if torch.accelerator.is_available() or "use_cpu" in given or "no_cuda" in given:
        return False
    bf16 = given.get("bf16", next(f.default for f in dataclasses.fields(config) if f.name == "bf16"))
    return bool(given.get("fp16")) or bf16 is None or bool(bf16)


def positional(function: Callable[..., Any], args: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those given by their place too."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **given}
