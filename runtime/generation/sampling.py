"""How tokens are chosen: what a ``GenerationConfig`` or an object like vLLM's ``SamplingParams`` asks for.

Filters are transformers' own logits processors. A token is drawn by its place in the cumulative distribution, from one
number a token that depends on nothing but the seed, the sequence and the position: which sequences run together, and
when, does not change what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from .support import Unsupported

# What transformers does where a configuration says nothing, and what asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "early_stopping": (False,), "min_length": (0,), "min_new_tokens": (0,),
    "length_penalty": (1.0,), "diversity_penalty": (0.0,), "no_repeat_ngram_size": (0,), "typical_p": (1.0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "guidance_scale": (1.0, 1), "renormalize_logits": (False,), "remove_invalid_values": (False,),
    "token_healing": (False,), "penalty_alpha": (0.0,), "use_mtp": (False,), "low_memory": (False,),
    "output_attentions": (False,), "output_hidden_states": (False,), "output_scores": (False,),
    "output_logits": (False,), "return_dict_in_generate": (False,),
    "begin_suppress_tokens": ([],), "bad_words_ids": ([],), "is_assistant": (False,),
}  # fmt: skip
_ABOUT_HOW = {"use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"}
_ABOUT_HOW |= {"continuous_batching_config", "prefill_chunk_size", "num_assistant_tokens", "speculation_type"}
_ABOUT_HOW |= {"num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind"}
_ABOUT_HOW |= {"target_lookbehind", "max_matching_ngram_size", "assistant_early_exit", "decoder_start_token_id"}
_UNDERSTOOD = {"max_length", "max_new_tokens", "stop_strings", "do_sample", "temperature", "top_k", "top_p", "min_p"}
_UNDERSTOOD |= {"repetition_penalty", "pad_token_id", "bos_token_id", "eos_token_id", "num_return_sequences"}
_UNDERSTOOD |= {"suppress_tokens"}
_LIKE_VLLM = ("max_tokens", "n", "stop", "stop_token_ids", "ignore_eos")


@dataclass(frozen=True)
class Sampling:
    """How completions are made.

    Attributes:
        new_tokens: at most, of each.
        sample: draw tokens, or take the likeliest.
        temperature: logits are divided by it before all else but the penalty.
        top_k, top_p, min_p, repetition_penalty: as in transformers; 0, 1, 0 and 1 change nothing.
        ends: tokens that end a completion, and belong to it.
        stops: texts that end a completion, and belong to it.
        suppressed: tokens that are never chosen, such as one that stands for an image.
        seed: of the draws; None draws one from PyTorch's own generator.
        per_prompt: completions of each prompt.
    """

    new_tokens: int
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    suppressed: frozenset[int] = frozenset()
    seed: int | None = None
    per_prompt: int = 1

    def __post_init__(self) -> None:
        for name, right in (
            ("new_tokens", self.new_tokens >= 1),
            ("temperature", self.temperature > 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p <= 1),
            ("repetition_penalty", self.repetition_penalty > 0),
            ("per_prompt", self.per_prompt >= 1),
        ):
            if not right:
                raise ValueError(f"{name}={getattr(self, name)} cannot be")

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1.0

    def chooser(self) -> Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]:
        """The function that chooses tokens; see :func:`choose`. It asks the device for nothing."""
        penalties, filters = transformers.LogitsProcessorList(), transformers.LogitsProcessorList()
        if self.needs_history:
            penalties.append(transformers.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.sample:
            if self.top_k:
                filters.append(transformers.TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                filters.append(transformers.TopPLogitsWarper(self.top_p))
            if self.min_p:
                filters.append(transformers.MinPLogitsWarper(self.min_p))

        def chosen(logits: Tensor, history: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
            drawn = noise if self.sample else None
            return choose(logits, history, drawn, self.temperature, penalties, filters, self.suppressed)

        return chosen

    def noise(self, seed: int, sequences: int) -> Tensor:
        """The numbers that decide what is drawn: float64 [sequences, new tokens], uniform in [0, 1)."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.rand(sequences, self.new_tokens, generator=generator, dtype=torch.float64)


def choose(
    logits: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    temperature: float,
    penalties: Callable[..., Tensor],
    filters: Callable[..., Tensor],
    suppressed: Iterable[int] = (),
) -> tuple[Tensor, Tensor]:
    """One token for each row.

    Args:
        logits: [rows, vocabulary].
        history: int64 [rows, length], the tokens before, however often each; None where no penalty reads it.
        noise: float64 [rows] in [0, 1); None takes the likeliest token.
        temperature, penalties, filters: applied in this order: penalties, temperature, filters.
        suppressed: tokens that are not chosen.

    Returns:
        tokens int64 [rows], and their log-probabilities float32 [rows] at that temperature before penalties and
        filters: what training makes of them.
    """
    logits = logits.float()
    scores = logits if history is None else penalties(history, logits.clone())
    for token in suppressed:  # few; a tensor of them would have to come from the host
        scores = scores.clone() if scores is logits else scores
        scores[:, token] = -torch.inf
    if noise is None:
        tokens = scores.argmax(-1)
    else:
        plain, logits = scores is logits, logits / temperature
        scores = logits if plain else scores / temperature
        cumulative = filters(history, scores).softmax(-1).double().cumsum(-1)
        target = (noise * cumulative[:, -1]).unsqueeze(1)
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    log_p = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
    return tokens, log_p


