"""Rules over files and data: each finds the bug that is planted, and is silent without it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.models.doctoring import CHAT, evidence, rows, severities, subject, tensors, tokenizer
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.doctor import RULES, Row, Run, diagnose
from unsloth.models.doctor.tensors import of_folder
from unsloth.models.doctor.weights import untrained

OURS = Run(trainer="unsloth")
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TELLS_OTHERS = "{% if m.role == 'user' %}" + TURN + "{% endif %}"
MISTRAL = "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"


class AddsBos:
    """A tokenizer that puts BOS before every text, as Llama's does."""

    def __init__(self, inner, by=256):
        self.inner, self.by = inner, by

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, text, add_special_tokens=True, **more):
        ids = self.inner(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [self.by, *ids] if add_special_tokens else ids}


def labelled(*pairs) -> list[Row]:
    return [Row(f"rows:{n}", ids, labels) for n, (ids, labels) in enumerate(pairs, 1)]


ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}

# rule → (the planted subject, words of the evidence, and one that is nearly the same and clean)
CASES = {
    "tokens-outside-embedding": lambda: (subject(vocab_size=258), "2 tokens lie beyond", subject()),
    "pad-outside-embedding": lambda: (subject(vocab_size=258), "258 rows", subject(vocab_size=259)),
    "pad-missing": lambda: (subject(tokens=tokenizer(pad_token=None)), "no padding token", subject()),
    "pad-is-eos": lambda: (subject(tokens=tokenizer(pad_token="<|im_end|>")), "both are '<|im_end|>' (257)", subject()),
    "eos-missing": lambda: (subject(tokens=tokenizer(eos_token="<|unk|>")), "unknown token", subject()),
    "special-token-split": lambda: (subject(tokens=Splits()), "is read as 10", subject()),
    "eos-ids-disagree": lambda: (
        subject(eos_token_id=258),
        "stops at '<|pad|>' (258)",
        subject(eos_token_id=258, generation={"eos_token_id": [258, 257]}),
    ),
    "bos-ids-disagree": lambda: (
        subject(bos_token_id=65),
        "config.json says '<0x41>' (65)",
        subject(bos_token_id=None),
    ),
    "template-drops-messages": lambda: (
        subject(tokens=tokenizer(LOOP.replace(TURN, TELLS_OTHERS)), rows=()),
        "an answer comes out 0 times",
        subject(tokens=tokenizer(LOOP)),
    ),
    "template-drops-system": lambda: (
        subject(tokens=tokenizer("{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}")),
        "it is not there",
        subject(tokens=tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + LOOP)),
    ),
    "generation-prompt-missing": lambda: (
        subject(tokens=tokenizer(LOOP)),
        "answers begin after '<|im_start|>assistant\\n' more",
        subject(tokens=tokenizer(LOOP.replace(TURN, MISTRAL))),
    ),
    "generation-prompt-always": lambda: (
        subject(tokens=tokenizer(LOOP + "{{ '<|im_start|>assistant\\n' }}")),
        "behind the last answer",
        subject(tokens=tokenizer(LOOP + PROMPT)),
    ),
    "generation-prompt-differs": lambda: (
        subject(tokens=tokenizer(LOOP + PROMPT.replace("assistant\\n", "assistant\\n<think>\\n"))),
        "<think>",
        subject(tokens=tokenizer(LOOP + PROMPT)),
    ),
    "template-without-turn-end": lambda: (
        subject(tokens=tokenizer("{% for m in messages %}{{ '\\n' + m.role + ': ' + m.content }}{% endfor %}")),
        "nothing stands behind the last one",
        subject(tokens=tokenizer(LOOP)),
    ),
    "turn-end-is-not-eos": lambda: (
        subject(eos_token_id=258, tokens=tokenizer(eos_token="<|pad|>", pad_token="<|unk|>")),
        "ends an answer with '<|im_end|>' (257); generation stops at '<|pad|>' (258)",
        subject(eos_token_id=258, generation={"eos_token_id": [258, 257]}),
    ),
    "turn-end-is-no-token": lambda: (
        subject(tokens=tokenizer(LOOP.replace("<|im_end|>", "<|eot_id|>"))),
        "'<|eot_id|>' is read as 10 tokens",
        subject(),
    ),
    "pad-hides-turn-end": lambda: (
        subject(tokens=tokenizer(eos_token="<|unk|>", pad_token="<|im_end|>")),
        "both are '<|im_end|>' (257)",
        subject(),
    ),
    "bos-doubled": lambda: (
        subject(tokens=tokenizer("{{ bos_token }}" + LOOP)),
        "begins with '<|im_start|>' (256) twice",
        subject(),
    ),
    "bos-missing": lambda: (
        subject(tokens=AddsBos(tokenizer(LOOP.replace("<|im_start|>", "### ")))),
        "conversations with '### user",
        subject(tokens=AddsBos(tokenizer())),
    ),
    "ids-outside-embedding": lambda: (
        subject(rows=labelled(([65, 300], [65, 300]))),
        "rows:1: token 300",
        subject(rows=labelled(([65, 259], [65, 259]))),
    ),
    "nothing-to-learn": lambda: (
        subject(rows=labelled(([65, 66], [65, -100]))),
        "1 of 1 (100%)",
        subject(rows=labelled(([65, 66], [-100, 66]))),
    ),
    "rows-cut-off": lambda: (
        subject(rows=labelled(([65] * 9, [65] * 9)), run=Run(max_length=8)),
        "longer than 8 tokens; rows:1 has 9",
        subject(rows=labelled(([65] * 8, [65] * 8)), run=Run(max_length=8)),
    ),
    "end-not-learnt": lambda: (
        subject(rows=labelled(([65, 257], [65, -100]))),
        "'<|im_end|>' (257) stands in 1 of 1 (100%) rows, with a label in none",
        subject(rows=labelled(([65, 257], [65, 257]), ([65, 257], [65, -100]))),
    ),
    "bos-doubled-in-data": lambda: (
        subject(rows=labelled(([256, 256, 65], [256, 256, 65]))),
        "begin with '<|im_start|>' (256) twice: rows:1",
        subject(rows=labelled(([256, 65, 256], [256, 65, 256]))),
    ),
    "control-tokens-in-text": lambda: (
        subject(rows=rows(byte_tokenizer(), [{"role": "user", "content": "What is <|im_end|>?"}, CHAT[1]])),
        "rows:1: a message of user holds <|im_end|>",
        subject(),
    ),
    "unknown-tokens": lambda: (
        subject(rows=labelled(([65, 259], [65, 259]))),
        "1 of 2 (50%) tokens are '<|unk|>' (259)",
        subject(),
    ),
    "rows-alike": lambda: (
        subject(rows=rows(byte_tokenizer(), CHAT, CHAT)),
        "rows:1 is there 2 times",
        subject(rows=rows(byte_tokenizer(), CHAT)),
    ),
    "beyond-positions": lambda: (
        subject(max_position_embeddings=8),
        "max_position_embeddings is 8",
        subject(max_position_embeddings=8, run=Run(max_length=8)),
    ),
    "documents-joined": lambda: (subject(run=Run(packing="wrapped")), "'wrapped'", subject(run=Run(packing="bfd"))),
    "rope-theta-lost": lambda: (
        subject(written={"rope_theta": 500_000.0}),
        "says rope_theta 500,000",
        subject(written={"rope_theta": 10_000}),
    ),
    "rope-scaling-lost": lambda: (
        subject(written={"rope_scaling": {"factor": 8.0}}),
        "has the factor 8 and no rope_type",
        subject(written={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, rope_parameters=ROPE),
    ),
    "rope-attention-factor": lambda: (
        subject(rope_parameters={**ROPE, "attention_factor": 1.0}),
        "attention_factor is 1; a factor of 4 wants 1.139",
        subject(rope_parameters={**ROPE, "attention_factor": 1.1386}),
    ),
    "rope-context": lambda: (
        subject(rope_parameters=ROPE, max_position_embeddings=4096),
        "max_position_embeddings is 4,096; 512 trained positions × 4",
        subject(rope_parameters=ROPE, max_position_embeddings=2048),
    ),
    "activations-disagree": lambda: (
        subject(written={"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),
        "hidden_act is 'gelu'",
        subject(written={"hidden_act": "gelu", "hidden_activation": None}),
    ),
    "untrained-tokens-in-data": lambda: (
        weighed(rows=labelled(([65, 200], [65, 200])), untouched=200),
        "1 token with untrained rows in the embedding",
        weighed(rows=labelled(([65, 66], [65, 66])), untouched=200),
    ),
    "untrained-tokens-in-template": lambda: (
        weighed(untouched=257),
        "'<|im_end|>' (257) in the template",
        weighed(untouched=200),
    ),
    "embedding-size": lambda: (weighed(vocab_size=261), "has 260 rows, vocab_size is 261", weighed()),
    "tied-weights-differ": lambda: (
        weighed(tie_word_embeddings=True),
        "differ in 260 of 260 rows",
        weighed(tie_word_embeddings=True, tied=True),
    ),
    "head-missing": lambda: (weighed(head=False), "none is a head", weighed(head=False, tie_word_embeddings=True)),
    "tied-weights-parted": lambda: (
        subject(tie_word_embeddings=True, run=Run(saved_modules=["lm_head"])),
        "modules_to_save holds lm_head",
        subject(tie_word_embeddings=True, run=Run(saved_modules=["lm_head", "embed_tokens"])),
    ),
    "weights-not-finite": lambda: (weighed(norm=float("nan")), "model.norm.weight: 1 of 8", weighed()),
    "fp16-weights-overflow": lambda: (
        weighed(norm=70_000.0, run=Run(dtype="float16")),
        "70,000",
        weighed(norm=70_000.0, run=Run(dtype="bfloat16")),
    ),
    "fp16-of-a-bf16-model": lambda: (
        subject(dtype=torch.bfloat16, run=Run(dtype="float16")),
        "config.json says bfloat16",
        subject(dtype=torch.float16, run=Run(dtype="float16")),
    ),
}


class Splits:
    """A tokenizer whose EOS was named and never added, so that its text is read as letters."""

    eos_token, eos_token_id, bos_token, bos_token_id = "<|im_end|>", 257, None, None
    chat_template = None

    def __call__(self, text, **more):
        return {"input_ids": list(text.encode())}

    def convert_ids_to_tokens(self, i):
        return chr(i)

    def apply_chat_template(self, *args, **more):
        return ""


def weighed(untouched: int | None = None, *, head: bool = True, tied: bool = False, norm: float = 1.0, **given):
    """A subject with weights: of ``untouched`` the row is zero."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(260, 8, generator=generator)
    if untouched is not None:
        embedding[untouched] = 0
    held = {"model__embed_tokens__weight": embedding, "model__norm__weight": torch.ones(8)}
    held["model__norm__weight"][3] = norm
    if head:
        held["lm_head__weight"] = embedding.clone() if tied else torch.randn(260, 8, generator=generator)
    return subject(tensors=tensors(**held), **given)


@pytest.mark.parametrize("rule", CASES)
def test_rule(rule):
    planted, words, clean = CASES[rule]()
    found = evidence(rule, planted)
    assert found and words in found[0]
    assert evidence(rule, clean) == []


def test_every_rule_over_files_has_a_case():
    assert set(CASES) == {rule.id for rule in RULES.values() if rule.cheap}


def test_a_refusing_template_is_one_finding():
    planted = subject(tokens=tokenizer("{{ raise_exception('no chat here') }}"), rows=())
    found = diagnose(planted, only=lambda rule: "template" in rule.looks_at)
    assert [f.rule.id for f in found.findings] == ["template-drops-messages"]
    assert "no chat here" in found.findings[0].told and found.findings[0].stops


def test_our_trainer_makes_some_errors_warnings():
    planted = subject(tokens=tokenizer(pad_token="<|im_end|>"))
    assert severities("pad-is-eos", planted) == {"error"}
    planted.run = OURS
    assert severities("pad-is-eos", planted) == {"warning"}


def test_untrained_rows_are_found_however_they_were_left():
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    rows[10] *= 1e-3  # tiny
    rows[20:23] = rows[:50].mean(0)  # reserved tokens, all at the mean
    rows[30] = rows[31]  # two alike can be twins on purpose
    assert untrained(tensors(model__embed_tokens__weight=rows), "model.embed_tokens.weight") == {10, 20, 21, 22}


def test_a_head_of_another_name_is_a_head():
    planted = weighed(head=False)
    assert evidence("head-missing", planted)
    planted.tensors = tensors(
        model__embed_tokens__weight=torch.ones(260, 8), transformer__output_layer__weight=torch.ones(260, 8)
    )
    assert evidence("head-missing", planted) == []


def test_tokens_that_will_be_trained_are_a_warning():
    row = labelled(([65, 200], [65, 200]))
    assert severities("untrained-tokens-in-data", weighed(untouched=200, rows=row)) == {"error"}
    trained = Run(saved_modules=["embed_tokens", "lm_head"])
    assert severities("untrained-tokens-in-data", weighed(untouched=200, rows=row, run=trained)) == {"warning"}


def test_shards_are_read_one_tensor_at_a_time(tmp_path):
    save_file({"model.embed_tokens.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(4, 2), "model.norm.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    names = {"model.embed_tokens.weight": "a", "lm_head.weight": "b", "model.norm.weight": "b"}
    index = ",".join(f'"{name}": "{shard}.safetensors"' for name, shard in names.items())
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    found = of_folder(tmp_path)
    assert (found.embedding, found.head, found.norms) == (
        "model.embed_tokens.weight",
        "lm_head.weight",
        ["model.norm.weight"],
    )
    (tmp_path / "b.safetensors").unlink()  # what is not asked for is not read
    assert found.row_norms("model.embed_tokens.weight").tolist() == pytest.approx([2**0.5] * 4)


def test_a_broken_rule_is_no_finding():
    class Broken:
        chat_template = None

        def __getattr__(self, name):
            raise RuntimeError("damaged")

    found = diagnose(subject(tokens=Broken(), rows=()), only=lambda rule: rule.id == "pad-missing")
    assert found.ok and found.failed == {"pad-missing": "RuntimeError: damaged"}
