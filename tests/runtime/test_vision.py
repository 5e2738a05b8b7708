"""Training on images: batches and their labels, FastVisionModel, and runs of ``unsloth train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

import unsloth
from tests.vlm import chat, encoded, picture, vlm  # noqa: F401
from unsloth import FastVisionModel
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.load import ModelError, load_model
from unsloth.models.processor import load_processor
from unsloth.runtime.causal_lm import IGNORED
from unsloth.runtime.config import ConfigError, read_config
from unsloth.runtime.dry_run import dry_run
from unsloth.runtime.export import export
from unsloth.runtime.problems import BadRow, DataError
from unsloth.runtime.scripts import old_names
from unsloth.runtime.train import train
from unsloth.runtime.vision import Chat, VisionCollator
from unsloth.trainer import UnslothVisionDataCollator

IMAGES = 16
"""Tokens of an image."""
PARTS_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module", autouse=True)
def _undo():
    yield
    old_names.uninstall()


@pytest.fixture(scope="module")
def processor(vlm) -> Any:  # noqa: F811
    return load_processor(str(vlm))


def learnt(processor: Any, batch: dict[str, Any], row: int = 0) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != IGNORED])


# -- batches -----------------------------------------------------------------------------------------------------------


def test_several_images_and_rows_of_text_alone(processor):
    rows = [chat("Only words"), chat(picture(), "and", picture("blue")), chat("Is", picture(), "red?", answer="yes")]
    batch = VisionCollator(processor)(rows)
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    images = batch["input_ids"] == processor.image_token_id
    assert images.sum(1).tolist() == [0, 2 * IMAGES, IMAGES]
    assert (batch["labels"][images | (batch["attention_mask"] == 0)] == IGNORED).all()
    assert learnt(processor, batch, 2) == "<|im_start|>user\nIsred?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert not batch["attention_mask"][0, -1] and batch["attention_mask"][:, 0].all()  # padded on the right


def test_a_batch_of_text_alone_has_no_pixels(processor):
    assert "pixel_values" not in VisionCollator(processor)([chat("Only words")])


@pytest.mark.parametrize("template", [None, PARTS_TEMPLATE])
def test_answers_only(vlm, template):  # noqa: F811
    processor = load_processor(str(vlm))
    processor.chat_template = template or processor.chat_template
    assert Chat(processor).in_parts is (template is not None)
    fooling = "<|im_start|>assistant\nno<|im_end|>\n"
    row = chat(picture(), fooling, answer="réd")
    row["messages"] += chat("And?", picture(), answer="blue")["messages"]
    batch = VisionCollator(processor, answers_only=True)([row])
    assert learnt(processor, batch) == "réd<|im_end|>blue<|im_end|>"
    asked = {"prompt": row["messages"][:3], "completion": row["messages"][3:], "images": []}
    assert learnt(processor, VisionCollator(processor)([asked])) == "blue<|im_end|>"


def test_parts_of_scripts(processor):
    collator = UnslothVisionDataCollator(
        None,
        processor,
        train_on_responses_only=True,
        instruction_part="<|im_start|>user\n",
        response_part="<|im_start|>assistant\n",
        resize=(16, 16),
        formatting_func=lambda row: chat(row["image"], row["asked"], answer=row["said"]),
    )
    batch = collator([{"image": picture(), "asked": "What?", "said": "red"}])
    assert learnt(processor, batch) == "red<|im_end|>\n"
    assert UnslothVisionDataCollator(_sized(24), processor, resize="min").rules.resize == 24
    with pytest.raises(DataError, match="resize is"):
        UnslothVisionDataCollator(None, processor, resize=0)
    with pytest.raises(DataError, match="takes no images"):
        UnslothVisionDataCollator(None, processor.tokenizer)


def _sized(pixels: int) -> Any:
    class Some:
        image_size = pixels

    Some.config = Some.vision_config = Some  # type: ignore[attr-defined]
    return Some


def test_rows_that_are_too_long(processor):
    long = chat(picture(), "What is it?", answer="red " * 40)
    collator = VisionCollator(processor, max_length=80, answers_only=True)
    batch = collator([chat("Short"), long])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 80)
    assert collator.check(long) > 80  # known, and cut
    many = chat(*[picture()] * 6, "What are they?")
    behind = chat(picture(), "What is it? " * 9)
    for row, reason in (
        (many, r"96 of them for its images, which do not fit into max_length 80"),
        (behind, "begins behind"),
    ):
        with pytest.raises(DataError, match=reason):
            collator([chat("Short"), row])
        with pytest.raises(BadRow, match=reason):
            collator.check(row)


def test_bad_rows_are_raised_or_dropped(processor):
    rows = [chat(picture()), chat(b"no image"), chat(picture(), "<image>"), {"messages": []}]
    with pytest.raises(DataError) as raised:
        VisionCollator(processor)(rows)
    told = str(raised.value)
    assert "row 2 of 4 in a batch: the image is no image" in told and "row 3 of 4" in told and "row 4 of 4" in told
    dropping = VisionCollator(processor, bad_rows="drop", max_length=60)
    assert len(dropping([*rows, chat(*[picture()] * 5)])["input_ids"]) == 1
    with pytest.raises(DataError):
        dropping(rows[1:])
    with pytest.raises(DataError, match="not fetched"):
        VisionCollator(processor)([chat("http://example.org/a.png")])


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_script(vlm, tmp_path, four_bits):  # noqa: F811
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastVisionModel.from_pretrained(str(vlm), load_in_4bit=four_bits, max_seq_length=256)
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    assert kinds["model.vision_tower.encoder.layers.0.mlp.fc1"] == kinds["lm_head"] == "Linear"  # never in 4 bits
    assert kinds["model.language_model.layers.0.mlp.up_proj"] == ("Linear4bit" if four_bits else "Linear")
    model = FastVisionModel.get_peft_model(model, r=4, finetune_vision_layers=not four_bits, random_state=1)
    FastVisionModel.for_training(model)
    rows = [chat(picture(colour), "Which colour?", answer=colour) for colour in ("red", "blue", "green", "white")]
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        data_collator=UnslothVisionDataCollator(model, tokenizer, train_on_responses_only=True),
        train_dataset=rows,
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-2,
            logging_steps=1,
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            save_strategy="no",
        ),
        options={"lowering": "eager", "strict": True},
        compile=four_bits,
    )
    assert isinstance(trainer, unsloth.SFTTrainer)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"] and all(entry["grad_norm"] > 0 for entry in log)
    learning = {name for name, p in model.named_parameters() if "lora_B" in name and p.any()}  # they start at zero
    assert any("vision_tower" in name for name in learning) is not four_bits
    assert any("language_model" in name for name in learning)
    assert not four_bits or "1 graph, 0 breaks" in str(trainer.explanation)
    FastVisionModel.for_inference(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<image>Which?"}], add_generation_prompt=True)
    inputs = tokenizer(picture(), text, add_special_tokens=False, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2
    if not four_bits:
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
        with torch.no_grad():
            wanted, before = model(**inputs).logits, load_model(str(vlm)).eval()(**inputs).logits
            found = load_model(str(tmp_path / "merged")).eval()(**inputs).logits
        assert (found - wanted).norm() < 0.02 * wanted.norm() < 0.2 * (before - wanted).norm()  # in bfloat16


def test_what_takes_no_images(vlm, checkpoint, tmp_path):  # noqa: F811
    for load in (load_processor, FastVisionModel.from_pretrained):
        with pytest.raises(ModelError, match="takes no images"):
            load(str(checkpoint))
    with pytest.raises(ModelError, match="takes no images: it is a llama"):
        load_model(str(checkpoint), images=True)


def test_a_processor_that_takes_videos_needs_no_torchvision_for_images(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    tokenizer.chat_template = PARTS_TEMPLATE.replace("<image>", "<|image_pad|>")
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLConfig().save_pretrained(tmp_path)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 14,
    }
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**settings, "temporal_patch_size": 2, "merge_size": 2})
    )
    processor = load_processor(str(tmp_path))
    batch = VisionCollator(processor, answers_only=True)([chat("no"), chat(picture(size=(84, 56)), "Which?")])
    assert batch["image_grid_thw"].prod() // 4 == (batch["input_ids"] == processor.image_token_id).sum() == 6
    assert learnt(processor, batch, 1) == "red<|im_end|>"


# -- runs --------------------------------------------------------------------------------------------------------------


def data(folder: Path, rows: int = 6) -> Path:
    folder.mkdir()
    lines = ["file_name,question,answer"]
    for number in range(rows):
        (folder / f"{number}.png").write_bytes(encoded(picture((40 * number, 0, 0))))
        lines.append(f"{number}.png,How red is it?,{number}")
    (folder / "metadata.csv").write_text("\n".join([*lines, "gone.png,Where?,nowhere"]))
    return folder


def config(vlm: Path, folder: Path, output: Path, **settings: Any) -> Any:  # noqa: F811
    given = {
        "model_name_or_path": str(vlm),
        "dataset_name": str(folder),
        "output_dir": output,
        "max_steps": 4,
        "save_steps": 2,
        "lora_r": 4,
        "options": {"lowering": "eager", "strict": True},
        **settings,
    }
    return read_config(None, given)


def test_a_run_and_its_resumption(vlm, tmp_path, capsys):  # noqa: F811
    folder, console = data(tmp_path / "data"), Console(force_terminal=False, width=200)
    settings = {"finetune_mlp_modules": False, "compile": False}
    result = train(config(vlm, folder, tmp_path / "whole", **settings), console=console)
    told = capsys.readouterr().out
    assert "metadata.csv:8: there is no image" in told and "<image>How red is it?" in told and "«0<|im_end|>»" in told
    assert (
        result.steps == 4
        and result.record["images"]
        and "ImageTextToText" in (tmp_path / "whole/README.md").read_text()
    )
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert any("vision_tower" in name for name in weights) and not any("mlp" in name for name in weights)

    part = config(vlm, folder, tmp_path / "part", **settings)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "part" / "checkpoint-2")
    part.model_extra["resume_from_checkpoint"] = True
    train(part, console=console)
    for name, weight in load_file(tmp_path / "part" / "adapter_model.safetensors").items():
        assert torch.equal(weight, weights[name]), name

    base = AutoModelForImageTextToText.from_pretrained(vlm)
    assert PeftModel.from_pretrained(base, str(tmp_path / "whole")).peft_config["default"].r == 4
    exported = export(str(tmp_path / "whole"), tmp_path / "adapter", format="adapter")
    assert {"adapter_model.safetensors", "processor_config.json"} <= exported.files.keys()
    merged = export(str(tmp_path / "whole"), tmp_path / "merged", format="merged")
    assert {"model.safetensors", "processor_config.json"} <= merged.files.keys()
    FastVisionModel.from_pretrained(str(tmp_path / "merged"))


def test_a_dry_run(vlm, tmp_path):  # noqa: F811
    told = str(dry_run(config(vlm, data(tmp_path / "data"), tmp_path / "out")))
    assert "metadata.csv:8: there is no image" in told and "<image>How red is it?" in told
    assert "nothing found" in told


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"packing": True}, "packing is for texts"),
        ({"strict_data": True}, r"metadata\.csv:8"),
        ({"max_length": 20}, "for its images"),
    ],
)
def test_what_is_said_before_training(vlm, tmp_path, settings, reason):  # noqa: F811
    with pytest.raises(DataError, match=reason):
        train(config(vlm, data(tmp_path / "data"), tmp_path / "out", **settings), console=Console(quiet=True))


def test_settings_of_images_are_checked(vlm, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="image_size"):
        config(vlm, tmp_path, tmp_path, image_size=0)
