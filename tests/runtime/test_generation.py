"""Rollouts: what the engine makes is what ``generate`` makes, and its log-probabilities are those of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.qlora import qlora
from unsloth.compiler.options import Options
from unsloth.models.adapters import add_lora
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.runtime.generation import batch, engine
from unsloth.runtime.generation.batch import StaleError
from unsloth.runtime.generation.engine import complete, engine_of
from unsloth.runtime.generation.pages import PAGE, Book, NoSpaceError, Shape, affordable
from unsloth.runtime.generation.sampling import Sampling, sampling_of
from unsloth.runtime.generation.support import Unsupported

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
GEMMA = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "window": ("mistral", {**SIZES, "sliding_window": 16}),
    "norms of queries and keys": ("qwen3", {**SIZES, "head_dim": 32}),
    "window and caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}),
    "windows in some layers": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "fused projections, half of each head rotated": ("gpt_neox", {**SIZES, "num_key_value_heads": 4}),
    "learnt positions": ("gpt2", {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "sinks and experts": ("gpt_oss", {**SIZES, "head_dim": 16, "sliding_window": 16, "num_local_experts": 4}),
}
PROMPTS = [[5, 6, 7, 8], [9, 4] * 20 + [3], [5, 6, 7, 8], [11], [*range(1, PAGE + 2)], [*range(1, PAGE + 3)]]
"""Equal ones, one token, longer than a window; all but their last tokens fill a page, and one token more."""


def build(kind: str, **changes: Any) -> Any:
    name, sizes = MODELS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **changes})).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.eos_token_id = None
    return model.train()


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


def by_generate(model: Any, prompt: list[int], new: int, **settings: Any) -> list[int]:
    ids = torch.tensor([prompt], device=DEVICE)
    model.eval()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **settings)
    model.train()
    return out[0, len(prompt) :].tolist()


def by_training(model: nn.Module, prompt: list[int], ids: list[int]) -> Tensor:
    """Log-probabilities of a completion's tokens, from a forward pass over all of it."""
    model.eval()
    with torch.no_grad():
        whole = torch.tensor([prompt + ids], device=DEVICE)
        log_p = model(input_ids=whole, use_cache=False).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
    model.train()
    return log_p.gather(1, whole[0, len(prompt) :, None])[:, 0].cpu()


# -- the model's own tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_and_log_probabilities_are_the_models(kind: str) -> None:
    model = build(kind)
    made = complete(model, PROMPTS, Sampling(24), rows=4)
    assert len({token for c in made for token in c.ids}) > 10, "tokens that never change would show nothing"
    for prompt, completion in zip(PROMPTS, made, strict=True):
        assert completion.ids == by_generate(model, prompt, 24)
        torch.testing.assert_close(
            torch.tensor(completion.log_p), by_training(model, prompt, completion.ids), rtol=1e-3, atol=1e-3
        )
    assert model.training and model.config._attn_implementation != "unsloth_paged"


def test_a_drawn_token_has_the_log_probability_that_training_gives_it(llama: Any) -> None:
    made = complete(llama, PROMPTS, Sampling(20, sample=True, temperature=0.7, seed=1, top_k=20, top_p=0.9))
    for prompt, completion in zip(PROMPTS, made, strict=True):
        llama.eval()
        with torch.no_grad():
            whole = torch.tensor([prompt + completion.ids], device=DEVICE)
            logits = llama(whole, use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.7
        log_p = logits.log_softmax(-1).cpu().gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.log_p), log_p, rtol=1e-4, atol=1e-4)


def test_penalties_read_the_tokens_before(llama: Any) -> None:
    made = complete(llama, PROMPTS, Sampling(24, repetition_penalty=1.3))
    expected = [by_generate(llama, prompt, 24, repetition_penalty=1.3) for prompt in PROMPTS]
    assert [c.ids for c in made] == expected


