"""Exported models are the trained ones: logits of base and adapter, GGUF read back, names that stay in their folder."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from unsloth.models import presets
from unsloth.models.adapters import add_lora
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.export import gguf_vocabulary
from unsloth.models.export.gguf_architectures import interleave
from unsloth.models.export.gguf_file import check_type, write_gguf
from unsloth.models.export.merged import merged
from unsloth.models.export.paths import file_name, inside
from unsloth.models.export.safetensors_files import write_safetensors
from unsloth.models.load import ModelError, _stay_trainable, random_batch
from unsloth.models.quantise import quantise_int8, quantise_nf4

LAYERS = {"gemma2": 2, "gemma3_text": 6}


def build(model_type: str, **settings) -> torch.nn.Module:
    from transformers import AutoConfig

    shape = {**presets._TINY, "num_hidden_layers": LAYERS.get(model_type, 2), **settings}
    config = AutoConfig.for_model(model_type, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def adapted(model: torch.nn.Module, **settings) -> torch.nn.Module:
    """With adapters that have learnt something."""
    return add_lora(model, rank=4, alpha=8, init_lora_weights=False, **settings).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = random_batch(model, 2, 12)
    return model(input_ids=batch["input_ids"], use_cache=False).logits.float()


def saved(model: torch.nn.Module, folder: Path, dtype=torch.float32, **settings) -> torch.nn.Module:
    result = merged(model, dtype)
    folder.mkdir(exist_ok=True)
    write_safetensors(folder, result.weights, **settings)
    result.config.save_pretrained(folder)
    # Computed in float32, so that what differs are the weights.
    again, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return again.eval()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_merged_is_base_and_adapter(tmp_path, settings):
    model = adapted(build("llama", attention_bias=settings.get("bias") == "all"), **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or ("modules_to_save" in name) or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = logits(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    exact, rounded = saved(model, tmp_path / "32"), saved(model, tmp_path / "16", torch.bfloat16)
    assert relative(logits(exact), expected) < 2e-6
    for (name, one), other in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16().float()), name  # rounded once, and nothing else
    assert relative(logits(rounded), expected) < 2e-2
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())  # exporting changed nothing


@pytest.mark.parametrize(("quantise", "close"), [("nf4", 2e-6), ("int8", 2e-6)])
def test_a_quantised_base_is_unpacked(tmp_path, quantise, close):
    model = build("llama")
    model = quantise_nf4(model, compute_dtype=torch.float32) if quantise == "nf4" else quantise_int8(model)
    _stay_trainable(model)
    model = adapted(model)
    again = saved(model, tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert relative(logits(again), logits(model)) < close


def test_tied_weights_are_written_once(tmp_path):
    model = adapted(build("llama", tie_word_embeddings=True))
    again = saved(model, tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in {w.name for w in merged(model).weights}
    assert relative(logits(again), logits(model)) < 2e-6


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_weights_parts_them(tmp_path, target):
    model = adapted(build("llama", tie_word_embeddings=True), target_modules=["q_proj", target])
    again = saved(model, tmp_path)
    assert again.config.tie_word_embeddings is False
    assert relative(logits(again), logits(model)) < 2e-6


def test_shards_are_written_one_tensor_at_a_time(tmp_path):
    model = adapted(build("llama"))
    result = merged(model, torch.float32)
    alive = most = 0
    asked = []

    def counted(weight):
        def value():
            nonlocal alive, most
            tensor = weight.value().clone()
            alive += weight.bytes
            most = max(most, alive)
            asked.append(weight.name)

            def gone(size=weight.bytes):
                nonlocal alive
                alive -= size

            import weakref

            weakref.finalize(tensor, gone)
            return tensor

        return type(weight)(weight.name, weight.shape, weight.dtype, value)

    names = write_safetensors(tmp_path, [counted(w) for w in result.weights], max_shard_bytes=100_000)
    assert len(names) > 3 and sorted(asked) == sorted(w.name for w in result.weights)
    assert most <= 2 * max(w.bytes for w in result.weights)  # the one that is written, and the one before it
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.bytes
    assert set(index["weight_map"].values()) == set(names)
    result.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(logits(again), logits(model)) < 2e-6


def test_a_mixture_of_experts_is_saved_as_its_checkpoints_are(tmp_path):
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = adapted(build("qwen3_moe", **settings), target_modules=["q_proj", "v_proj"])
    again = saved(model, tmp_path)
    model.get_base_model().save_pretrained(tmp_path / "theirs")
    assert any(".experts.0.gate_proj.weight" in w.name for w in merged(model).weights)
    assert relative(logits(again), logits(model)) < 2e-6


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(ModelError, match="only transformers models are exported, and Linear is none"):
        merged(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="trains single tokens"):
        merged(adapted(build("llama"), trainable_token_indices=[1, 2]))


# -- names -------------------------------------------------------------------------------------------------------------

TRAVERSALS = [
    "../escape",
    "../../etc/passwd",
    "..",
    ".",
    "",
    " ",
    "/etc/passwd",
    "//server/share",
    "\\\\server\\share",
    "..\\escape",
    "C:\\Windows\\system.ini",
    "C:escape",
    "~/escape",
    "~root",
    "a/../../b",
    "a/b",
    "a\\b",
    "./a",
    "%2e%2e%2fescape",
    "..%2fescape",
    "%252e%252e%252f",
    "..;/escape",
    "....//escape",
    "‥/escape",
    "．．／escape",
    "a\x00.gguf",
    "a\n../b",
    "\r\n",
    "file:///etc/passwd",
    "$HOME/escape",
    "`id`",
    "a|b",
    "-rf",
    "nul",
    "COM1.gguf",
    "a..b",
    "name.",
    "a" * 300,
    "a\u202egpj.exe",
    "∕escape",
]


def test_names_stay_in_their_folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    assert len(TRAVERSALS) >= 30
    for name in TRAVERSALS:
        with pytest.raises(ModelError, match="no name for a file"):
            inside(folder, name)
        assert inside(folder, file_name(name)).parent == folder  # what is made of a title is a name
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ModelError, match="leads out of"):
        inside(folder, "link")
    assert inside(folder, "SmolLM2-135M.Q8_0.gguf") == folder / "SmolLM2-135M.Q8_0.gguf"


def test_a_title_becomes_a_name():
    assert file_name("HuggingFaceTB/SmolLM2-135M") == "SmolLM2-135M"
    assert file_name("/models/x y/My Model.gguf") == "My-Model"
    assert file_name("///") == file_name("con") == "model"


# -- GGUF --------------------------------------------------------------------------------------------------------------

GGUFS = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers reads no other from the file
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
}
CLOSE = {"f32": 1e-5, "f16": 1e-2, "bf16": 2e-2, "q8_0": 8e-2}


@torch.no_grad()
def round_weights(model: torch.nn.Module, kind: str) -> None:
    """As the file holds them, by the formats' definitions and not by the library that writes them."""
    for parameter in (p for p in model.parameters() if p.dim() > 1):
        if kind == "q8_0":
            blocks = parameter.reshape(-1, 32)
            scale = blocks.abs().amax(1, keepdim=True) / 127
            codes = torch.where(scale > 0, blocks / scale, 0.0)
            codes = codes.sign() * (codes.abs() + 0.5).floor()
            parameter.copy_((codes * scale.half().float()).reshape(parameter.shape))
        else:
            parameter.copy_(parameter.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]))


