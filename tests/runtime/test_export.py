"""``unsloth export`` and ``unsloth chat``: what a run has left, written whole or not at all, and talked to."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import gguf
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tests.runtime.tiny import conversations
from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.export.merged import merged
from unsloth.models.load import load_model, load_tokenizer, random_batch
from unsloth.runtime import checkpoints, cli, export
from unsloth.runtime.card import model_card
from unsloth.runtime.chat import Manner, chat, generate, speakers, stop_tokens
from unsloth.runtime.config import read_config
from unsloth.runtime.train import train


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """What ``unsloth train`` leaves."""
    folder = tmp_path_factory.mktemp("run")
    presets.build("tiny-llama").save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in conversations(8)) + "\nnot json\n")
    settings = {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "adapter"),
        "max_steps": 3,
        "learning_rate": 0.1,
        "compile": False,
        "save_strategy": "no",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    train(read_config(folder / "run.yaml"), console=Console(file=io.StringIO()))
    return folder / "adapter"


@pytest.fixture(scope="module")
def model(adapter) -> Any:
    return load_model(str(adapter)).eval()


@pytest.fixture(scope="module")
def tokenizer(adapter) -> Any:
    return load_tokenizer(str(adapter))


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unsloth", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=random_batch(model, 2, 12)["input_ids"], use_cache=False).logits.float()


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return ((one - other).norm() / other.norm()).item() < tolerance


# -- export ------------------------------------------------------------------------------------------------------------


def test_merged_in_16_bits(command, adapter, model, tmp_path):
    code, out, err = command("export", adapter, tmp_path / "out", "--dtype", "bf16", "--max-shard-gb", "0.001")
    assert code == 0, err
    assert "exported" in out and "model.safetensors" in out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.bfloat16
    assert close(logits(again.float()), logits(model), 2e-2)
    assert checkpoints.damage(tmp_path / "out") == []
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == byte_tokenizer().chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # a folder is no hub id
    assert "![training loss](loss.png)" in card and (tmp_path / "out" / "loss.png").is_file()
    assert "| `learning_rate` | `0.1` |" in card and "dropped     1 of 9 rows" in card and "rows.jsonl:9" in card


def test_gguf(command, adapter, model, tmp_path):
    code, _out, err = command(
        "export", adapter, tmp_path / "out", "--format", "gguf", "--type", "f16", "--type", "q8_0", "--name", "tiny"
    )
    assert code == 0, err
    for kind, tolerance in (("F16", 5e-3), ("Q8_0", 5e-2)):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out",
            gguf_file=f"tiny.{kind}.gguf",
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        assert close(logits(again.eval()), logits(model), tolerance)
        reader = gguf.GGUFReader(tmp_path / "out" / f"tiny.{kind}.gguf")
        assert reader.get_field("tokenizer.chat_template").contents() == byte_tokenizer().chat_template
    assert "llama-cli -m tiny.Q8_0.gguf" in (tmp_path / "out" / "README.md").read_text()


def test_the_adapter_as_it_is(command, adapter, model, tmp_path):
    code, _, err = command("export", adapter, tmp_path / "out", "--format", "adapter")
    assert code == 0, err
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (adapter / weights).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    assert close(logits(PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()), logits(model), 1e-6)
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapters_name_is_no_path(model, tmp_path):
    model.add_adapter("/escape", model.peft_config["default"])
    model.set_adapter("/escape")
    try:
        with pytest.raises(ValueError, match="no name for a file"):
            export.save(model, None, tmp_path / "out", format="adapter")
    finally:
        model.set_adapter("default")
        model.delete_adapter("/escape")
    assert not any(tmp_path.iterdir())


def test_merged_into_4_bits(command, adapter, model, tmp_path):
    code, _, err = command("export", adapter, tmp_path / "out", "--format", "merged-4bit")
    assert code == 0, err
    again = load_model(str(tmp_path / "out"))
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in again.modules()) == 14
    assert close(logits(again.eval()), logits(model), 0.35)
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]  # the 16-bit model in between is gone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "format 'onnx' is none of merged, merged-4bit, adapter, gguf"),
        (["--format", "gguf", "--type", "q4_k_m"], "llama-quantize model.F16.gguf model.Q4_K_M.gguf Q4_K_M"),
        (["--format", "gguf", "--name", "/escape"], "no name for a file"),
    ],
)
def test_what_is_refused(command, adapter, tmp_path, arguments, message):
    code, _, err = command("export", adapter, tmp_path / "out", *arguments)
    assert code == 2 and message in err
    assert not any(tmp_path.iterdir())


def test_places_that_are_refused(command, adapter, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    for place, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "is not empty"),
        (adapter, "comes from"),
    ):
        code, _, err = command("export", adapter, place)
        assert code == 2 and message in err
    code, _, err = command("export", adapter, tmp_path / "full", "--overwrite")
    assert code == 0, err
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_a_write_that_fails_leaves_what_was_there(monkeypatch, model, tokenizer, tmp_path):
    folder = tmp_path / "out"
    export.save(model, tokenizer, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(folder, weights, **settings):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        export.save(model, tokenizer, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OSError, match="No space left"):
        export.save(model, tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_fewer_shards_replace_more(model, tokenizer, tmp_path):
    folder = tmp_path / "out"
    export.save(model, tokenizer, folder, max_shard_bytes=50_000)
    (folder / "mine.safetensors").write_bytes(b"mine")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    written = export.save(model, tokenizer, folder)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["mine.safetensors", "model.safetensors"]
    assert not (folder / "model.safetensors.index.json").exists()  # it would be read first
    assert "model.safetensors" in written.files
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert close(logits(again.eval()), logits(model), 2e-2)


def test_a_card_says_how_to_load_and_not_where_it_lay():
    run = {"settings": {"model_name_or_path": "/home/me/secret/model"}}
    card = model_card(title="t", base="/home/me/secret/m.Q4_1.gguf", kind="adapter", files=[], run=run)
    assert 'from_pretrained("its-folder", gguf_file="m.Q4_1.gguf")' in card
    assert "secret" not in card and "| `model_name_or_path` | `model` |" in card


def test_a_card_quotes_what_it_is_told():
    run = {"settings": {"a|b": "x`y\n# not a title"}, "data": ["```\nevil"], "results": {"loss": 1.23456789}}
    card = model_card(title="t\n# x", base="owner/name", kind="merged", files=[], run=run)
    assert "base_model: owner/name" in card
    assert "`a\\|b`" in card and "`` x`y # not a title ``" in card and "`1.23457`" in card
    assert not [line for line in card.splitlines() if line.startswith("# not") or line == "```\nevil"]
    assert card.count("```") == 4  # the code and the data, each opened and closed


# -- chat --------------------------------------------------------------------------------------------------------------


def test_a_piped_conversation(command, adapter):
    asked = "What is 1 + 1?\n\nAnd 2?\n/reset\nHello\n/exit\nnever read\n"
    code, out, err = command("chat", adapter, "--max-new-tokens", "6", stdin=asked)
    assert code == 0, err
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("> ")][:2] == ["> What is 1 + 1?", "> And 2?"]
    assert "never read" not in out
    assert out.count("base     ") == out.count("adapter  ") == 3


def test_generation_is_transformers_own(model, tokenizer):
    """Greedy tokens equal ``generate``'s, for base and adapter taking turns."""
    ids = tokenizer("Hello").input_ids
    sides = speakers(model)
    manner = Manner(max_new_tokens=8, temperature=0)
    streams = [generate(model, ids, manner, set(), side.state) for side in sides]
    taking_turns = list(zip(*streams, strict=True))
    for side, tokens in zip(sides, zip(*taking_turns, strict=True), strict=True):
        with side.state(), torch.no_grad():
            theirs = model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
            )
        assert list(tokens) == theirs[0, len(ids) :].tolist(), side.name
    assert len(set(zip(*taking_turns, strict=True))) == 2  # the adapter has learnt something


