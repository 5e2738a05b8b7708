"""``fast_generate`` as scripts call it, and GRPO's completions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from tests.runtime.test_grpo import make
from unsloth import FastLanguageModel
from unsloth.models.source import ModelError
from unsloth.runtime.grpo import GRPOTrainer
from unsloth.runtime.policy import Head, score
from unsloth.runtime.scripts import old_names

GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def loaded() -> Any:
    model, tokenizer = FastLanguageModel.from_pretrained("tiny-llama", dtype=torch.float32, device_map="cpu")
    model = FastLanguageModel.get_peft_model(model, r=4)
    _trained(model)
    return model, tokenizer


def _trained(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)  # or the tests before this one would choose the tokens
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)


class SamplingParams:
    """As scripts make vLLM's."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update({"n": 1, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, **settings})


def test_texts_as_scripts_give_them(loaded: Any) -> None:
    model, tokenizer = loaded
    params = SamplingParams(max_tokens=6, seed=1, n=2, stop=["~"], include_stop_str_in_output=True)
    one, two = model.fast_generate(["What is 2?", "Say so."], sampling_params=params, use_tqdm=False)
    assert one.prompt == "What is 2?" and one.prompt_token_ids == tokenizer("What is 2?")["input_ids"]
    assert len(one.outputs) == len(two.outputs) == 2
    for output in one.outputs:
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert len(output.logprobs) == len(output.token_ids) <= 6
        assert output.cumulative_logprob == pytest.approx(sum(output.logprobs))
    assert one.outputs[0].token_ids != one.outputs[1].token_ids
    (alone,) = model.fast_generate("What is 2?", params)
    assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in one.outputs]
    (tokens,) = model.fast_generate({"prompt_token_ids": one.prompt_token_ids}, params)
    assert [o.token_ids for o in tokens.outputs] == [o.token_ids for o in one.outputs]


@pytest.mark.parametrize("left", [True, False])
def test_input_ids_as_generate_takes_them(loaded: Any, left: bool) -> None:
    model, _ = loaded
    rows = [[7, 8, 9], [*range(20, 60)], [5]]
    pads = [[0] * (40 - len(r)) for r in rows]
    ids = torch.tensor([p + r if left else r + p for p, r in zip(pads, rows, strict=True)])
    keep = [[0] * len(p) + [1] * len(r) for p, r in zip(pads, rows, strict=True)]
    mask = torch.tensor(keep if left else [k[::-1] for k in keep])
    config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None  # which is taken where a configuration says None
    out = model.fast_generate(input_ids=ids, attention_mask=mask, generation_config=config)
    model.eval()
    for row, tokens in zip(out, rows, strict=True):
        alone = torch.tensor([tokens])
        expected = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), generation_config=config)
        length = 9
        assert row[40 : 40 + length].tolist() == expected[0, len(tokens) :].tolist()
    model.generation_config.eos_token_id = own
    assert out.shape == (3, 49) and torch.equal(out[:, :40], ids)


def test_adapters_of_a_call(loaded: Any, tmp_path: Path) -> None:
    model, _ = loaded
    prompt = [5, 6, 7]

    def log_p(**settings: Any) -> list[float]:
        return model.fast_generate(prompt, GREEDY, **settings)[0].outputs[0].logprobs

    as_saved = log_p()
    model.save_lora(tmp_path / "adapter")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    _trained(model, 1)
    later, request = log_p(), model.load_lora(tmp_path / "adapter")
    assert later != as_saved
    assert log_p(lora_request=request) == pytest.approx(as_saved, abs=1e-6)
    assert log_p(lora_request=None) not in (as_saved, later)
    assert log_p() == later
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        model.load_lora(tmp_path)
    with pytest.raises(ModelError, match="the model has no adapter"):
        FastLanguageModel.from_pretrained("tiny-llama", device_map="cpu")[0].save_lora(tmp_path)


def test_what_generate_has_to_do(loaded: Any, caplog: Any, monkeypatch: Any) -> None:
    """Beams are its own; the result is the same kind of thing."""
    model, _ = loaded
    monkeypatch.setattr(old_names, "_explained", set())
    config = GenerationConfig(max_new_tokens=5, num_beams=2, do_sample=False)
    with caplog.at_level(logging.WARNING):
        results = [model.fast_generate([[5, 6], [7, 8, 9]], config) for _ in range(2)]
    assert caplog.text.count("num_beams=2 is asked for: completions are made by generate") == 1
    assert results[0] == results[1]
    assert [len(r.outputs[0].token_ids) for r in results[0]] == [5, 5] and results[0][0].outputs[0].logprobs is None


def test_prompts_that_cannot_be(loaded: Any) -> None:
    model, _ = loaded
    with pytest.raises(TypeError, match="takes prompts, or input_ids"):
        model.fast_generate()
    with pytest.raises(TypeError, match="prompt 1 is neither text nor a list of tokens but float"):
        model.fast_generate([[1], 2.0], GREEDY)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        model.fast_generate([[1], []], GREEDY)


# -- GRPO --------------------------------------------------------------------------------------------------------------


def test_completions_are_scored_as_they_were_drawn(tmp_path: Path) -> None:
    """Before any update the policy says of each token what the rollout said."""
    seen: list[Any] = []

    class Watching(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super()._compute_loss(model, inputs)

    made = unscripted(Watching, tmp_path, max_steps=1, temperature=0.8, learning_rate=0.0)
    made.train()
    assert made._left_to is None and len(seen) == 2
    policy = made.model.eval()
    for inputs in seen:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        targets = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with torch.no_grad():
            found = score(policy, {"input_ids": ids, "attention_mask": mask}, targets, Head(0.8)).log_p
        rollout = inputs["sampling_per_token_logps"][:, : targets.shape[1]]
        torch.testing.assert_close(rollout, found, rtol=1e-3, atol=1e-3)


def test_generate_can_be_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []
    monkeypatch.setattr("unsloth.runtime.policy_completions.complete", lambda *_, **__: asked.append("ours"))
    made = unscripted(GRPOTrainer, tmp_path, {"fast_rollouts": False})
    ids, log_p = made._generate_single_turn([[5, 6], [7]], None, {}, 1)
    assert len(ids) == 2 and log_p is None and not asked


def test_what_the_engine_cannot_do_is_left_to_generate_and_said(tmp_path: Path, caplog: Any) -> None:
    made = unscripted(GRPOTrainer, tmp_path, generation_kwargs={"no_repeat_ngram_size": 2})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ids, log_p = made._generate_single_turn([[5, 6], [7]], None, {}, 1)
    assert len(ids) == 2 and log_p is None
    assert caplog.text.count("made by generate of transformers, because no_repeat_ngram_size=2 is asked for") == 1


def unscripted(cls: Any, folder: Path, more: Any = None, **changes: Any) -> Any:
    made = make(cls, folder, {"compile": False, **(more or {})}, **changes)
    del made._generate_single_turn
    return made
