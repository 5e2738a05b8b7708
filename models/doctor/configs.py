"""Rules over the configuration: what ``config.json`` says against itself, and against what was read of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .rope import yarn_attention_factor
from .rule import ERROR, WARNING, rule
from .subject import Subject


def parameters_of(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary settings by layer type; by "" where there is one for all."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = {str(k): v for k, v in found.items() if isinstance(v, dict)}
    return nested or ({"": found} if found else {})


@rule(
    "rope-theta-lost",
    ERROR,
    "config",
    remedy="write rope_theta once, inside of rope_parameters, with the value of the model's card",
)
def rope_theta_lost(subject: Subject) -> Iterator[str]:
    """The base of the rotation that config.json says is not the one that was read: positions mean something else, and
    the longer the text the more."""
    written = subject.written_text
    inner = {name: written.get(name) for name in ("rope_parameters", "rope_scaling")}
    said = {"rope_theta": written.get("rope_theta")}
    said |= {f"{n}.rope_theta": v.get("rope_theta") for n, v in inner.items() if isinstance(v, dict)}
    for layers, parameters in parameters_of(subject.text_config).items():
        if layers:  # bases of different layers differ, and each is said in one place
            continue
        for name, value in said.items():
            if isinstance(value, int | float) and not math.isclose(value, parameters.get("rope_theta") or 0):
                yield f"config.json says {name} {value:,g}; the model rotates with {parameters.get('rope_theta'):,g}"


@rule(
    "rope-scaling-lost",
    ERROR,
    "config",
    remedy="write the kind of scaling as rope_type in rope_parameters, with its factor",
)
def rope_scaling_lost(subject: Subject) -> Iterator[str]:
    """config.json declares a scaling of the rotation that was not read: beyond the trained context the model fails."""
    written = subject.written_text
    for name in ("rope_scaling", "rope_parameters"):
        scaling = written.get(name)
        if not isinstance(scaling, Mapping) or any(isinstance(v, Mapping) for v in scaling.values()):
            continue
        said = scaling.get("rope_type", scaling.get("type"))
        read = parameters_of(subject.text_config).get("", {}).get("rope_type")
        if said is None and scaling.get("factor") not in (None, 1, 1.0):
            yield f"{name} has the factor {scaling['factor']:g} and no rope_type; {read!r}, which was read, has none"
        elif said not in (None, read) and read == "default":
            yield f"{name} says {said!r}, and {read!r} was read"


@rule(
    "rope-attention-factor",
    WARNING,
    "config",
    remedy="leave attention_factor out, unless the model was trained with it",
)
def rope_attention_factor(subject: Subject) -> Iterator[str]:
    """YaRN's attention factor is not that of its formula, 0.1 ln(factor) + 1: attention is sharper or flatter than the
    scaling wants."""
    for parameters in parameters_of(subject.text_config).values():
        given = parameters.get("attention_factor")
        if parameters.get("rope_type") != "yarn" or given is None or not parameters.get("factor"):
            continue
        formula = yarn_attention_factor({k: v for k, v in parameters.items() if k != "attention_factor"})
        if not math.isclose(given, formula, rel_tol=0.01):
            yield f"attention_factor is {given:g}; a factor of {parameters['factor']:g} wants {formula:.4g}"


@rule(
    "rope-context",
    WARNING,
    "config",
    remedy="lower max_position_embeddings, or raise factor and train at that length",
)
def rope_context(subject: Subject) -> Iterator[str]:
    """The context that is promised is longer than YaRN's scaling reaches."""
    promised = getattr(subject.text_config, "max_position_embeddings", None)
    for parameters in parameters_of(subject.text_config).values():
        trained, factor = parameters.get("original_max_position_embeddings"), parameters.get("factor")
        if parameters.get("rope_type") != "yarn" or not (promised and trained and factor):
            continue
        if promised > trained * factor * 1.01:
            yield f"max_position_embeddings is {promised:,}; {trained:,} trained positions × {factor:g} are fewer"


@rule(
    "activations-disagree",
    WARNING,
    "config",
    remedy="set both to the activation that the model was trained with (Gemma: gelu_pytorch_tanh)",
)
def activations_disagree(subject: Subject) -> Iterator[str]:
    """config.json names two activations, of which libraries take one or the other: the exact GELU and its tanh form
    differ enough to make a model worse."""
    one, other = (subject.written_text.get(name) for name in ("hidden_act", "hidden_activation"))
    if one and other and one != other:
        yield f"hidden_act is {one!r}, hidden_activation {other!r}"
