"""The header of a GGUF file, read by itself, against gguf's own reader and transformers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from unsloth.models.doctor.subject import _of_header
from unsloth.models.doctor.tensors import of_gguf
from unsloth.models.gguf_header import read_header

WORDS = [f"word{i}" for i in range(2000)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(2000)
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.5] * 2000)
    writer.add_eos_token_id(7)
    writer.add_add_bos_token(True)
    writer.add_array("general.tags", ["a", "b"])
    rng = np.random.default_rng(0)
    table = rng.standard_normal((2000, 64), dtype=np.float32)
    writer.add_tensor(
        "token_embd.weight",
        gguf.quantize(table, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.add_tensor("output.weight", table.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_settings_and_places(file):
    header = read_header(file)
    assert header.settings["tokenizer.ggml.eos_token_id"] == 7
    assert header.settings["tokenizer.ggml.add_bos_token"] is True
    assert header.settings["llama.rope.freq_base"] == 12345.0
    assert header.settings["tokenizer.ggml.tokens"] == header.settings["tokenizer.ggml.scores"] == 2000
    theirs = {t.name: (tuple(int(n) for n in reversed(t.shape)), t.data_offset) for t in gguf.GGUFReader(file).tensors}
    assert {name: (info.shape, info.offset) for name, info in header.tensors.items()} == theirs


def test_tensors_are_those_of_the_reader(file):
    ours = of_gguf(file)
    assert (ours.embedding, ours.head, ours.norms) == ("token_embd.weight", "output.weight", ["blk.0.attn_norm.weight"])
    for tensor in gguf.GGUFReader(file).tensors:
        truth = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        torch.testing.assert_close(ours.read(tensor.name), truth.reshape(ours.entries[tensor.name].shape))


def test_configuration_of_the_header_alone(file):
    config = _of_header(file)
    assert (config.model_type, config.vocab_size, config.rope_parameters["rope_theta"]) == ("llama", 2000, 12345.0)
    assert config.tie_word_embeddings is False and config.eos_token_id == 7
    assert len(read_header(file).short) < 1000


def test_what_is_no_header(file, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGML" + bytes(60))
    with pytest.raises(ValueError, match="no GGUF file"):
        read_header(other)
    other.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="cut off"):
        read_header(other)
