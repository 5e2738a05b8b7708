"""Rules over code: classes with a bug that changes only numbers are found out by a tiny model, clean ones are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, Gemma2ForCausalLM, LlamaForCausalLM, MistralForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.models.doctoring import evidence, severities, subject
from unsloth.models import presets
from unsloth.models.adapters import add_lora
from unsloth.models.doctor import RULES, Run, diagnose, of_loaded
from unsloth.models.doctor.rope import declared

CODE = [rule.id for rule in RULES.values() if not rule.cheap]


def planted(cls, preset, **given):
    """A subject with a model of a class of the tests in memory."""
    found = subject(preset, **given)
    found.model = cls(copy.deepcopy(found.config))
    return found


def changed(base, change):
    """A class whose models are changed when they are made."""

    class Changed(base):
        def __init__(self, config):
            super().__init__(config)
            change(self)

    Changed.__name__ = f"Changed{base.__name__}"
    return Changed


def with_forward(module_name, forward):
    """A change of every module whose class is called so: another forward."""

    def change(model):
        for module in model.modules():
            if module_name in type(module).__name__:
                module.forward = forward.__get__(module)

    return change


# -- the bugs ----------------------------------------------------------------------------------------------------------


def rounds_first(self, x):
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
    return normed.to(x.dtype) * (1 + self.weight.float()).to(x.dtype)


def in_low_precision(self, x):
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def rotates_in_bf16(self, x, position_ids):
    freqs = position_ids[..., None].to(torch.bfloat16) * self.inv_freq.to(torch.bfloat16)
    emb = torch.cat((freqs, freqs), dim=-1)
    return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def with_base_of_its_own(model):
    width = 2 * model.model.rotary_emb.inv_freq.numel()
    model.model.rotary_emb.inv_freq = 500_000.0 ** (-torch.arange(0, width, 2).float() / width)


def scales_in_float32(self, ids):
    return (F.embedding(ids, self.weight).float() * self.scalar_embed_scale).to(self.weight.dtype)


def exact_gelu(model):
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.GELU()


class DividesByItself(LlamaForCausalLM):
    """Takes the number of tokens, and leaves it alone."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


class CannotBeTold(LlamaForCausalLM):
    accepts_loss_kwargs = False


