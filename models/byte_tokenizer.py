"""A tokenizer of bytes: what the ``tiny-*`` presets, which have random weights and 260 tokens, are trained with."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# ChatML. The generation block marks what an assistant-only loss is taken of.
_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}
{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

VOCABULARY = 260
"""Size of the vocabulary: a token per byte, its value being its id, and four special ones."""


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """UTF-8 bytes as tokens 0–255, then ``<|im_start|>`` (BOS), ``<|im_end|>`` (EOS), ``<|pad|>`` and ``<|unk|>``."""
    special = ("<|im_start|>", "<|im_end|>", "<|pad|>", "<|unk|>")
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + list(special)
    # Without merges and letters, every character falls back to its bytes.
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bos, eos, pad, unk = special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
