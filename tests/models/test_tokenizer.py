"""A tokenizer's special tokens are such that a model can learn to stop."""

from __future__ import annotations

import logging

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from unsloth.models.source import ModelError
from unsloth.models.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_saved_and_loaded(checkpoint):
    tokenizer = load_tokenizer(str(checkpoint), require_chat_template=True)
    text = "Grüße, 世界 🙂\n\n  <|im_end|>"
    ids = tokenizer(text).input_ids
    assert ids == [*text.removesuffix("<|im_end|>").encode(), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )


def test_tiny_presets_speak_bytes():
    assert load_tokenizer("tiny-mistral")("a").input_ids == [97]
    with pytest.raises(ModelError, match="'llama-8b' is a shape with random weights"):
        load_tokenizer("llama-8b")


def test_assistant_tokens_are_marked():
    encoded = load_tokenizer("tiny-llama").apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert marked == [*b"Ho", 257]


def made(tmp_path, special: list[str], **roles: str) -> str:
    """A folder with a tokenizer that has some special tokens, in these roles."""
    raw = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    PreTrainedTokenizerFast(tokenizer_object=raw, **roles).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("special", "roles", "padding"),
    [
        (["</s>", "<pad>"], {"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
        (["</s>", "<|finetune_right_pad_id|>"], {"eos_token": "</s>"}, "<|finetune_right_pad_id|>"),
        (["<|im_end|>", "<|image_pad|>", "<|fim_pad|>"], {"eos_token": "<|im_end|>"}, "<|fim_pad|>"),
        (["<|eot|>", "<|reserved_0|>", "<unk>"], {"eos_token": "<|eot|>", "unk_token": "<unk>"}, "<|reserved_0|>"),
        (["<|im_end|>", "<|endoftext|>"], {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, "<|endoftext|>"),
        (["<s>", "</s>", "<unk>"], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
    ],
)
def test_padding_is_not_eos(tmp_path, special, roles, padding):
    tokenizer = load_tokenizer(made(tmp_path, special, **roles))
    assert tokenizer.pad_token == padding
    assert tokenizer.eos_token == roles["eos_token"]
    assert len(tokenizer) == 1 + len(special)


def test_padding_with_eos_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(made(tmp_path, ["</s>"], eos_token="</s>"))
    assert tokenizer.pad_token == "</s>"
    assert "padding with EOS" in caplog.text


def test_no_chat_template(tmp_path):
    folder = made(tmp_path, ["</s>"], eos_token="</s>")
    load_tokenizer(folder)
    with pytest.raises(ModelError, match=r"has no chat template.*set tokenizer\.chat_template"):
        load_tokenizer(folder, require_chat_template=True)


def test_a_folder_without_tokenizer(copy_of):
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json or tokenizer\.model\)"):
        load_tokenizer(str(copy_of("tokenizer*", "*.jinja")))


def test_a_damaged_tokenizer(copy_of):
    folder = copy_of()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="cannot load"):
        load_tokenizer(str(folder))
