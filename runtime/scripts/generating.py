"""``fast_generate``, ``save_lora`` and ``load_lora``: Unsloth's names, and :mod:`unsloth.runtime.generation`.

What comes back has the attributes that vLLM's results have, as scripts read them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ...models.source import ModelError
from ..generation.batch import Completion
from ..generation.engine import SHARE, complete, engine_of
from ..generation.sampling import Sampling, sampling_of
from ..generation.support import Unsupported
from .old_names import explain_once

logger = logging.getLogger(__name__)

_AS_TRAINED = object()
_TOKENIZER = "_unsloth_tokenizer"
_SHARE = "gpu_memory_utilization"


@dataclass(frozen=True)
class LoraRequest:
    """An adapter in a folder, for ``fast_generate(lora_request=...)``."""

    lora_name: str
    lora_path: str


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: among the prompt's completions.
        text: without special tokens.
        token_ids: all of them, the one that ended it included.
        logprobs: of each token, in nats; None where ``generate`` of transformers made them.
        finish_reason: "stop" or "length".
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str

    @property
    def cumulative_logprob(self) -> float | None:
        return None if self.logprobs is None else sum(self.logprobs)


@dataclass(frozen=True)
class RequestOutput:
    """The completions of one prompt; ``prompt`` is its text, where that was given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


def give_generation(model: Any, tokenizer: Any = None) -> Any:
    """Put the methods on a model, which generates with the weights and adapters that it has when they are called."""
    if tokenizer is not None:
        setattr(model, _TOKENIZER, tokenizer)
    for method in (fast_generate, save_lora, load_lora):
        setattr(model, method.__name__, MethodType(method, model))
    return model


