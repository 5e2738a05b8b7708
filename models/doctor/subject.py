"""What is examined: the parts of a checkpoint, a sample of data and the settings of a run, as far as they are there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..gguf_header import read_header
from ..parts import unwrapped
from ..source import ModelError, Source, explained, locate, missing_weights
from .tensors import Tensors, of_folder, of_gguf, of_model

if TYPE_CHECKING:
    from torch import nn

    from .probe import Probe


@dataclass(frozen=True)
class Row:
    """One row of the data as training sees it.

    Attributes:
        name: ``file:row``.
        ids: its tokens.
        labels: what is trained on, -100 elsewhere; as long as ``ids``.
        text: as the tokenizer got it; None for rows that are tokens already.
        messages: of a conversation.
    """

    name: str
    ids: Sequence[int]
    labels: Sequence[int]
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Run:
    """What is known of the training run; the defaults are those of `unsloth train`.

    Attributes:
        dtype: of the arithmetic: "float32", "bfloat16" or "float16".
        max_length: rows are cut off there.
        packing: None, "bfd" (documents stay apart) or "wrapped" (rows are cut from one stream).
        adapted: names of modules with adapters, None where it is not known.
        saved_modules: names of modules trained whole beside adapters.
        trainer: "unsloth" divides the loss by the tokens of the whole accumulated batch and masks padding by its
            place; "transformers" leaves both to the model's class and to the collator.
    """

    dtype: str = "bfloat16"
    max_length: int | None = None
    packing: str | None = None
    adapted: Sequence[str] | None = None
    saved_modules: Sequence[str] = ()
    trainer: str = "transformers"


@dataclass
class Subject:
    """What the rules look at. Parts that are None are not there.

    Attributes:
        name: as the user called it.
        config: transformers' configuration of the language model.
        written: ``config.json`` as it stands in the folder, of which ``config`` was made; empty without a folder.
        generation: token settings of ``generation_config.json``, or what the configuration says instead.
        tokenizer: as the model is used with.
        rows: a sample of the data.
        tensors: the checkpoint's or the model's, read when asked for.
        model: a model in memory.
        run: settings; None where no run is meant.
        attn_implementation: what attention is computed with; None is transformers' choice.
        notes: what loading has put right, and other programs may not.
    """

    name: str
    config: Any = None
    written: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    rows: Sequence[Row] | None = None
    tensors: Tensors | None = None
    model: nn.Module | None = None
    run: Run | None = None
    attn_implementation: str | None = None
    notes: Sequence[str] = ()

    def lacks(self, part: str) -> str | None:
        """Why a part of :data:`~unsloth.models.doctor.rule.PARTS` cannot be looked at, or None."""
        there = {
            "config": self.config is not None,
            "tokenizer": self.tokenizer is not None,
            "template": bool(getattr(self.tokenizer, "chat_template", None)),
            "data": bool(self.rows),
            "weights": self.tensors is not None,
            "code": self.config is not None,
            "run": self.run is not None,
        }
        words = {"run": "no settings of a run", "data": "no data", "code": "no configuration"}
        return None if there[part] else words.get(part, f"no {part}")

    @cached_property
    def text_config(self) -> Any:
        """Of the language model, where the configuration has several parts."""
        return self.config.get_text_config(decoder=True)

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding, by the configuration."""
        return self.text_config.vocab_size

    @property
    def written_text(self) -> Mapping[str, Any]:
        """The part of ``config.json`` that :attr:`text_config` was made of."""
        return self.written.get("text_config") or self.written

    @cached_property
    def probe(self) -> Probe:
        """A tiny model of the same class.

        Raises:
            ProbeError: when no tiny model can be built.
        """
        from .probe import Probe

        return Probe(self.text_config, self.model, self.attn_implementation)


