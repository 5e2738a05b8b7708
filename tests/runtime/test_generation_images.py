"""Prompts with images through the engine: the tokens of ``generate``, each prompt with its images; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import sweep_worker
from examples.vision_digits import small_model
from unsloth.runtime.generation.engine import complete
from unsloth.runtime.generation.sampling import Sampling, choose, sampling_of
from unsloth.runtime.generation.support import Unsupported

Prompts = tuple[list[list[int]], list[dict[str, torch.Tensor]]]


def llava() -> tuple[Any, Prompts]:
    """The same text to two images, a longer one to the second, and a text alone; behind more than a page of tokens."""
    model, _ = small_model(hidden=32, layers=2)
    token = model.config.image_token_id
    draw = torch.Generator().manual_seed(0)
    one, two = ({"pixel_values": torch.randn(1, 3, 32, 32, generator=draw)} for _ in range(2))
    short = [*range(10, 40), *[token] * 16, 7, 8]
    return model, ([short, short, [*short, 9, 10], [5, 6, 7]], [one, two, two, {}])


def qwen() -> tuple[Any, Prompts]:
    """Images of two sizes, which take fewer positions than they have tokens, and a text alone."""
    torch.manual_seed(0)
    model, *_ = sweep_worker.runnable("qwen2_5_vl", "vision")
    patch, draw = model.config.vision_config.patch_size, torch.Generator().manual_seed(0)
    prompts, media = [], []
    for height, width in ((4, 6), (8, 6), (0, 0)):
        tokens = height * width // 4
        ids = [40, 41, *[model.config.image_token_id] * tokens, 50, 51, 52]
        kinds = {"mm_token_type_ids": (torch.tensor([ids]) == model.config.image_token_id).long()}
        pixels = torch.randn(height * width, 6 * patch**2, generator=draw)
        grid = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
        prompts.append(ids)
        media.append(kinds | grid if tokens else kinds)
    return model, (prompts, media)


@pytest.mark.parametrize("make", [llava, qwen])
def test_greedy_tokens_are_those_of_generate(make: Any) -> None:
    model, (prompts, media) = make()
    made = complete(model, prompts, Sampling(8), media=media)
    model.eval()
    for ids, beside, completion in zip(prompts, media, made, strict=True):
        row = torch.tensor([ids])
        with torch.no_grad():
            wanted = model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), **beside, max_new_tokens=8, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )[0, len(ids) :]  # fmt: skip
            whole = torch.tensor([[*ids, *completion.ids]])
            kinds = {n: torch.nn.functional.pad(x, (0, 8)) for n, x in beside.items() if n.startswith("mm_")}
            log_p = model(input_ids=whole, **{**beside, **kinds}).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert completion.ids == wanted.tolist()
        assert completion.log_p == pytest.approx(log_p.gather(1, wanted[:, None])[:, 0].tolist(), abs=1e-4)
    assert made[0].log_p != made[1].log_p


def test_equal_prompts_are_read_once_and_images_tell_prompts_apart(monkeypatch: Any) -> None:
    model, (prompts, media) = llava()
    complete(model, prompts, Sampling(1), media=media)  # examined before it is counted
    seen: list[int] = []
    features = type(model.model).get_image_features
    monkeypatch.setattr(
        type(model.model),
        "get_image_features",
        lambda self, pixel_values, **more: seen.append(len(pixel_values)) or features(self, pixel_values, **more),
    )
    again = [{name: x.clone() for name, x in theirs.items()} for theirs in media]
    complete(model, [*prompts, *prompts], Sampling(2), media=[*media, *again])
    assert sum(seen) == 3


def test_a_model_whose_pages_would_hold_something_else_is_left_to_generate(monkeypatch: Any) -> None:
    model, (prompts, media) = qwen()
    monkeypatch.setattr("unsloth.runtime.generation.support.shift_of", lambda positions: 0)  # as if images took as many
    with pytest.raises(Unsupported, match="decoding from pages gives other logits than its forward"):
        complete(model, prompts, Sampling(2), media=media)
    assert len(complete(model, prompts[2:], Sampling(2))) == 1  # texts alone are not


def test_suppressed_tokens_are_never_chosen() -> None:
    model, (prompts, media) = llava()
    token = complete(model, prompts[:1], Sampling(1), media=media[:1])[0].ids[0]
    config = type(model.generation_config)(suppress_tokens=[token], max_new_tokens=6, do_sample=True, top_k=2)
    sampling = sampling_of(config, model, 10)
    assert sampling.suppressed == {token} and not sampling.needs_history
    for made in complete(model, prompts * 4, sampling, media=media * 4):
        assert token not in made.ids
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    chosen, log_p = choose(logits, None, None, 1.0, [].append, [].append, {1})
    assert chosen.tolist() == [2] and log_p.item() == pytest.approx(logits.log_softmax(-1)[0, 2].item())