def fast_generate(
    model: Any,
    prompts: Any = None,
    sampling_params: Any = None,
    *,
    lora_request: Any = _AS_TRAINED,
    tokenizer: Any = None,
    use_tqdm: bool = False,
    input_ids: Any = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    compile: bool = False,
    **settings: Any,
) -> Any:
    """Complete prompts with the model's present weights, many at a time; see docs/grpo.md, "Rollouts".

    Args:
        prompts: a text, texts, tokens, or lists of tokens (also ``{"prompt": …}``, ``{"prompt_token_ids": …}``).
        sampling_params: an object with the attributes of vLLM's ``SamplingParams``, or a ``GenerationConfig``; where
            neither is given, what the model's own ``generation_config`` says.
        lora_request: what :func:`load_lora` returned, for the adapter of a folder; None for the model without adapters.
            Left out, the adapters are those that the model has.
        tokenizer: for texts and stop strings; None is the one that the model was loaded with.
        use_tqdm: accepted; nothing is drawn.
        input_ids, attention_mask: prompts as ``generate`` takes them, padded on either side, in place of ``prompts``.
        compile: compile the step of decoding by the backend, which takes minutes once and pays over many calls.
        generation_config, settings: as ``generate`` takes them (``max_new_tokens=…``); settings come first.

    Returns:
        a :class:`RequestOutput` for each prompt; for ``input_ids`` a tensor as ``generate`` returns it, prompts
        included, padded at the right.

    Raises:
        NoSpaceError: when keys and values of a single sequence do not fit the device.
        ValueError, TypeError: for prompts or settings that cannot be.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, _TOKENIZER, None)
    if (prompts is None) == (input_ids is None):
        raise TypeError("fast_generate takes prompts, or input_ids as generate does")
    if input_ids is not None:
        texts, tokens = None, _unpadded(input_ids, attention_mask)
    else:
        texts, tokens = _tokens(prompts, tokenizer)
    config = generation_config if generation_config is not None else sampling_params
    share = getattr(model, _SHARE, None) or SHARE
    with _adapter(model, lora_request):
        try:
            sampling = sampling_of(config, model, max(map(len, tokens), default=0), settings)
            made = complete(model, tokens, sampling, tokenizer=tokenizer, share=share, compile=compile)
        except Unsupported as reason:
            explain_once(f"fast_generate: {reason}", "completions are made by generate of transformers")
            sampling, made = _by_generate(model, tokens, config, settings, tokenizer)
    if input_ids is not None:
        return _as_generate(input_ids, made, sampling, tokenizer, model)
    return _results(texts, tokens, made, sampling.per_prompt, tokenizer)


def save_lora(model: Any, save_directory: str | Path, **_: Any) -> None:
    """Write the model's adapter into a folder, as PEFT does.

    Raises:
        ModelError: when it has none.
    """
    if not hasattr(model, "peft_config"):
        raise ModelError("save_lora: the model has no adapter; get_peft_model gives it one")
    model.save_pretrained(str(save_directory))


def load_lora(model: Any, save_directory: str | Path, load_tensors: bool = False) -> LoraRequest:
    """Name an adapter in a folder, for ``fast_generate(lora_request=...)``; the model stays as it is.

    Raises:
        ModelError: when the folder holds none, or the model takes none.
    """
    path = Path(save_directory)
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"load_lora: there is no adapter in {str(path)!r} (no adapter_config.json)")
    if not hasattr(model, "peft_config"):
        raise ModelError("load_lora: the model takes no adapter; get_peft_model prepares it for one")
    return LoraRequest(path.name, str(path))


def note_support(model: Any) -> None:
    """Say at once, where fast inference was asked for, when ``generate`` will do it."""
    try:
        engine_of(model)
    except Unsupported as reason:
        explain_once("fast_inference", f"completions are made by generate of transformers, because {reason}")


# -- prompts -----------------------------------------------------------------------------------------------------------


def _tokens(prompts: Any, tokenizer: Any) -> tuple[list[str | None], list[list[int]]]:
    """Texts, where there are, and tokens of each prompt."""
    if isinstance(prompts, (str, Mapping)) or (_is_list(prompts) and len(prompts) and isinstance(prompts[0], int)):
        prompts = [prompts]
    texts: list[str | None] = []
    tokens: list[list[int]] = []
    for index, given in enumerate(prompts):
        prompt: Any = given
        if isinstance(given, Mapping):
            prompt = given.get("prompt_token_ids") or given.get("prompt")
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("texts need a tokenizer: fast_generate(..., tokenizer=…)")
            begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
            texts.append(prompt)
            tokens.append(list(tokenizer(prompt, add_special_tokens=not begun)["input_ids"]))
        elif _is_list(prompt) and all(isinstance(token, int) for token in prompt):
            texts.append(None)
            tokens.append(list(prompt))
        else:
            raise TypeError(f"prompt {index} is neither text nor a list of tokens but {type(prompt).__name__}")
    return texts, tokens


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _unpadded(input_ids: Any, attention_mask: Tensor | None) -> list[list[int]]:
    ids = torch.as_tensor(input_ids)
    if ids.dim() != 2:
        raise ValueError(f"input_ids have to be [batch, length], not {tuple(ids.shape)}")
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
    return [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]


# -- adapters ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _adapter(model: Any, request: Any) -> Iterator[None]:
    """The adapters that a call asks for; afterwards those of before, trainable as they were."""
    if request is _AS_TRAINED or (request is None and not hasattr(model, "peft_config")):
        yield
        return
    if request is None:
        with model.disable_adapter():
            yield
        return
    active, trained = model.active_adapters, [p for p in model.parameters() if p.requires_grad]
    name = f"_request_{request.lora_name}".replace(".", "_")
    model.load_adapter(request.lora_path, name, is_trainable=False)
    try:
        model.base_model.set_adapter(name)
        yield
    finally:
        model.base_model.set_adapter(list(active))
        model.delete_adapter(name)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


# -- results -----------------------------------------------------------------------------------------------------------


def _results(
    texts: list[str | None] | None, tokens: list[list[int]], made: list[Completion], each: int, tokenizer: Any
) -> list[RequestOutput]:
    results = []
    for index, ids in enumerate(tokens):
        outputs = [
            CompletionOutput(
                place,
                "" if tokenizer is None else tokenizer.decode(c.ids, skip_special_tokens=True),
                c.ids,
                c.log_p or None,
                c.reason,
            )
            for place, c in enumerate(made[index * each : (index + 1) * each])
        ]
        results.append(RequestOutput(None if texts is None else texts[index], ids, outputs))
    return results


def _as_generate(input_ids: Any, made: list[Completion], sampling: Sampling, tokenizer: Any, model: Any) -> Tensor:
    """Prompts as they were given, and completions padded to the longest."""
    ids = torch.as_tensor(input_ids)
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        padding = next(iter(sampling.ends), 0) if model.config.pad_token_id is None else model.config.pad_token_id
    longest = max(len(c.ids) for c in made)
    new = torch.full((len(made), longest), padding, dtype=ids.dtype)
    for row, completion in enumerate(made):
        new[row, : len(completion.ids)] = torch.tensor(completion.ids)
    return torch.cat([ids.repeat_interleave(sampling.per_prompt, 0), new.to(ids.device)], dim=1)


def _by_generate(
    model: Any, tokens: list[list[int]], config: Any, settings: dict[str, Any], tokenizer: Any
) -> tuple[Sampling, list[Completion]]:
    """The same of ``generate``, where it has to."""
    given = config if isinstance(config, GenerationConfig) else None
    if config is not None and given is None:
        asked = sampling_of(config, model, 0, {})
        given = GenerationConfig(
            max_new_tokens=asked.new_tokens,
            do_sample=asked.sample,
            repetition_penalty=asked.repetition_penalty,
            num_return_sequences=asked.per_prompt,
            eos_token_id=sorted(asked.ends) or None,
            stop_strings=list(asked.stops) or None,
            **(
                {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p, "min_p": asked.min_p}
                if asked.sample
                else {}
            ),
        )
    longest = max(map(len, tokens))
    device = model.get_input_embeddings().weight.device
    padding = model.config.get_text_config().pad_token_id or 0
    ids = torch.tensor([[padding] * (longest - len(t)) + t for t in tokens], device=device)
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in tokens], device=device)
    whole = given or getattr(model, "generation_config", None) or GenerationConfig()
    each = settings.get("num_return_sequences") or whole.num_return_sequences or 1
    ends = settings.get("eos_token_id", whole.eos_token_id)
    ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
    training = model.training
    more = {"generation_config": given} if given is not None else {}
    if tokenizer is not None:
        more["tokenizer"] = tokenizer
    try:
        with torch.no_grad():
            out = model.eval().generate(input_ids=ids, attention_mask=mask, pad_token_id=padding, **more, **settings)
    finally:
        model.train(training)
    made = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        made.append(Completion(row if end is None else row[: end + 1], [], "length" if end is None else "stop"))
    return Sampling(max(out.shape[1] - longest, 1), ends=ends, per_prompt=each), made
