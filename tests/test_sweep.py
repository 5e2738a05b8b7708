"""The sweep: its rules, its document, and a fixed, mixed sample of the architectures that it covers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks import pictures, sweep, sweep_worker
from unsloth.models.shrink import HEAD_DIM, HEADS, ORDINARY_TOKENS, VOCABULARY, WIDTH, Way, shrink, ways

# Norms of both kinds and places, rotary, learned, ALiBi and relative positions, fused projections, windows, soft caps,
# sinks, mixtures of experts, latent attention, scans, linear attention, shared layers, decoders of encoder-decoders.
SAMPLE = [
    "bart", "bert", "bloom", "cohere2", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neo",
    "gpt_neox", "gpt_oss", "granite", "llama", "mamba", "mistral", "mixtral", "mpt", "nemotron", "olmo2", "opt", "phi3",
    "phimoe", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2",
]  # fmt: skip

# Images scattered into text, two-way attention around them, cross-attention, towers of LayerNorm and GELU.
WITH_IMAGES = ["gemma3", "idefics3", "llava", "mllama"]


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_architecture_with_images_is_equal(name: str) -> None:
    row = sweep_worker.examine(name, family="vision")
    assert row["status"] == "equal", row["reason"]
    assert row["places"]["layer norm"][1] > 0 and row["places"]["attention"][0] == row["places"]["attention"][1]


@pytest.mark.parametrize("name", SAMPLE)
def test_architecture_is_equal(name: str) -> None:
    row = sweep_worker.examine(name)
    assert row["status"] == "equal", row["reason"]
    assert row["graphs"] >= 1


@pytest.mark.parametrize("name", ["olmo2", "falcon", "gpt_oss"])
def test_architecture_is_equal_under_inductor(name: str) -> None:
    """`make sweep-inductor` does so for the twelve of `sweep.SAMPLE`."""
    row = sweep_worker.examine(name, "inductor")
    assert row["status"] == "equal", row["reason"]


def test_the_sample_is_of_types_that_exist() -> None:
    assert len(set(sweep.SAMPLE)) == 12 and set(sweep.SAMPLE) <= set(sweep_worker.causal_types())


# -- the rules --------------------------------------------------------------------------------------------------------


def tiny(name: str, **settings) -> object:
    return shrink(CONFIG_MAPPING[name](**settings))


def test_a_plain_configuration() -> None:
    config = tiny("llama", num_key_value_heads=8, attention_dropout=0.1, eos_token_id=128_001)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (WIDTH, 2, VOCABULARY)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, 2, HEAD_DIM)
    assert config.attention_dropout == 0
    assert ORDINARY_TOKENS.stop <= config.eos_token_id < VOCABULARY


def test_other_names_and_ratios() -> None:
    config = tiny("gpt2")
    assert (config.n_embd, config.n_head, config.n_layer) == (WIDTH, HEADS, 2)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0
    state_space = tiny("mamba2")
    assert state_space.num_heads * state_space.head_dim == state_space.expand * state_space.hidden_size


def test_one_layer_of_each_kind_is_kept() -> None:
    config = tiny("gemma3_text")
    assert config.layer_types == ["sliding_attention", "full_attention"] and config.num_hidden_layers == 2
    assert config.sliding_window < sweep_worker.LENGTH
    twice = shrink(CONFIG_MAPPING["gemma3_text"](), Way(copies=2))
    assert twice.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2


def test_experts_and_latent_attention() -> None:
    config = tiny("deepseek_v3")
    assert config.n_routed_experts == 4 and config.num_experts_per_tok == 2 and config.n_group == 2
    assert config.first_k_dense_replace == 1  # of two layers
    assert config.qk_head_dim == config.qk_nope_head_dim + config.qk_rope_head_dim


def test_parts_are_shrunk_too_and_encoders_become_decoders() -> None:
    config = tiny("gemma3")
    assert config.text_config.hidden_size == config.vision_config.hidden_size == WIDTH
    assert tiny("bert").is_decoder


def test_settings_left_open_are_filled_only_where_that_is_asked_for() -> None:
    original = CONFIG_MAPPING["ministral"]()
    assert original.head_dim is None and shrink(original).head_dim is None
    assert shrink(original, Way(fill=True)).head_dim == HEAD_DIM
    assert [c.head_dim for c in ways(original)][:2] == [None, HEAD_DIM]


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_the_given_configuration_is_not_changed(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    before = config.to_dict()
    shrink(config)
    assert config.to_dict() == before


def with_pictures(name: str, way: int = 0) -> object:
    return [*ways(CONFIG_MAPPING[name](), pictures=True)][way]


def test_images_are_a_few_patches() -> None:
    config = with_pictures("llava")
    assert config.vision_config.image_size == 4 * config.vision_config.patch_size
    assert config.vision_feature_layer == -2 and config.vision_config.num_hidden_layers == 2
    assert 100 <= config.image_token_id < VOCABULARY
    larger = with_pictures("llava", 4)
    assert larger.vision_config.image_size == 8 * larger.vision_config.patch_size


def test_fields_that_depend_on_others() -> None:
    config = with_pictures("qwen2_5_vl")
    assert config.vision_config.window_size == 4 * config.vision_config.patch_size  # two merged patches
    assert config.vision_config.out_hidden_size == config.text_config.hidden_size == WIDTH
    config = with_pictures("mllama").vision_config
    assert config.vision_output_dim == config.hidden_size * (1 + len(config.intermediate_layers_indices))
    config = with_pictures("llava_next")
    assert {size for pair in config.image_grid_pinpoints for size in pair} <= {56, 112, 168}


def test_frequencies_are_dealt_out_to_the_axes_of_positions() -> None:
    """Where a configuration leaves it to the model, whose own sections are of heads of another width."""
    config = CONFIG_MAPPING["ernie4_5_vl_moe"]()
    assert "mrope_section" not in config.text_config.rope_parameters
    rope = with_pictures("ernie4_5_vl_moe", 1).text_config.rope_parameters
    assert rope["mrope_section"] == [3, 3, 2] and sum(rope["mrope_section"]) == HEAD_DIM // 2
    _, batch, _ = sweep_worker.runnable("ernie4_5_vl_moe", "vision")
    assert batch["image_grid_thw"].shape == (2, 3)


def test_parts_of_parts_stay_in_proportion() -> None:
    config = with_pictures("pi0", 3)  # whose action model reads the keys and values of the text's
    text = config.vlm_config.text_config
    assert (text.hidden_size, config.dit_config.hidden_size) == (WIDTH, WIDTH // 2)
    assert text.head_dim == config.dit_config.head_dim == HEAD_DIM


def test_batches_are_laid_out_as_the_model_takes_images() -> None:
    model, batch, _ = sweep_worker.runnable("qwen2_vl", "vision")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8], [1, 8, 4]] and batch["pixel_values"].shape[0] == 64
    tokens = (batch["input_ids"] == pictures.image_token(model.config)).sum(1)
    assert tokens.tolist() == [8, 8]  # four patches each
    assert ((batch["labels"] == -100).sum(1) == tokens).all()


def test_a_mask_is_of_patches_where_a_model_takes_no_text() -> None:
    size = pictures.Pictures(CONFIG_MAPPING["pix2struct"](), rows=2)
    alone = pictures._numbered_patches(size, {"flattened_patches", "attention_mask", "labels"})
    beside_text = pictures._numbered_patches(size, {"flattened_patches", "attention_mask", "labels", "input_ids"})
    assert alone is not None and alone["attention_mask"].shape == alone["flattened_patches"].shape[:2]
    assert beside_text is not None and "attention_mask" not in beside_text


def test_a_step_that_ignores_its_images_does_not_count() -> None:
    model, batch, eager = sweep_worker.runnable("llava", "vision")
    sweep_worker.looks(model, batch, eager)
    text = {**batch, "input_ids": batch["input_ids"].clamp(max=99), "pixel_values": None}
    with pytest.raises(ValueError, match="does not depend on the images"):
        sweep_worker.looks(model, text, sweep_worker.step(model, model, text))


# -- comparing --------------------------------------------------------------------------------------------------------


def test_differences_are_named() -> None:
    eager = (2.0, {"a": torch.ones(3), "b": torch.full((2,), 1e-12)})
    assert not sweep_worker.compare((2.0 + 1e-6, {"a": torch.ones(3) + 1e-5, "b": torch.zeros(2)}), eager)
    assert "loss" in sweep_worker.compare((2.1, eager[1]), eager)
    assert "loss" in sweep_worker.compare((float("nan"), eager[1]), eager)
    assert "gradient of b and 0 more only in eager" in sweep_worker.compare((2.0, {"a": torch.ones(3)}), eager)
    assert "gradient of a is off" in sweep_worker.compare((2.0, eager[1] | {"a": torch.ones(3) * 1.01}), eager)
    assert "gradient of a is off" in sweep_worker.compare((2.0, eager[1] | {"a": torch.full((3,), torch.nan)}), eager)


# -- the document -----------------------------------------------------------------------------------------------------

ROWS = [
    {"type": "b", "status": "eager cannot run", "reason": "ValueError: no <image> | none\nat all"},
    {"type": "a", "status": "equal", "graphs": 1, "breaks": 0, "counts": {"rms_norm": [4, 5], "glu": [0, 0]},
     "places": {"norm": [3, 4], "rotation": [2, 2], "attention": [1, 2], "layer norm": [0, 3]}, "covered": [0.25, 0.5],
     "misses": ["rms_norm: " + "far " * 40]},
    {"type": "e", "status": "equal", "graphs": 2, "breaks": 1, "counts": {}, "places": {"attention": [0, 2]},
     "covered": [0.0, 0.0], "misses": []},
    {"type": "c", "status": "wrong", "reason": "loss", "graphs": 2, "breaks": 1, "counts": {}, "misses": [],
     "seeded": True},
    {"type": "d", "status": "crashed", "reason": "no answer within 60 s"},
]  # fmt: skip


def test_the_document() -> None:
    text = sweep.document(ROWS, {"torch": "2.13"})
    assert "- 5 types; eager itself runs a tiny model of 4." in text
    assert "**2 equal, 1 wrong, 1 crashed**; 1 of the equal ones in one graph" in text
    assert "rms_norm in 1, rope in 0" in text
    assert "layer norm: 3 in 1 types, left to Inductor" in text
    assert "Of the places in the 1 decoder-only transformers" in text  # e has no rotation
    assert "  - norm: **75.0%** (3 of 4), all of them in 0 types\n  - rotation: **100.0%** (2 of 2), all" in text
    assert "  - gated MLP: **–** (0 of 0)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| type", "| a", "| c", "| d", "| e", "| b"]
    assert rows[1].startswith("| a | equal | 1 | 0 | 25% / 50% | 4/5 | – | – | – | – | rms_norm: far") and rows[
        1
    ].endswith("… |")
    assert rows[2].startswith("| c | wrong, same seed: loss | 2 | 1 | – | – |")
    assert "no &lt;image> \\| none at all" in rows[5]


def test_the_document_of_models_with_images_stands_below_the_other() -> None:
    versions = {"torch": "2.13"}
    text, images = sweep.document(ROWS, versions), sweep.document_with_images(ROWS[:3], versions)
    assert "- 3 types; eager itself runs a tiny model of 2." in images
    assert "Of the places in these 2, towers" in images and "attention: **25.0%** (1 of 4)" in images
    both = sweep.joined(text, images)
    assert both.startswith(text) and both.endswith(images)
    assert sweep.joined("", text) == text
    assert sweep.joined(both, text) == both and sweep.joined(both, images) == both
    fewer = sweep.document(ROWS[:2], versions)
    assert sweep.joined(both, fewer) == both.replace(text, fewer)


def test_workers_that_die_or_take_too_long_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        started = 0

        def __init__(self, lowering: str, family: str) -> None:
            Worker.started += 1
            self.served = 0

        def ask(self, name: str, limit: float):
            return None if name == "bad" else {"type": name, "status": "equal"}

        def stop(self) -> None: ...

    monkeypatch.setattr(sweep, "_Worker", Worker)
    rows = sweep.sweep(["a", "bad", "c"], limit=1)
    assert [r["status"] for r in rows] == ["equal", "crashed", "equal"] and Worker.started == 2


def test_unknown_types_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--types", "lama"])
    assert "no causal language model type lama" in capsys.readouterr().err
