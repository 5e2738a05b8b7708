"""GRPO on prompts with images: TRL's step on the same completions, and what is said of images that cannot be used."""

from __future__ import annotations

import logging
from typing import Any

import PIL.Image
import pytest
import torch
import trl
from datasets import Dataset, Image
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks import sweep_worker
from examples.vision_digits import small_model
from tests.runtime.test_grpo import (
    EAGER,
    LATER,
    PLAIN,
    SETTINGS,
    assert_same,
    batch,
    configure,
    heads,
    history,
    step,
)
from tests.vlm import encoded, picture
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.presets import build
from unsloth.runtime.generation.support import Unsupported
from unsloth.runtime.grpo import GRPOTrainer
from unsloth.runtime.image_shapes import ImageShapes
from unsloth.runtime.images import ImageRules
from unsloth.runtime.policy_batch import media_of, trimmed
from unsloth.runtime.problems import BadRow, DataError
from unsloth.runtime.prompt_images import open_rows, opened, undecoded
from unsloth.runtime.rollouts import load_rollout, save_rollout

IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def processor() -> Any:
    made = small_model(hidden=32, layers=1)[1]
    made.chat_template = IN_PARTS
    return made


def asked(image: Any, text: str = "Which colour?", column: str = "image") -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], column: image}


def rows() -> Dataset:
    return Dataset.from_list([asked(picture(colour), "Which? " + "x" * i) for i, colour in enumerate(COLOURS)])


def reward(completions: Any, image: Any, **_: Any) -> list[float]:
    return [(len(str(c)) % 7) / 7 + i.getpixel((0, 0))[0] / 2550 for c, i in zip(completions, image, strict=True)]


def llava(kind: str) -> Any:
    """Adapters everywhere, in the tower as well, whose B is not zero; or all of it."""
    model, _ = small_model(hidden=32, layers=1)
    if kind != "lora":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("k_proj.bias" not in name)  # to which softmax is blind: a gradient of rounding
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def make(cls: Any, folder: Any, more: Any = None, *, model: Any = None, data: Any = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    return cls(
        llava("lora") if model is None else model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings),
        train_dataset=rows() if data is None else data,
        **{"processing_class": processor(), **(more or {})},
    )


# -- one step ----------------------------------------------------------------------------------------------------------


def with_images(token: int, images: list[list[int]], seed: int = 0) -> dict[str, Any]:
    """Three completions: two of one text about images of their own, and one of another; tokens of each row's images."""
    inputs: dict[str, Any] = batch(seed)
    prompts = []
    for theirs, text, real in zip(images, inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True):
        places = [x for count in theirs for x in (*[token] * count, 33)]
        prompts.append([*places, *(32 + text[real] % 60).tolist()])
    longest = max(map(len, prompts))
    return {
        **inputs,
        "prompt_ids": torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": 32 + inputs["completion_ids"] % 60,  # of a small vocabulary
    }


def of_llava(seed: int = 0) -> dict[str, Any]:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    token = small_model(hidden=32, layers=1)[0].config.image_token_id
    return {**with_images(token, [[16]] * 3, seed), "pixel_values": pixels, "num_images": [1, 1, 1]}