def test_four_bits_and_adapters_as_they_are() -> None:
    model = qlora(seed=3).to(DEVICE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    prompts = [[5, 6, 7, 8], [*range(1, 30)]]
    made = complete(model, prompts, Sampling(12))
    for prompt, completion in zip(prompts, made, strict=True):
        log_p = by_training(model, prompt, completion.ids)
        torch.testing.assert_close(torch.tensor(completion.log_p), log_p, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():  # type: ignore[operator]
        assert complete(model, prompts, Sampling(12))[1].log_p != made[1].log_p


def test_precision_is_that_of_the_call(llama: Any) -> None:
    """Under autocast keys are bfloat16, afterwards they are what they were."""
    exact = complete(llama, PROMPTS[:2], Sampling(8))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rounded = complete(llama, PROMPTS[:2], Sampling(8))
        assert {shape.dtype for shape in engine_of(llama).layout.shapes.values()} == {torch.bfloat16}
        llama.eval()
        for prompt, completion in zip(PROMPTS, rounded, strict=False):
            with torch.no_grad():
                whole = torch.tensor([prompt + completion.ids], device=DEVICE)
                log_p = llama(whole, use_cache=False).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1].cpu()
            found = log_p.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.log_p), found, rtol=0.1, atol=0.3)
    assert complete(llama, PROMPTS[:2], Sampling(8)) == exact


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
def test_how_many_run_at_a_time_changes_nothing(llama: Any, sample: bool, monkeypatch: Any) -> None:
    """Few rows; and so few pages that sequences wait for them."""
    sampling = Sampling(20, sample=sample, per_prompt=3, seed=7)
    together = complete(llama, PROMPTS, sampling)
    one_by_one = complete(llama, PROMPTS, sampling, rows=2)
    monkeypatch.setattr(batch, "affordable", lambda *_: 8)
    waiting = complete(llama, PROMPTS, sampling)
    assert [c.ids for c in one_by_one] == [c.ids for c in waiting] == [c.ids for c in together]
    if sample:
        assert len({tuple(c.ids) for c in together[:3]}) == 3


def test_a_prompt_is_read_once_for_its_group(llama: Any, monkeypatch: Any) -> None:
    read, pages = [], []
    forward, close = batch.Batch._forward, batch.Batch.close

    def counted(self: Any, prompts: Any) -> None:
        read.extend(p.ids for p in prompts)
        forward(self, prompts)

    def closed(self: Any) -> None:
        pages.append((self.book.free, self.pools.pages))
        close(self)

    monkeypatch.setattr(batch.Batch, "_forward", counted)
    monkeypatch.setattr(batch.Batch, "close", closed)
    prompt = [*range(1, 90)]
    complete(llama, [prompt, [4, 5]] * 4, Sampling(8), rows=3)
    assert sorted(read) == sorted([prompt, [4, 5]])
    assert pages == [(pages[0][1] - 1, pages[0][1])], "every page is free again, but the one of what nobody reads"


def test_pages_are_held_by_several() -> None:
    book = Book(5)
    pages = book.take(3)
    book.share(pages[:1])
    book.release(pages)
    assert book.free == 3
    book.release(pages[:1])
    assert book.free == 4
    with pytest.raises(NoSpaceError, match="5 pages are wanted and 4 are free"):
        book.take(5)


def test_no_space_says_how_much_is_needed() -> None:
    shapes = {layer: Shape(8, 128, 128, torch.bfloat16) for layer in range(32)}
    assert affordable(shapes, 100, 10, None, 5) == 101
    assert affordable(shapes, 100, 10, 50 * 2**22, 5) == 50
    with pytest.raises(NoSpaceError, match=r"320 tokens needs 0.04 GiB and 0.02 GiB .* 0 of 5 sequences .* 96 tokens"):
        affordable(shapes, 100, 10, 4 * 2**22, 5)


# -- ends, seeds, weights ----------------------------------------------------------------------------------------------


def test_a_token_or_a_text_ends_a_completion(llama: Any) -> None:
    tokenizer = byte_tokenizer()
    (whole,) = complete(llama, [[5, 6, 7]], Sampling(24))
    assert whole.reason == "length" and len(whole.ids) == 24
    token = whole.ids[5]
    (ended,) = complete(llama, [[5, 6, 7]], Sampling(24, ends=frozenset({token})))
    assert ended.reason == "stop" and ended.ids == whole.ids[: whole.ids.index(token) + 1]
    text = tokenizer.decode(whole.ids[9:11])
    (stopped,) = complete(llama, [[5, 6, 7]], Sampling(24, stops=(text,)), tokenizer=tokenizer)
    assert stopped.reason == "stop" and tokenizer.decode(stopped.ids).endswith(text) and len(stopped.ids) <= 11
    with pytest.raises(ValueError, match="stop strings need the tokenizer"):
        complete(llama, [[5]], Sampling(2, stops=("a",)))