def test_draws(model, tokenizer):
    ids = tokenizer("Hello").input_ids
    with torch.no_grad():
        one, two = (list(generate(model, ids, Manner(12, 1.0, 0.9, seed), set())) for seed in (1, 2))
        again = list(generate(model, ids, Manner(12, 1.0, 0.9, 1), set()))
        greedy = list(generate(model, ids, Manner(12, 0.0), set()))
        narrow = list(generate(model, ids, Manner(12, 1.0, 1e-9), set()))
    assert one == again != two
    assert narrow == greedy


def test_an_answer_ends_where_turns_end(model, tokenizer):
    assert stop_tokens(model, tokenizer) == {tokenizer.eos_token_id}


def test_columns_in_a_terminal(model, tokenizer):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60)
    sides = chat(model, tokenizer, lines=["Hi"], manner=Manner(4), console=console)
    assert "base" in screen.getvalue() and "adapter" in screen.getvalue()
    assert [m["role"] for m in sides[0].messages] == ["user", "assistant"]
    assert not model.training


def test_a_long_conversation_forgets_its_beginning(model, tokenizer):
    lines = [f"question {i} " + "x" * 400 for i in range(8)]
    (side,) = chat(
        model,
        tokenizer,
        lines=lines,
        system="Be brief.",
        compare=False,
        manner=Manner(4),
        console=Console(file=io.StringIO()),
    )
    assert side.messages[0]["role"] == "system"
    assert len(side.messages) < 17 and side.messages[-2]["content"].startswith("question 7")


def test_exporting_changes_nothing(model):
    before = logits(model)
    [w.value() for w in merged(model).weights]
    assert torch.equal(logits(model), before)
