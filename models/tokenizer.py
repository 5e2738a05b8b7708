"""A tokenizer by the name of its model, with special tokens that training can rely on."""

from __future__ import annotations

import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import presets
from .byte_tokenizer import VOCABULARY, byte_tokenizer
from .gguf_header import read_header
from .source import ModelError, Source, explained, locate

logger = logging.getLogger(__name__)

# GGUF's name of a special token's id, and the tokenizer's attribute.
_SPECIAL = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}


def load_tokenizer(
    name: str,
    *,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    require_chat_template: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Its padding token is never EOS where the vocabulary has another token for it: what masks padding by its id would
    hide EOS from the loss, and the model would never learn to stop. No token is ever added, so no embedding is resized.

    Args:
        name, gguf_file, trust_remote_code, revision, token: as :func:`~unsloth.models.load.load_model` takes them. A
            ``tiny-*`` preset has the tokenizer of bytes; an adapter without a tokenizer has that of its base model.
        require_chat_template: whether conversations will be given to it.

    Raises:
        ModelError: when there is no tokenizer, or it lacks the chat template that is required.
    """
    where = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code, "revision": revision, "token": token}
    source = locate(name, tokenizer_only=True, **where)
    if source.folder is None:
        if presets.SHAPES[name]["vocab_size"] != VOCABULARY:
            raise ModelError(f"the preset {name!r} is a shape with random weights and has no tokenizer")
        return byte_tokenizer()
    if source.adapter and not source.has_tokenizer:
        return load_tokenizer(
            source.base_model,
            trust_remote_code=trust_remote_code,
            token=token,
            require_chat_template=require_chat_template,
        )
    if not source.has_tokenizer:
        raise ModelError(f"{name!r} has no tokenizer (tokenizer.json or tokenizer.model)")
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(
            source.files, gguf_file=source.gguf, trust_remote_code=trust_remote_code
        )
        if source.gguf:
            _take_special_tokens(tokenizer, source)
    separate_padding(tokenizer, name)
    if require_chat_template and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {name!r} has no chat template, as those of base models have none: take the instruct "
            "model, train on plain text, or set tokenizer.chat_template"
        )
    return tokenizer


def _take_special_tokens(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Set BOS, EOS, padding and unknown token as the GGUF file says.

    transformers 5.17 sets EOS to BOS for vocabularies of the GPT-2 kind.
    """
    settings = read_header(source.files / (source.gguf or "")).settings
    for key, attribute in _SPECIAL.items():
        number = settings.get(f"tokenizer.ggml.{key}")
        if number is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(number)))


def separate_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer a padding token, one of its own that nothing else means."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    taken = [tokenizer.eos_token, tokenizer.bos_token]
    spare = [str(t) for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and str(t) not in taken]
    if tokenizer.unk_token is not None and tokenizer.unk_token not in taken:
        spare.append(str(tokenizer.unk_token))
    # Best first. The padding of pictures is no padding: a vision model reads it as a place to fill.
    found = (
        [t for t in spare if "pad" in t.lower() and not any(s in t for s in ("image", "vision", "video", "audio"))]
        + [t for t in spare if "reserved" in t or "unused" in t or "placeholder" in t]
        + [t for t in spare if t in ("<|endoftext|>", tokenizer.unk_token)]
    )
    if found:
        tokenizer.pad_token = found[0]
        logger.info("%s: padding with %s, which is not EOS", name, found[0])
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning("%s: padding with EOS for want of another token; mask padding by position, not by id", name)