@pytest.mark.parametrize("model_type", GGUFS)
def test_gguf_comes_back_with_the_same_logits(tmp_path, model_type):
    model = adapted(build(model_type, **GGUFS[model_type]))
    expected, tokenizer = logits(model), byte_tokenizer()
    for kind in CLOSE if model_type == "llama" else ("f16", "q8_0"):
        path = tmp_path / f"{model_type}.{kind}.gguf"
        write_gguf(
            path, merged(model, torch.float32), tokenizer, kind, title="a mistral" if "mis" in model_type else ""
        )
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).eval()
        if model_type == "gemma2":  # what the file says of it transformers does not read
            again.config.query_pre_attn_scalar = 32
            for layer in again.model.layers:
                layer.self_attn.scaling = 32**-0.5
        if model_type == "gemma3_text":
            for layer in again.model.layers:
                layer.self_attn.scaling = 32**-0.5
        same = saved(model, tmp_path / kind)
        round_weights(same, kind)
        # One code in thousands is a tie, which either rounds as it likes.
        assert relative(logits(again), logits(same)) < (2e-4 if kind == "q8_0" else 1e-5), kind
        assert relative(logits(again), expected) < CLOSE[kind], kind
    reader = gguf.GGUFReader(path)
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    norm = torch.tensor(values["output_norm.weight"].copy())
    theirs = model.get_base_model().model.norm.weight.detach()
    torch.testing.assert_close(norm, theirs + 1 if "gemma" in model_type else theirs)