def sampling_of(given: Any, model: Any, longest_prompt: int, changes: dict[str, Any] | None = None) -> Sampling:
    """What a configuration, or an object like vLLM's, asks for.

    Args:
        given: a ``GenerationConfig``, any object with the attributes of vLLM's ``SamplingParams``, a mapping, or None.
        model: whose ``generation_config`` says what is not said otherwise.
        longest_prompt: tokens; where ``max_length`` is given it counts them.
        changes: settings by ``GenerationConfig``'s names, which come first.

    Raises:
        Unsupported: for what only ``generate`` does, by name.
        ValueError: for a value that cannot be.
    """
    own = getattr(model, "generation_config", None)
    if isinstance(given, transformers.GenerationConfig) or given is None:
        settings = {} if given is None else _said(given)
        defaults = {} if own is None else _said(own)
    else:
        settings, defaults = _like_vllm(given), {} if own is None else {"eos_token_id": own.eos_token_id}
    seed = settings.pop("seed", None)
    ignores_ends, more_ends = settings.pop("ignore_eos", False), settings.pop("stop_token_ids", None) or ()
    found = {**defaults, **settings, **(changes or {})}
    if ignores_ends:
        found["eos_token_id"] = None
    seed = found.pop("seed", seed)
    _refuse(found)
    new_tokens = found.get("max_new_tokens")
    if new_tokens is None:
        new_tokens = found["max_length"] - longest_prompt if found.get("max_length") else 256
    if new_tokens < 1:
        raise ValueError(
            f"max_length {found.get('max_length')} leaves no room behind {longest_prompt} tokens of prompt"
        )
    sample = bool(found.get("do_sample"))
    return Sampling(
        new_tokens=int(new_tokens),
        sample=sample,
        temperature=_or(found, "temperature", 1.0) if sample else 1.0,
        top_k=max(int(_or(found, "top_k", 50 if not _is_like_vllm(given) else 0)), 0) if sample else 0,
        top_p=_or(found, "top_p", 1.0) if sample else 1.0,
        min_p=_or(found, "min_p", 0.0) if sample else 0.0,
        repetition_penalty=_or(found, "repetition_penalty", 1.0),
        ends=frozenset({*_listed(found.get("eos_token_id")), *more_ends}),
        stops=tuple(_listed(found.get("stop_strings"))),
        suppressed=frozenset(_listed(found.get("suppress_tokens"))),
        seed=seed,
        per_prompt=int(_or(found, "num_return_sequences", 1)),
    )


def _said(config: Any) -> dict[str, Any]:
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    return {name: value for name, value in public.items() if value is not None and name != "transformers_version"}


def _is_like_vllm(given: Any) -> bool:
    return given is not None and not isinstance(given, transformers.GenerationConfig)


def _like_vllm(given: Any) -> dict[str, Any]:
    """vLLM's names and meanings as transformers': temperature 0 is greedy, top_k -1 is none, 16 tokens by default."""

    def value(name: str) -> Any:
        return given.get(name) if isinstance(given, dict) else getattr(given, name, None)

    temperature = value("temperature")
    settings = {
        "max_new_tokens": 16 if value("max_tokens") is None else value("max_tokens"),
        "num_return_sequences": value("n"),
        "stop_strings": value("stop"),
        "do_sample": temperature != 0,
        **{name: value(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed")},
        **{name: value(name) for name in ("stop_token_ids", "ignore_eos")},
    }
    if temperature:
        settings["temperature"] = temperature
    for name in ("presence_penalty", "frequency_penalty", "min_tokens", "logit_bias", "bad_words", "guided_decoding"):
        if value(name):
            raise ValueError(f"{name}={value(name)!r} is asked for, which only vLLM has")
    return {name: value for name, value in settings.items() if value is not None}


def _refuse(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if name in _UNDERSTOOD or name in _ABOUT_HOW or value is None or value in _NEUTRAL.get(name, ()):
            continue
        raise Unsupported(f"{name}={value!r} is asked for")


def _or(found: dict[str, Any], name: str, otherwise: Any) -> Any:
    return otherwise if found.get(name) is None else found[name]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
