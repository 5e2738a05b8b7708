"""``unsloth train``: a run from end to end on a tiny checkpoint, and what it says to bad input."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.runtime.tiny import conversations
from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.load import load_model
from unsloth.runtime import checkpoints, cli
from unsloth.runtime import train as training

EAGER = "{lowering: eager, strict: true}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    presets.build("tiny-llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in conversations(16)), encoding="utf-8")
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``unsloth train <arguments>``; returns (exit code, standard output, standard error)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        torch._dynamo.reset()
        monkeypatch.setattr(sys, "argv", ["unsloth", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


def test_a_run_from_a_file(command, checkpoint, rows, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {checkpoint}\ndataset_name: {rows}\neval_dataset_name: {rows}\n"
        f"output_dir: {tmp_path / 'out'}\nsample_prompt: What is 1 + 1?\nlora_r: 4\nmax_steps: 6\n"
        "learning_rate: 1e-2\noptions: {lowering: eager, strict: true}\n",
        encoding="utf-8",
    )
    code, out, err = command(config, "--max-steps", "8")
    assert code == 0, err
    assert "1 graph, 0 breaks" in out or "2 graphs, 0 breaks" in out  # one trains, one evaluates
    assert "steps       8, " in out and "tokens/s" in out and "held out    loss " in out and "after " in out
    folder = tmp_path / "out"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "loss.png", "log.json"} <= names
    assert not [n for n in names if n.startswith(".")]
    log = json.loads((folder / "log.json").read_text())
    losses, held_out = [e["loss"] for e in log if "loss" in e], [e["eval_loss"] for e in log if "eval_loss" in e]
    assert len(losses) == 8 and all(e["grad_norm"] > 0 for e in log if "loss" in e)
    assert losses[-1] < losses[0] and held_out[-1] < held_out[0]


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(checkpoint, rows, tmp_path, monkeypatch) -> None:
    kept: list[Any] = []
    save = training._save
    monkeypatch.setattr(training, "_save", lambda trainer, result: (kept.append(trainer.model), save(trainer, result)))
    config = {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(rows),
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "learning_rate": 1e-2,
        "options": {"lowering": "eager", "strict": True},
    }
    training.train(training.TrainConfig.model_validate(config))
    ids = torch.randint(4, 250, (2, 12))
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        plain = base(ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()(ids).logits
        trained = kept[0].eval()(ids).logits
    torch.testing.assert_close(loaded, trained, rtol=0, atol=0)
    assert (loaded - plain).abs().max() > 1e-3


def test_full_fine_tuning(command, checkpoint, rows, tmp_path) -> None:
    arguments = ["--model", checkpoint, "--data", rows, "--output-dir", tmp_path / "out", "--max-steps", 2]
    code, out, err = command(*arguments, "--use-peft", "false", "--options", "{lowering: eager, strict: true}")
    assert code == 0, err
    assert "all parameters trained" in out and (tmp_path / "out" / "model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_base_in_eight_bits(command, checkpoint, rows, tmp_path) -> None:
    words = ["--model", checkpoint, "--data", rows, "--output-dir", tmp_path / "out", "--max-steps", 2]
    code, out, err = command(*words, "--load-in-8bit", "true", "--compile", "false")
    assert code == 0 and "steps       2, " in out, err
    base = load_model(str(checkpoint), quantise="int8")
    assert base.is_loaded_in_8bit and PeftModel.from_pretrained(base, tmp_path / "out").peft_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nobody/nothing"}, "nobody/nothing"),
        ({"--model": "tiny-lama"}, "tiny-llama"),
        ({"--data": "absent.jsonl"}, "there is no file absent.jsonl"),
        ({"--lora-target-modules": "[q_proj, w_proj]"}, "w_proj"),
        ({"--max-step": "3"}, "did you mean 'max_steps'?"),
        ({"--learning-rate": "-1"}, "--learning-rate: learning_rate cannot be -1"),
        ({"--options": "{memory_budge: 3}"}, "did you mean 'memory_budget'?"),
    ],
)
def test_bad_input(command, checkpoint, rows, tmp_path, change, message) -> None:
    good = {"--model": checkpoint, "--data": rows, "--output-dir": tmp_path / "out", "--max-steps": 1}
    code, out, err = command(*(word for pair in {**good, **change}.items() for word in pair))
    assert (code, out) == (2, ""), err
    assert err.strip().startswith("unsloth: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_no_chat_template_and_no_tokenizer(command, checkpoint, rows, tmp_path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    for name in ("chat_template.jinja",):
        (bare / name).unlink()
    code, _, err = command("--model", bare, "--data", rows, "--output-dir", tmp_path / "out")
    assert code == 2 and "chat template" in err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    code, _, err = command("--model", bare, "--data", rows, "--output-dir", tmp_path / "out")
    assert code == 2 and "tokenizer" in err


def test_wrong_column_and_empty_data(command, checkpoint, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"frage": "a", "antwort": "b"}\n', encoding="utf-8")
    code, _, err = command("--model", checkpoint, "--data", path, "--output-dir", tmp_path / "out")
    assert code == 2 and "has the columns antwort, frage, and none of these" in err
    path.write_text("", encoding="utf-8")
    code, _, err = command("--model", checkpoint, "--data", path, "--output-dir", tmp_path / "out")
    assert code == 2 and "is empty" in err


def in_few_steps(checkpoint: Path, data: Path, out: Path) -> list[Any]:
    """For what is the same whether the step is compiled or not."""
    return ["--model", checkpoint, "--data", data, "--output-dir", out, "--max-steps", 2, "--compile", "false"]


def test_a_csv_file_with_templates(command, checkpoint, tmp_path, monkeypatch) -> None:
    kept: list[Any] = []
    save = training._save
    monkeypatch.setattr(training, "_save", lambda trainer, result: (kept.append(trainer), save(trainer, result)))
    path = tmp_path / "rows.csv"
    cells = [f"What is {i} + {i}?,{'a sum' if i % 2 else ''},{2 * i}" for i in range(8)]
    path.write_text("\n".join(["ask,note,reply", *cells, ",no question,0"]) + "\n", encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(
        'prompt_template: "{ask} [[Context: {note}]]"\ncompletion_template: "{reply}"\nsystem_template: Be brief.\n'
        f"eval_dataset_name: {path}\n",
        encoding="utf-8",
    )
    code, out, err = command(config, *in_few_steps(checkpoint, path, tmp_path / "out"))
    assert code == 0, err
    assert f"data        {path}: 8 rows, by templates (ask, note, reply)\n" in err
    assert f"dropped     1 of 9 rows\n            {path}:10: column 'ask' is empty\n" in err
    assert err.index("data  ") < err.index("step 1/2") and "steps       2, " in out and "held out    loss " in out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    (trainer,) = kept
    row = trainer.train_dataset[1]
    text = trainer.processing_class.decode(row["input_ids"])
    assert all(part in text for part in ("Be brief.", "What is 1 + 1? Context: a sum", "2"))
    learnt = [token for token in row["labels"] if token >= 0]
    assert "2" in trainer.processing_class.decode(learnt) and "What is" not in trainer.processing_class.decode(learnt)


def test_an_excel_file(command, checkpoint, tmp_path) -> None:
    path = tmp_path / "rows.xlsx"
    book = openpyxl.Workbook()
    for row in [["question", "answer"], *([f"What is {i} + {i}?", 2 * i] for i in range(8)), ["What is 9?", None]]:
        book.active.append(row)
    book.save(path)
    code, out, err = command(*in_few_steps(checkpoint, path, tmp_path / "out"))
    assert code == 0, err
    assert f"{path}: 8 rows, a question and its answer (question, answer)" in err and "steps       2, " in out
    code, out, err = command(*in_few_steps(checkpoint, path, tmp_path / "strict"), "--strict-data", "true")
    assert (code, out) == (2, "") and f"1 of 9 rows of '{path}' cannot be used (strict_data):" in err
    assert f"{path}:10: column 'answer' is null" in err and "Traceback" not in err


def test_pairs_for_a_model_without_a_chat_template(command, checkpoint, tmp_path) -> None:
    bare, path = tmp_path / "bare", tmp_path / "rows.csv"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    path.write_text("question,answer\n" + "What is 1 + 1?,2\n" * 4, encoding="utf-8")
    code, _, err = command(*in_few_steps(bare, path, tmp_path / "out"))
    assert code == 0, err
    assert "4 rows, a question and its answer (plain text: the model has no chat template) (question, answer)" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prompt-template", "{contxt}", "--completion-template", "{reply}"],
            "unknown column 'contxt', did you mean",
        ),
        (["--prompt-template", "{ask}"], "prompt_template needs a completion_template"),
        (["--prompt-template", "{ask.__class__}"], "--prompt-template: prompt_template: '{ask.__class__}': "),
    ],
)
def test_templates_that_cannot_be_used(command, checkpoint, tmp_path, flags, message) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("ask,context,reply\na,b,c\n", encoding="utf-8")
    code, out, err = command(*in_few_steps(checkpoint, path, tmp_path / "out"), *flags)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_no_space_on_the_disk(command, checkpoint, rows, tmp_path, monkeypatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = command("--model", checkpoint, "--data", rows, "--output-dir", tmp_path / "out")
    assert code == 2 and "MiB free; the run needs" in err


def test_a_model_that_is_there_is_not_overwritten(command, checkpoint, rows, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    code, _, err = command("--model", checkpoint, "--data", rows, "--output-dir", out)
    assert code == 2 and "already holds a model" in err and (out / "adapter_config.json").read_text() == "{}"


def test_a_failure_while_saving_leaves_nothing_half_written(checkpoint, rows, tmp_path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "plot_loss", full)
    config = {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(rows),
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "compile": False,
    }
    with pytest.raises(OSError, match="No space left"):
        training.train(training.TrainConfig.model_validate(config))
    (left,) = (tmp_path / "out").iterdir()  # the run is not lost
    assert left.name == "checkpoint-1" and checkpoints.damage(left) == []


def test_checkpoints_and_result_go_to_the_hub(command, checkpoint, rows, tmp_path, monkeypatch) -> None:
    """As transformers sends them; what a hub would be handed is looked at on the way."""
    sent: list[tuple[str, set[str]]] = []

    def upload_folder(self: Any, *, repo_id: str, folder_path: str, run_as_future: bool = False, **_: Any) -> Any:
        sent.append((repo_id, {p.name for p in Path(folder_path).iterdir()}))
        url = f"https://huggingface.co/{repo_id}/commit/0"
        done = CommitInfo(commit_url=url, commit_message="", commit_description="", oid="")
        if run_as_future:
            (future := Future()).set_result(done)
            return future
        return done

    made: list[str] = []
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, name, **_: (made.append(name), RepoUrl(f"https://huggingface.co/{name}"))[1]
    )
    words = [*in_few_steps(checkpoint, rows, tmp_path / "out"), "--save-steps", 1, "--push-to-hub", "true"]
    code, _, err = command(*words, "--hub-model-id", "someone/adapter", "--hub-strategy", "every_save")
    assert code == 0, err
    assert made == ["someone/adapter"] and {repo for repo, _ in sent} == {"someone/adapter"}
    assert len(sent) >= 2 and all("adapter_model.safetensors" in names for _, names in sent)


# -- exit codes --------------------------------------------------------------------------------------------------------

MAIN = "from unsloth.runtime.cli import main; main()"


def started(*words: Any) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", MAIN, "train", *map(str, words)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_and_going_on(command, checkpoint, rows, tmp_path, number, code) -> None:
    words = ["--model", checkpoint, "--data", rows, "--output-dir", tmp_path / "out", "--compile", "false"]
    process = started(*words, "--max-steps", 100_000)
    assert process.stderr is not None
    said = ""
    while "step 3/" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(number)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in said
    (saved,) = checkpoints.checkpoints(tmp_path / "out")
    step = checkpoints.step_of(saved)
    assert f"stopped at step {step}: {saved}; --resume-from-checkpoint true goes on" in said
    left, _, said = command(*words, "--max-steps", step + 2, "--resume-from-checkpoint", "true")
    assert left == 0, said
    assert f"step {step + 1}/{step + 2}" in said and f"step {step}/" not in said


def test_nothing_to_resume_is_bad_input(command, checkpoint, rows, tmp_path) -> None:
    arguments = ["--model", checkpoint, "--data", rows, "--output-dir", tmp_path / "out"]
    code, out, err = command(*arguments, "--resume-from-checkpoint")
    assert (code, out) == (2, "") and f"there is no checkpoint in {tmp_path / 'out'} to resume from" in err
    code, _, err = command(*arguments, "--resume-from-checkpoint", tmp_path / "checkpoint-9")
    assert code == 2 and f"there is no checkpoint {tmp_path / 'checkpoint-9'} to resume from" in err


def test_a_run_that_fails_says_why(command, checkpoint, rows, tmp_path, monkeypatch) -> None:
    compute = training.SFTTrainer.compute_loss
    monkeypatch.setattr(
        training.SFTTrainer, "compute_loss", lambda *args, **kwargs: compute(*args, **kwargs) * math.nan
    )
    code, _, err = command(*in_few_steps(checkpoint, rows, tmp_path / "out"), "--max-steps", 9)
    assert code == 1 and "unsloth: step 3 was skipped: loss nan" in err and "Traceback" not in err
    assert err.count(f"\n  {rows}:") == 2 and "What is" in err  # its two rows, by file and line


def test_results_that_cannot_be_saved(command, checkpoint, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "plot_loss", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, _, err = command(*in_few_steps(checkpoint, rows, tmp_path / "out"))
    assert code == 1 and "the results could not be saved" in err and "No space left" in err and "Traceback" not in err