def test_the_context_ends_a_completion() -> None:
    model = build("llama", max_position_embeddings=30)
    short, long = complete(model, [[5, 6], [*range(1, 28)]], Sampling(40))
    assert len(short.ids) == 28 and len(long.ids) == 3 and short.reason == long.reason == "length"
    with pytest.raises(ValueError, match="prompt 1: its prompt has 30 tokens, and the model's context is 30"):
        complete(model, [[5], [6] * 30], Sampling(2))


def test_seeds(llama: Any) -> None:
    def drawn(seed: int | None) -> list[list[int]]:
        return [c.ids for c in complete(llama, PROMPTS[:2], Sampling(16, sample=True, seed=seed))]

    assert drawn(3) == drawn(3) != drawn(4)
    torch.manual_seed(5)
    first, second = drawn(None), drawn(None)
    torch.manual_seed(5)
    assert drawn(None) == first != second


def test_after_an_update_every_token_is_the_new_weights(llama: Any) -> None:
    model = build("llama")
    before = complete(model, PROMPTS, Sampling(16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0), alpha=0.3)
    after = complete(model, PROMPTS, Sampling(16))
    assert [c.ids for c in after] != [c.ids for c in before]
    assert [c.ids for c in after] == [by_generate(model, prompt, 16) for prompt in PROMPTS]


def test_weights_that_change_meanwhile_are_noticed() -> None:
    model = build("llama")

    class Training:
        def decode(self, ids: list[int]) -> str:
            with torch.no_grad():
                model.lm_head.weight.mul_(2)
            return ""

    with pytest.raises(StaleError, match="2 tokens are of older ones"):
        complete(model, PROMPTS[:2], Sampling(24, stops=("x",)), tokenizer=Training())


def test_predictions_that_are_no_numbers_end_the_run() -> None:
    model = build("llama")
    complete(model, PROMPTS[:1], Sampling(2))
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="sequence 0 are not finite"):
        complete(model, PROMPTS[:1], Sampling(4, sample=True))


# -- how tokens are chosen ---------------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 7).expand(20000, 7)
    noise = torch.rand(20000, dtype=torch.float64)
    tokens, log_p = Sampling(1, sample=True, temperature=0.6).chooser()(logits, None, noise)
    expected = (logits[0] / 0.6).softmax(-1)
    assert (torch.bincount(tokens, minlength=7) / 20000 - expected).abs().max() < 0.02
    torch.testing.assert_close(log_p, expected.log()[tokens])


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.1}])
def test_what_is_filtered_out_is_never_drawn(filters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50)
    sampling = Sampling(1, sample=True, **filters)
    drawn = {
        int(sampling.chooser()(logits, None, torch.tensor([u], dtype=torch.float64))[0])
        for u in torch.linspace(0, 1 - 1e-12, 400, dtype=torch.float64)
    }
    p = logits[0].softmax(-1)
    order = p.argsort(descending=True)
    if "top_k" in filters:
        allowed = order[:3]
    elif "top_p" in filters:
        allowed = order[: int((p[order].cumsum(0) < 0.6).sum()) + 1]
    else:
        allowed = order[p[order] >= 0.1 * p.max()]
    assert drawn <= set(allowed.tolist()) and len(drawn) > 1


def test_settings_of_transformers_and_of_vllm(llama: Any) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.5, top_k=0, eos_token_id=[3, 4])
    assert sampling_of(config, llama, 5) == Sampling(9, True, 0.5, ends=frozenset({3, 4}))
    assert sampling_of(GenerationConfig(max_length=12), llama, 5) == Sampling(7)
    assert sampling_of(None, llama, 5, {"max_new_tokens": 3, "do_sample": True}).top_k == 50  # as generate has it

    class SamplingParams:
        max_tokens, temperature, top_k, top_p, n, stop, seed, stop_token_ids = 7, 0.8, -1, 0.95, 2, "end", 11, [5]

    expected = Sampling(7, True, 0.8, 0, 0.95, ends=frozenset({5}), stops=("end",), seed=11, per_prompt=2)
    assert sampling_of(SamplingParams(), llama, 5) == expected
    assert not sampling_of({"temperature": 0.0, "max_tokens": 3}, llama, 5).sample
    with pytest.raises(Unsupported, match="num_beams=4 is asked for"):
        sampling_of(GenerationConfig(max_new_tokens=2, num_beams=4), llama, 5)
    with pytest.raises(ValueError, match=r"presence_penalty=0\.5 is asked for"):
        sampling_of({"presence_penalty": 0.5}, llama, 5)
    with pytest.raises(ValueError, match="leaves no room"):
        sampling_of(GenerationConfig(max_length=5), llama, 5)
    with pytest.raises(ValueError, match="temperature=-1"):
        Sampling(1, sample=True, temperature=-1)