def of_qwen(model: Any, seed: int = 0) -> dict[str, Any]:
    """Two images in the first row, one in each other, of several sizes."""
    grid = torch.tensor([[1, 4, 2], [1, 2, 2], [1, 4, 2 + 2 * seed], [1, 6, 4]])
    one, two, three, four = (grid.prod(-1) // 4).tolist()
    token, patch = model.config.image_token_id, model.config.vision_config.patch_size
    inputs = with_images(token, [[one, two], [three], [four]], seed)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    pixels = torch.randn(int(grid.prod(-1).sum()), 6 * patch**2, generator=torch.Generator().manual_seed(seed))
    media = {"pixel_values": pixels, "image_grid_thw": grid, "num_images": [2, 1, 1]}
    return {**inputs, **media, "mm_token_type_ids": (ids == token).long()}


@pytest.mark.parametrize("kind", ["lora", "full", "compiled"])
def test_the_step_is_that_of_trl_tower_included(tmp_path, caplog, kind: str) -> None:
    """Two prompts of the same tokens are answered to different images; compiled, that is one graph."""
    compiled = kind == "compiled"
    theirs = make(trl.GRPOTrainer, tmp_path, model=llava(kind))
    ours = make(GRPOTrainer, tmp_path, {"options": EAGER} if compiled else {"compile": False}, model=llava(kind))
    for made in (theirs, ours):
        made.use_vllm = made.vllm_importance_sampling_correction = True  # of which everything in a batch is read
    for seed, loss_type in enumerate(("dapo",) if compiled else ("dapo", "grpo", "cispo")):
        inputs = of_llava(seed)
        for made in (theirs, ours):
            configure(made, **{**PLAIN, **SETTINGS["everything"], "loss_type": loss_type})
        with caplog.at_level(logging.WARNING):
            found = step(ours, inputs)
            others = step(ours, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
        assert_same(found, step(theirs, inputs))
        assert any("vision_tower" in name for name in found["gradients"])
        assert abs(others["loss"] - found["loss"]) > 1e-4
    assert caplog.text.count("padded to each other, because in a row a prompt stands once") == 1
    if compiled:
        (graph,) = ours.explanation.graphs
        assert heads(graph) == ["plain, with statistics, per token"]


def test_images_of_any_size_and_number(tmp_path) -> None:
    """Patches of all images in a row, positions of several sections, computed beside the step; a row has two images."""
    made = []
    for cls, more in ((trl.GRPOTrainer, {}), (GRPOTrainer, {"compile": False})):
        torch.manual_seed(0)
        model, *_ = sweep_worker.runnable("qwen2_5_vl", "vision")
        made.append(make(cls, tmp_path, more, model=model))
    theirs, ours = made
    shapes = ImageShapes(ours.model)
    ours._shapes = {id(ours.model): shapes}  # as where it is compiled
    for seed in (0, 1):
        inputs = {n: x for n, x in of_qwen(theirs.model, seed).items() if n not in LATER}
        assert_same(step(ours, inputs), step(theirs, inputs))
    assert shapes.checked and shapes.outside


def test_pixels_go_with_their_rows(tmp_path) -> None:
    """Of the policy that sampled and of the reference, which are asked in parts of a generation."""
    torch.manual_seed(0)
    model, *_ = sweep_worker.runnable("qwen2_5_vl", "vision")
    inputs = of_qwen(model)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    media = {n: inputs[n] for n in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    found = []
    for cls, more in ((trl.GRPOTrainer, {}), (GRPOTrainer, {"compile": False})):
        made = make(cls, tmp_path, more, model=model)
        with torch.no_grad():
            for size in (1, 2, 3):
                log_p, entropy, _ = made._get_per_token_logps_and_entropies(
                    made.model, ids, mask, 7, size, compute_entropy=True, **media
                )
                seen = inputs["completion_mask"]
                found.append(torch.stack([log_p * seen, entropy * seen]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_rows_without_images_have_no_pixels() -> None:
    media = {"pixel_values": torch.ones(8, 4), "image_grid_thw": torch.tensor([[1, 2, 4]]), "num_images": [0, 1, 0]}
    media["mm_token_type_ids"] = torch.zeros(3, 5)
    assert media_of(media, slice(0, 1)).keys() == {"mm_token_type_ids"}
    assert media_of(media, slice(0, 2))["pixel_values"].shape == (8, 4)
    assert media_of({"prompt_ids": torch.ones(1, 1)}) == {}


def test_trimming_cuts_tokens_and_no_pixels() -> None:
    inputs: dict[str, Any] = {name: x.clone() for name, x in batch().items()}
    inputs["completion_mask"][:, 4:] = 0
    inputs["mm_token_type_ids"] = torch.arange(12).expand(3, -1)
    inputs |= {"pixel_values": torch.ones(9, 7), "image_grid_thw": torch.ones(3, 7).long(), "num_images": [1, 1, 1]}
    inputs["prompt_mask"][:, :2] = 0
    cut = trimmed(inputs)
    assert cut["mm_token_type_ids"].tolist() == [[*range(2, 9)]] * 3
    assert all(cut[name] is inputs[name] for name in ("pixel_values", "image_grid_thw", "num_images"))


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_is_that_of_trl(tmp_path) -> None:
    """With a reference, and completions of ``generate``, which sees the images."""
    wanted = history(make(trl.GRPOTrainer, tmp_path, beta=0.1))
    made = make(GRPOTrainer, tmp_path, {"compile": False, "fast_rollouts": False}, beta=0.1)
    found = history(made)
    assert len(found) == len(wanted) == 2 and all(entry["grad_norm"] > 0 for entry in found)
    for mine, other in zip(found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_images_are_given_to_generate_and_it_is_said_why_once(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("unsloth.runtime.generation.engine.compare", differs)
    made = make(GRPOTrainer, tmp_path, {"compile": False})
    pixels, generate = [], type(made.model.get_base_model()).generate
    monkeypatch.setattr(
        type(made.model.get_base_model()),
        "generate",
        lambda self, **given: pixels.append(given["pixel_values"]) or generate(self, **given),
    )
    with caplog.at_level(logging.WARNING):
        made.train()
    assert [len(p) for p in pixels] == [8, 8] and len(pixels[0].flatten(1).unique(dim=0)) > 1
    said = "completions of prompts with images are made by generate of transformers, because its logits differ"
    assert caplog.text.count(said) == 1 and made._left_to is None


def differs(*_: Any) -> None:
    raise Unsupported("its logits differ")


def test_the_engine_sees_images(tmp_path, caplog, monkeypatch) -> None:
    """Without a word, and with the log-probabilities that training finds."""
    made = make(GRPOTrainer, tmp_path, {"compile": False}, learning_rate=0.0)
    monkeypatch.setattr(type(made.model.get_base_model()), "generate", None)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert "made by generate" not in caplog.text
    (first, _) = made._buffered_inputs
    with torch.no_grad():
        whole = [torch.cat([first[f"prompt_{n}"], first[f"completion_{n}"]], dim=1) for n in ("ids", "mask")]
        media = {n: first[n] for n in ("pixel_values", "num_images")}
        log_p = made._get_per_token_logps_and_entropies(made.model, *whole, first["completion_ids"].shape[1], **media)[
            0
        ]
    seen = first["completion_mask"]
    torch.testing.assert_close(first["sampling_per_token_logps"] * seen, log_p * seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("column", ["image", "images"])
def test_rows_of_text_alone_may_be_among_them(tmp_path, column: str) -> None:
    """In a batch with images, and in one without any."""

    def judge(completions: Any, **columns: Any) -> list[float]:
        seen.append(sum(bool(image) for image in columns[column]))
        return [len(str(c)) % 7 / 7 for c in completions]

    images = [picture("red"), None, None, None]
    data = Dataset.from_list([asked([i] if i and column == "images" else i, column=column) for i in images])
    seen: list[int] = []
    made = make(GRPOTrainer, tmp_path, {"compile": False}, data=data, per_device_train_batch_size=2)
    made.reward_funcs = [judge]
    made.train()
    assert sorted(seen) == [0, 2] and made.state.global_step == 2


def test_completions_about_images_come_back_from_a_checkpoint(tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "steps_per_generation": 4}
    settings["per_device_train_batch_size"] = 2
    runs = []
    for place in (None, tmp_path / "checkpoint-1"):
        made = make(GRPOTrainer, tmp_path, {"compile": False}, temperature=2.0, **settings)
        made.train(resume_from_checkpoint=None if place is None else str(place))
        runs.append(made)
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


def test_what_a_checkpoint_holds_of_images(tmp_path) -> None:
    batches: list[dict[str, Any]] = [{"pixel_values": torch.ones(2, 3), "num_images": [0, 2]}, {"num_images": [1, 1]}]
    save_rollout(tmp_path / "a", batches, {"x": 1.0})
    found, numbers = load_rollout(tmp_path / "a", torch.device("cpu"))
    assert found is not None and numbers == {"x": 1.0}
    assert [b["num_images"] for b in found] == [[0, 2], [1, 1]]
    assert isinstance(found[0]["pixel_values"], Tensor) and "pixel_values" not in found[1]
    save_rollout(tmp_path / "b", [{"strange": ["a"]}], {})
    assert load_rollout(tmp_path / "b", torch.device("cpu"))[0] is None


# -- what is wrong with images -----------------------------------------------------------------------------------------


def test_an_image_that_is_missing_or_none_is_named_before_training(tmp_path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    rules = {"image_rules": ImageRules(folder=tmp_path)}
    data = Dataset.from_list([asked(name) for name in ("a.png", "gone.png", "b.png")])
    with pytest.raises(DataError, match=r"row 1: there is no image .*gone\.png\nrow 2: the image .*b\.png is no image"):
        make(GRPOTrainer, tmp_path, rules, data=data)
    with pytest.raises(DataError, match=r"row 0: the image is a URL, .* which is not fetched"):
        make(GRPOTrainer, tmp_path, data=Dataset.from_list([asked("https://example.org/a.png")]))
    several = Dataset.from_list([asked(["a.png"], column="images"), asked(["a.png", None], column="images")])
    with pytest.raises(DataError, match=r"^row 1: an image is null$"):
        make(GRPOTrainer, tmp_path, rules, data=several)
    places = [{"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "image": "a.png"}]
    with pytest.raises(DataError, match=r"row 0: Number of images provided \(1\) does not match .* placeholders \(2\)"):
        make(GRPOTrainer, tmp_path, rules, data=Dataset.from_list(places))
    with pytest.raises(DataError, match=r"row 0: its prompt is a text, and an image needs messages"):
        make(GRPOTrainer, tmp_path, rules, data=Dataset.from_list([{"prompt": "Which?", "image": "a.png"}]))


def test_an_image_that_is_damaged_behind_its_header_is_named_in_training(tmp_path) -> None:
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    damaged = encoded(PIL.Image.fromarray(noise))[:6000]
    good = [{"bytes": encoded(picture()), "path": None}] * 2
    data = Dataset.from_list([asked(image) for image in (*good, {"bytes": damaged, "path": None})])
    data = data.cast_column("image", Image())  # which decodes, and knows no row
    made = make(GRPOTrainer, tmp_path, {"compile": False}, data=data, per_device_train_batch_size=3)
    with pytest.raises(DataError, match=r"^row 2: the image is damaged: "):
        made.train()


def test_rows_of_a_stream_are_named_by_their_place(tmp_path) -> None:
    picture().save(tmp_path / "a.png")
    given, rules = [asked("a.png"), asked("gone.png")], ImageRules(folder=tmp_path, resize=16)
    with pytest.raises(DataError, match=r"^row 2 of 2 in a batch: there is no image"):
        open_rows(given, rules, lambda row: None)
    (made,) = open_rows(given[:1], rules, lambda row: None)
    assert made["image"].size == (16, 10) and given[0]["image"] == "a.png"


def test_images_in_messages_as_tables_hold_them() -> None:
    """Every part has every column, null where it has no such value."""
    parts = [{"type": "text", "text": "Which?", "image": None}, {"type": "image", "text": None, "image": None}]
    own = {"type": "image", "text": None, "image": {"bytes": encoded(picture("blue")), "path": None}}
    row = {"prompt": [{"role": "user", "content": [*parts, own]}], "images": [picture("red")]}
    content = opened(row, ImageRules())["prompt"][0]["content"]
    assert content[:2] == [{"type": "text", "text": "Which?"}, {"type": "image"}]
    assert content[2]["image"].getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(BadRow, match=r"images provided \(0\) does not match number of image placeholders \(1\)"):
        opened({**row, "images": []}, ImageRules())


def test_nothing_is_decoded_for_a_list_of_images() -> None:
    data = Dataset.from_list([{"images": [picture()], "x": 1}])
    plain = undecoded({"train": data, "none": None})
    assert set(plain["train"][0]["images"][0]) == {"bytes", "path"} and plain["none"] is None
    assert isinstance(data[0]["images"][0], PIL.Image.Image) and undecoded(plain["train"]) is plain["train"]
    stream = next(iter(undecoded(data.to_iterable_dataset())))
    assert set(stream["images"][0]) == {"bytes", "path"} and stream["x"] == 1


def test_images_nobody_would_look_at_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"column 'image', and LlamaForCausalLM reads texts alone"):
        make(GRPOTrainer, tmp_path, {"processing_class": byte_tokenizer()}, model=build("tiny-llama"))
    with pytest.raises(DataError, match=r"column 'image', and LlamaForCausalLM reads texts alone"):
        make(GRPOTrainer, tmp_path, model=build("tiny-llama"))
    with pytest.raises(DataError, match=r"makes tokens of texts alone: processing_class has to be the processor"):
        make(GRPOTrainer, tmp_path, {"processing_class": byte_tokenizer()})
    texts = small_model(hidden=32, layers=1)[1]  # with a language model's template
    with pytest.raises(DataError, match=r"the chat template of LlavaProcessor has no place for them"):
        make(GRPOTrainer, tmp_path, {"processing_class": texts})