def read(
    name: str, *, weights: bool, trust_remote_code: bool = False, gguf_file: str | None = None, tokenizer: Any = None
) -> Subject:
    """Read what there is of a model by its name, without loading it.

    Args:
        name: what :func:`~unsloth.models.load.load_model` takes.
        weights: look at the weights as well; only the tensors that rules ask for are read.
        tokenizer: instead of the model's own.

    Raises:
        ModelError: when there is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    from .. import presets
    from ..tokenizer import load_tokenizer

    source = locate(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code, tokenizer_only=not weights)
    if source.adapter:
        return read(source.base_model, weights=weights, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    if tokenizer is None and (source.folder is None or source.has_tokenizer):
        try:
            tokenizer = load_tokenizer(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
        except ModelError:
            if source.folder is not None:
                raise
    if source.folder is None:
        return Subject(name, presets.config(name), tokenizer=tokenizer)
    with explained(name):
        if source.gguf:
            config = _of_header(source.files / source.gguf)
        else:
            config = AutoConfig.from_pretrained(source.files, trust_remote_code=trust_remote_code)
        subject = Subject(
            name,
            config,
            written=written_json(source),
            generation=written_json(source, "generation_config.json"),
            tokenizer=tokenizer,
        )
        subject.notes = [*_padding_note(source, tokenizer)]
        if weights and source.gguf:
            subject.tensors = of_gguf(source.files / source.gguf)
        elif weights and not missing_weights(source.files):
            subject.tensors = of_folder(source.files)
        elif weights:
            raise ModelError(f"{name!r} has no weights to look at: {', '.join(missing_weights(source.files))}")
    return subject


def _padding_note(source: Source, tokenizer: Any) -> Iterator[str]:
    """Say where the files pad with EOS and :func:`~unsloth.models.tokenizer.load_tokenizer` has taken another token."""
    if source.gguf:
        settings = read_header(source.files / source.gguf).settings
        pad, eos = (settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("padding", "eos"))
    else:
        settings = written_json(source, "tokenizer_config.json")
        # A token is written as its text, or as an object that has it.
        written = [settings.get(name) for name in ("pad_token", "eos_token")]
        pad, eos = (token.get("content") if isinstance(token, dict) else token for token in written)
    if pad is not None and pad == eos and tokenizer is not None and tokenizer.pad_token != tokenizer.eos_token:
        yield (
            f"the files pad with EOS; loaded here, padding is {tokenizer.pad_token!r}. Programs that take it from the "
            "files and mask padding by its id hide EOS from the loss"
        )


def _of_header(path: Path) -> Any:
    """The configuration that transformers makes of a GGUF file, of its header alone: the lists of the vocabulary would
    take it seconds."""
    from transformers import AutoConfig

    header = read_header(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "header.gguf").write_bytes(header.short)
        config: Any = AutoConfig.from_pretrained(folder, gguf_file="header.gguf")
    config.tie_word_embeddings = "output.weight" not in header.tensors
    embedding = header.tensors.get("token_embd.weight")
    if not any(key.endswith(".vocab_size") for key in header.settings) and embedding is not None:
        config.vocab_size = embedding.shape[0]
    config.name_or_path = str(path)
    return config


def of_loaded(model: nn.Module, tokenizer: Any = None, *, name: str | None = None) -> Subject:
    """A model in memory, PEFT-wrapped or not.

    Raises:
        ModelError: when it has no configuration of transformers.
    """
    base = unwrapped(model)
    if not hasattr(base, "config"):
        raise ModelError(f"{type(base).__name__} has no configuration: doctor takes a model of transformers, or a name")
    generation = getattr(base, "generation_config", None)
    return Subject(
        name or base.config.name_or_path or type(base).__name__,
        base.config,
        generation={} if generation is None else generation.to_dict(),
        tokenizer=tokenizer,
        tensors=of_model(base),
        model=model,
        attn_implementation=getattr(base.config, "_attn_implementation", None),
    )


def written_json(source: Source, name: str = "config.json") -> dict[str, Any]:
    """A file of settings as it stands in a model's folder; empty where there is none."""
    if source.folder is None or source.gguf or not (path := source.files / name).is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