# -- what is left to generate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("bloom", {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "attention is not chosen by name"),
        ("mamba", {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2}, "linear_attention|recurrent"),
        ("llama", {**SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_models_that_do_not_decode_from_pages_say_why(name: str, sizes: dict[str, Any], reason: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    for _ in range(2):
        with pytest.raises(Unsupported, match=reason):
            complete(model, [[5, 6]], Sampling(2))


def test_what_is_no_model_is_said() -> None:
    with pytest.raises(Unsupported, match="Linear is no transformers model that generates"):
        complete(nn.Linear(2, 2), [[5, 6]], Sampling(2))


def test_a_model_that_decodes_otherwise_is_noticed(monkeypatch: Any) -> None:
    """Attention that is told half of what it computes: the tokens it makes are not the model's."""
    model = build("llama")
    module = model.model.layers[0].self_attn
    forward = type(module).forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, *rest = forward(self, *args, **kwargs)
        return (out * 2 if self.config._attn_implementation == "unsloth_paged" else out, *rest)

    monkeypatch.setattr(type(module), "forward", other)
    with pytest.raises(Unsupported, match="gives other logits than its forward"):
        complete(model, [[5, 6]], Sampling(2))


# -- the compiled step -------------------------------------------------------------------------------------------------


def test_the_step_is_one_graph_of_our_operators(monkeypatch: Any) -> None:
    torch._dynamo.reset()
    pools: list[Tensor] = []

    class Kept(batch.Pools):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pools.extend(x for group in self.groups for x in (group.keys, group.values))

    monkeypatch.setattr(batch, "Pools", Kept)
    model = add_lora(build("llama"), rank=4, alpha=8)
    options = Options(lowering="eager", strict=True)
    for new in (6, 40):
        made = complete(model, PROMPTS, Sampling(new), rows=4, compile=True, options=options)
        assert [c.ids for c in made] == [c.ids for c in complete(model, PROMPTS, Sampling(new), compile=False)]
    assert len(pools) == 8 and not any(x.untyped_storage().nbytes() for x in pools), "memory is held before backward"
    (report,) = engine_of(model).reports
    assert report.fallback is None
    assert {"rms_norm", "rope", "glu", "lora_linear"} <= {site.operator for site in report.rewritten}
    torch._dynamo.reset()


def test_a_step_that_does_not_compile_is_run_as_it_is(caplog: Any, monkeypatch: Any) -> None:
    model = build("llama")

    def broken(*_: Any, **__: Any) -> Any:
        def step(*_: Any) -> Any:
            raise RuntimeError("no such kernel")

        return step

    monkeypatch.setattr(engine, "compiled", broken)
    with caplog.at_level("WARNING"):
        made = complete(model, PROMPTS, Sampling(8), compile=True)
    assert caplog.text.count("uncompiled, because the compiled step raised RuntimeError: no such kernel") == 1
    assert [c.ids for c in made] == [c.ids for c in complete(model, PROMPTS, Sampling(8))]
    with pytest.raises(RuntimeError, match="no such kernel"):
        complete(build("llama"), PROMPTS, Sampling(8), compile=True, options=Options(strict=True))


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_decode_what_generate_does(llama: Any, compile: bool) -> None:
    made = complete(llama, PROMPTS * 3, Sampling(40), rows=7, compile=compile)
    assert [c.ids for c in made] == [by_generate(llama, prompt, 40) for prompt in PROMPTS * 3]
    assert torch.cuda.memory_allocated() < 2**28