def test_gguf_says_what_the_model_is(tmp_path):
    model = build("llama", tie_word_embeddings=True, attention_bias=True)
    tokenizer = byte_tokenizer()
    write_gguf(tmp_path / "a.gguf", merged(model, torch.float32), tokenizer, "Q8_0", title="a title")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")

    def field(name: str):
        return reader.get_field(name).contents()

    assert field("general.architecture") == "llama" and field("general.name") == "a title"
    assert field("llama.attention.head_count_kv") == 2 and field("llama.rope.dimension_count") == 16
    assert field("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert field("tokenizer.chat_template") == tokenizer.chat_template
    assert field("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert field("tokenizer.ggml.tokens")[65] == "<0x41>" and field("tokenizer.ggml.token_type")[65] == 6
    tensors = {t.name: t for t in reader.tensors}
    assert "output.weight" not in tensors  # the head is the embedding
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    # An independent reading of the codes: scale times code, of rows in pairs.
    weight = interleave(model.model.layers[0].self_attn.q_proj.weight.detach(), 4)
    raw = tensors["blk.0.attn_q.weight"].data.reshape(-1, 34)
    scale = torch.tensor(raw[:, :2].copy()).view(torch.float16).float()
    codes = torch.tensor(raw[:, 2:].copy()).view(torch.int8).float()
    assert (codes * scale - weight.reshape(-1, 32)).abs().max() <= scale.max() * 0.51


def test_pairs_are_rotated_together():
    rows = torch.arange(8.0)[:, None]  # one head of 8: transformers rotates 0 with 4, 1 with 5, …
    assert interleave(rows, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    two = torch.arange(8.0)[:, None]
    assert interleave(two, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_rope_is_written_as_divisors(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**presets._LLAMA3_ROPE, "factor": 8.0}
    model = build("llama", rope_parameters=scaling)
    write_gguf(tmp_path / "a.gguf", merged(model, torch.float32), byte_tokenizer(), "f16")
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}["rope_freqs.weight"]
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 500_000.0 ** -(torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(plain / torch.tensor(found.copy()), theirs)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("phi3", {}, "no GGUF of 'phi3' models yet: llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, "has the activation silu, and the model gelu"),
        ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 64}, "cannot say query_pre_attn_scalar 64"),
        ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": None}, "always caps"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' cannot be written",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tmp_path, model_type, settings, message):
    with pytest.raises(ModelError, match=message):
        write_gguf(tmp_path / "a.gguf", merged(build(model_type, **settings)), byte_tokenizer(), "f16")


def test_types_that_need_llama_cpp():
    with pytest.raises(ModelError, match=r"'q4_k_m' cannot be written here: f32, f16, bf16, q8_0 can.*llama-quantize"):
        check_type("q4_k_m")


def test_the_tokenizer_comes_back(tmp_path):
    """Byte-level merges, split by a named rule, with special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the capital of the country is the largest city in it"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>"
    )
    model = build("llama", vocab_size=512)
    write_gguf(tmp_path / "a.gguf", merged(model), tokenizer, "q8_0")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("the capital is 2024 ünïcödé 🙂", "<|im_start|>user\nHi<|im_end|>\n"):
        assert again(text).input_ids == tokenizer(text).input_ids
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 512  # placeholders for rows without a token


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel"}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], "smollm"),
        (
            [{"type": "Split", "pattern": {"Regex": r"(?i:'s)|\p{L}+|\p{N}{1,3}| ?[^\s]+"}}, {"type": "ByteLevel"}],
            "llama-bpe",
        ),
        ([{"type": "Split", "pattern": {"Regex": r"(?i:'s)|\p{L}+|\p{N}| ?[^\s]+"}}, {"type": "ByteLevel"}], "qwen2"),
        (
            [{"type": "Split", "pattern": {"Regex": r"[\p{Lu}]*[\p{Ll}]+|\p{N}| ?[^\s]+"}}, {"type": "ByteLevel"}],
            "tekken",
        ),
        ([{"type": "Whitespace"}], "default"),
    ],
)
def test_how_text_is_split_has_a_name(steps, name, caplog):
    state = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]}
    assert gguf_vocabulary._splitting(state) == name
    assert ("some texts will be encoded otherwise" in caplog.text) == (name == "default")


def test_scores_say_the_order_of_merges():
    """Sentencepiece merges the best pair first: that of the earliest merge."""
    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    scores = gguf_vocabulary._scores(tokens, [("b", "c"), ("a", "b"), ("a", "bc")])
    assert scores[5] > scores[4] > scores[6]
    assert scores[:4] == [0, 0, 0, 0]


def test_mistrals_window_is_warned_of(tmp_path, caplog):
    write_gguf(tmp_path / "a.gguf", merged(build("mistral", sliding_window=16)), byte_tokenizer(), "f16")
    assert "no sliding window for Mistral: beyond 16 tokens" in caplog.text
