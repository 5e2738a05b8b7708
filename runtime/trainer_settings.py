"""The settings of TRL's ``SFTConfig``, ``DPOConfig`` and ``ORPOConfig``, read from their source: names, types, choices.

Importing TRL takes longer than everything else that a command line checks. The source says the same: which fields the
dataclasses have, with which annotations, and which words the enumerations know. Nothing of it is run.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = {
    "sft": ("trl.trainer.sft_config", "SFTConfig"),
    "dpo": ("trl.trainer.dpo_config", "DPOConfig"),
    "orpo": ("trl.experimental.orpo.orpo_config", "ORPOConfig"),
}
"""Where each way of training has its settings."""

OURS = {
    "sft": frozenset({"trust_remote_code"}),
    # There the model would be loaded by TRL, from its name.
    "dpo": frozenset({"trust_remote_code", "model_init_kwargs", "padding_free"}),
    "orpo": frozenset({"trust_remote_code", "model_init_kwargs", "is_encoder_decoder"}),
}
"""Fields of theirs that are no settings here: foreign code is ours to decide about, the others would do nothing."""

# What their types do not say, and their constructors find only when the model is loaded, or never.
_POSITIVE = {"gradient_accumulation_steps", "per_device_eval_batch_size", "num_train_epochs", "eval_steps"}
_POSITIVE |= {"save_steps"}
_NOT_NEGATIVE = {"weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon", "neftune_noise_alpha", "data_seed"}
_NOT_NEGATIVE |= {"dataloader_num_workers", "label_smoothing_factor", "save_total_limit", "adam_beta1", "adam_beta2"}
_NOT_NEGATIVE |= {"beta", "label_smoothing"}
_BELOW_ONE = {"adam_beta1", "adam_beta2", "label_smoothing_factor"}
_WORDS = {
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "truncation_mode": ("keep_start", "keep_end"),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "report_to": (
        *("none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow"),
        *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
    ),
}
_LOSSES = {
    "sft": ("nll", "dft", "chunked_nll"),
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "orpo": (),
}

# What Trainer.train and DPOConfig's constructor take and the dataclasses do not say.
_ALSO = {"resume_from_checkpoint": {"bool"}, "loss_type": {"str"}}


@dataclass(frozen=True)
class Setting:
    """A field of the dataclass.

    Attributes:
        types: names of the types that it takes, such as ``int`` or ``None``; empty when they are not known.
        words: the texts that it takes; empty for any.
    """

    types: frozenset[str]
    words: tuple[str, ...] = ()


@functools.cache
def trainer_settings(method: str = "sft") -> dict[str, Setting]:
    """All fields that can be set for one of ``METHODS``, those of the bases included."""
    found: dict[str, Setting] = {}
    for module, name in (
        *(("transformers.training_args", "TrainingArguments"), ("trl.trainer.base_config", "_BaseConfig")),
        METHODS[method],
    ):
        for statement in _class(module, name).body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_set(statement):
                field = statement.target.id
                words = _LOSSES[method] if field == "loss_type" else _WORDS.get(field)
                words = words or _choices(statement.annotation)
                found[field] = Setting(_types(statement) | _ALSO.get(field, set()), tuple(words))
    return {name: setting for name, setting in found.items() if name not in OURS[method]}


def problem(name: str, value: Any, method: str = "sft") -> str | None:
    """What is wrong with the value of a setting; None when nothing is known to be."""
    setting = trainer_settings(method)[name]
    types = setting.types
    if types and not any(_is(value, kind) for kind in types):
        wanted = " or ".join(sorted(_IN_WORDS.get(kind, kind) for kind in types - {"None"}))
        return f"cannot be {value!r}: it takes {wanted}"
    for word in value if isinstance(value, list) else [value]:
        if setting.words and isinstance(word, str) and word and word not in setting.words:
            close = difflib.get_close_matches(word, setting.words, n=1)
            meant = f", did you mean {close[0]!r}?" if close else f": it takes {', '.join(setting.words)}"
            return f"cannot be {word!r}{meant}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if name in _POSITIVE and not value > 0:
            return f"cannot be {value!r}: it has to be greater than 0"
        if name in _NOT_NEGATIVE and not value >= 0:
            return f"cannot be {value!r}: it cannot be negative"
        if name in _BELOW_ONE and not value < 1:
            return f"cannot be {value!r}: it has to be less than 1"
        if name == "max_steps" and value == 0:
            return "cannot be 0: no step would be made"
    return None


_IN_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
_IN_WORDS |= {"dict": "a mapping"}


def _is(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "list": list, "dict": dict}
    return isinstance(value, kinds[kind])


def _is_set(statement: ast.AnnAssign) -> bool:
    """Whether the constructor takes it."""
    keywords = statement.value.keywords if isinstance(statement.value, ast.Call) else []
    return not any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in keywords)


def _types(statement: ast.AnnAssign) -> frozenset[str]:
    """The types of an annotation; None as well where that is the default, and empty where one is not known."""
    names = set()
    for node in _alternatives(statement.annotation):
        if isinstance(node, ast.Constant) and node.value is None:
            names.add("None")
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            names.add(node.value.id)
        elif isinstance(node, ast.Name):
            names.add("str" if _enumeration(node.id) else node.id)
        else:
            return frozenset()
    if isinstance(statement.value, ast.Call):
        defaults = [k.value for k in statement.value.keywords if k.arg == "default"]
        names |= {"None" for default in defaults if isinstance(default, ast.Constant) and default.value is None}
    return frozenset(names) if names <= {"int", "float", "bool", "str", "list", "dict", "None"} else frozenset()


def _choices(annotation: ast.expr) -> list[str]:
    """The words of the enumeration in an annotation."""
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return [word for name in names for word in _enumeration(name)]


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    return [annotation]


@functools.cache
def _enumeration(name: str) -> tuple[str, ...]:
    for module in ("transformers.training_args", "transformers.trainer_utils", "transformers.debug_utils"):
        for node in _tree(module).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                values = [s.value for s in node.body if isinstance(s, ast.Assign)]
                return tuple(str(v.value) for v in values if isinstance(v, ast.Constant))
    return ()


def _class(module: str, name: str) -> ast.ClassDef:
    return next(n for n in ast.walk(_tree(module)) if isinstance(n, ast.ClassDef) and n.name == name)


@functools.cache
def _tree(module: str) -> ast.Module:
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)  # finds a package without importing it
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))