class ReadsTheHeadsWeight(LlamaForCausalLM):
    """A fused loss, as users write it."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = F.linear(hidden, self.lm_head.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class IgnoresPositions(LlamaForCausalLM):
    """Counts on without looking where a document begins."""

    def forward(self, position_ids=None, **kwargs):
        return super().forward(**kwargs)


class SeesPadding(LlamaForCausalLM):
    """Leaves the attention mask alone."""

    def forward(self, attention_mask=None, **kwargs):
        return super().forward(**kwargs)


def _plain_attention(module, query, key, value, mask, scaling, window=None, causal=True, **kwargs):
    """Attention by hand, whose masks the tests choose."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scaling
    places = torch.arange(scores.shape[-1])
    hidden = places[None, :] > places[:, None] if causal else torch.zeros(len(places), len(places), dtype=torch.bool)
    if window is not None:
        hidden = hidden | (places[:, None] - places[None, :] >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def without_cap(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    return _plain_attention(module, query, key, value, attention_mask, scaling)


def sees_all(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return _plain_attention(module, query, key, value, attention_mask, scaling, causal=False)


def window_and_one_more(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    return _plain_attention(module, query, key, value, attention_mask, scaling, window=sliding_window + 1)


@pytest.fixture(scope="module", autouse=True)
def attentions():
    """Attention implementations with a bug, by name; they get the 2-dimensional mask as it is."""
    for function in (without_cap, sees_all, window_and_one_more):
        AttentionInterface.register(function.__name__, function)
        AttentionMaskInterface.register(function.__name__, lambda *args, attention_mask=None, **kwargs: attention_mask)


def untied(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


CASES = {
    "norm-low-precision": lambda: (
        planted(changed(LlamaForCausalLM, with_forward("RMSNorm", in_low_precision)), "tiny-llama"),
        "LlamaRMSNorm) in bfloat16 is none of the formulas",
    ),
    "norm-cast-order": lambda: (
        planted(changed(Gemma2ForCausalLM, with_forward("RMSNorm", rounds_first)), "tiny-gemma2"),
        "adds 1 to its weight in float32 and rounds that, then multiplies; Gemma2ForCausalLM's multiplies by 1 + its",
    ),
    "rope-frequencies": lambda: (
        planted(changed(LlamaForCausalLM, with_base_of_its_own), "tiny-llama"),
        "default scaling with base 10,000 gives",
    ),
    "rope-low-precision": lambda: (
        planted(changed(LlamaForCausalLM, with_forward("Rotary", rotates_in_bf16)), "tiny-llama"),
        "at position 2,047 the cosine is off by",
    ),
    "gelu-variant": lambda: (
        planted(changed(Gemma2ForCausalLM, exact_gelu), "tiny-gemma2"),
        "act_fn is GELU, off by up to 0.0005; the configuration says 'gelu_pytorch_tanh'",
    ),
    "embedding-scale-rounding": lambda: (
        planted(changed(Gemma2ForCausalLM, with_forward("ScaledWord", scales_in_float32)), "tiny-gemma2"),
        "multiplies by the scale in float32; Gemma2ForCausalLM rounds the scale to bfloat16 first",
    ),
    "future-seen": lambda: (subject(attn_implementation="sees_all"), "position 0 depends on position 11"),
    "window-off-by-one": lambda: (
        subject("tiny-mistral", attn_implementation="window_and_one_more"),
        "through 2 attentions with a window of 4 an output sees 9 tokens; each adds 3, which makes 7",
    ),
    "documents-mixed": lambda: (planted(IgnoresPositions, "tiny-llama"), "the second one's position 0 sees the first"),
    "softcap-dropped": lambda: (
        subject("tiny-gemma2", attn_implementation="without_cap"),
        "attn_logit_softcapping is 50, and the attention scores",
    ),
    "left-padding-nan": lambda: (subject(attn_implementation="without_cap"), "padded on the left"),
    "left-padding-changes": lambda: (planted(SeesPadding, "tiny-llama"), "the same 4 tokens give logits"),
    "loss-per-micro-batch": lambda: (planted(DividesByItself, "tiny-llama"), "11 and 3 trained tokens"),
    "accumulation-scales-gradients": lambda: (planted(CannotBeTold, "tiny-llama"), "would be divided by 2 again"),
    "head-adapter-bypassed": lambda: (planted(ReadsTheHeadsWeight, "tiny-llama"), "does not change with what lm_head"),
    "tied-weights-broken": lambda: (
        planted(changed(LlamaForCausalLM, untied), "tiny-llama", tie_word_embeddings=True),
        "the head's weight is not the embedding's",
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_rule(rule):
    bad, words = CASES[rule]()
    found = evidence(rule, bad)
    assert found and words in found[0]


def test_every_rule_over_code_has_a_case():
    assert set(CASES) == set(CODE)


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-qwen3", "tiny-gemma2", "tiny-mistral", "tiny-phi3"])
def test_clean_models_are_silent(preset):
    found = diagnose(subject(preset))
    assert found.findings == [], str(found)
    # No rule over code failed: silence is an answer.
    assert set(CODE) <= set(found.silent)


@pytest.mark.parametrize("cls", [LlamaForCausalLM, Gemma2ForCausalLM, MistralForCausalLM])
def test_a_clean_class_of_ones_own_is_silent(cls):
    preset = {LlamaForCausalLM: "tiny-llama", Gemma2ForCausalLM: "tiny-gemma2", MistralForCausalLM: "tiny-mistral"}[cls]
    found = diagnose(planted(type("Mine", (cls,), {}), preset), only=lambda rule: not rule.cheap)
    assert found.findings == [] and set(CODE) == set(found.silent), str(found)


def test_a_model_that_was_cast_has_cast_its_rotation():
    model = presets.build("tiny-llama")
    assert evidence("rope-low-precision", of_loaded(model)) == []
    assert "inv_freq in bfloat16" in evidence("rope-low-precision", of_loaded(model.to(torch.bfloat16)))[0]


def test_a_model_in_memory_with_adapters_is_silent():
    found = diagnose(of_loaded(add_lora(presets.build("tiny-llama"), rank=2)))
    assert found.findings == [], str(found)


def test_an_adapter_on_a_head_that_is_bypassed_is_an_error():
    bad = planted(ReadsTheHeadsWeight, "tiny-llama")
    assert severities("head-adapter-bypassed", bad) == {"warning"}
    bad.run = Run(adapted=["q_proj", "lm_head"])
    assert severities("head-adapter-bypassed", bad) == {"error"}


def test_a_trainer_that_computes_the_loss_itself_makes_it_a_warning():
    bad = planted(DividesByItself, "tiny-llama")
    assert severities("loss-per-micro-batch", bad) == {"error"}
    bad.run = Run(trainer="unsloth")
    assert severities("loss-per-micro-batch", bad) == {"warning"}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16, "truncate": False,
         "original_max_position_embeddings": 4096},
    ],
)  # fmt: skip
def test_declared_rotations_are_those_of_transformers(scaling):
    parameters = {"rope_theta": 500_000.0, **scaling}
    config = presets.config("tiny-llama")
    config.head_dim, config.rope_parameters, config.max_position_embeddings = 64, parameters, 2048
    rotary = LlamaForCausalLM(config).model.rotary_emb
    frequencies, factor = declared(parameters, 64)
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=1e-5, atol=0)
    assert rotary.attention_scaling == pytest.approx(factor)


def test_a_window_that_does_not_slide():
    found = evidence("window-off-by-one", subject("tiny-mistral", attn_implementation="without_cap"))
    assert found == ["with a window of 4 an output sees all 32 tokens of a row"]


def test_documents_of_a_run_that_does_not_pack_are_not_asked_about():
    bad = planted(IgnoresPositions, "tiny-llama")
    found = {}
    for packing in (None, "bfd"):
        bad.run = Run(packing=packing)
        found[packing] = severities("documents-mixed", bad)
    assert found == {None: set(), "bfd": {"error"}}


def test_a_scaling_without_a_formula_is_not_judged():
    assert declared({"rope_type": "longrope", "rope_theta": 10_000.0}, 16) is None


def test_an_attention_factor_that_the_code_leaves_out():
    def forgets(model):
        model.model.rotary_emb.attention_scaling = 1.0

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    bad = planted(changed(LlamaForCausalLM, forgets), "tiny-llama", rope_parameters=yarn)
    (found,) = evidence("rope-frequencies", bad)
    assert "declares the attention factor 1.139, the model has 1" in found
    assert evidence("rope-frequencies", planted(LlamaForCausalLM, "tiny-llama", rope_parameters=yarn)) == []
