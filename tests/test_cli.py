"""The command line prints what the functions return, and its exit codes can be relied on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import unsloth
from unsloth.compiler import explain as explaining
from unsloth.compiler import verify as verifying
from unsloth.compiler.verify import GradientError, Verification
from unsloth.models import presets
from unsloth.runtime import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``unsloth <arguments>``; returns (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unsloth", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


def test_version(command):
    assert command("--version") == (0, f"unsloth {unsloth.__version__}\n", "")


def test_env_names_versions_and_device(command):
    code, out, _ = command("env")
    assert code == 0
    assert {"unsloth", "python", "torch", "transformers", "compiler"} <= {line.split()[0] for line in out.splitlines()}


@pytest.mark.parametrize("name", [n for n in presets.SHAPES if n.startswith("tiny-")])
def test_explain_finds_every_norm_and_rotation(command, name):
    code, out, _ = command("explain", name, "--seq", "24")
    assert code == 0
    assert "1 graph, 0 breaks" in out
    total = next(line for line in out.splitlines() if line.startswith("total"))
    counts = dict(zip(total.split()[1::2], total.split()[2::2], strict=True))
    for operator in ("rms_norm", "rope", "glu"):
        hit, _, seen = counts[operator].partition("/")
        assert hit == seen != "0", out


def test_explain_prints_what_the_function_returns(command, monkeypatch):
    asked = []
    monkeypatch.setattr(
        explaining, "explain", lambda model, batch, options: asked.append((batch, options)) or "[b]x[/b]"
    )
    code, out, _ = command(
        "explain", "tiny-llama", "--batch", "3", "--seq", "7", "-o", "disable=rope,glu", "-o", "strict=true"
    )
    assert (code, out) == (0, "[b]x[/b]\n")
    ((batch, options),) = asked
    assert batch["input_ids"].shape == (3, 7)
    assert options == {"disable": ["rope", "glu"], "strict": True}


def test_explain_with_lora_trains_adapters_only(command):
    code, out, _ = command("explain", "tiny-llama", "--lora", "--dtype", "bf16")
    assert code == 0
    assert "of 155,456 parameters trained, bfloat16" in out


def test_explain_of_a_folder_without_weights(command, tmp_path):
    presets.config("tiny-qwen3").save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        code, out, _ = command("explain", str(path))
        assert code == 0
        assert out.startswith("Qwen3ForCausalLM")


def test_explain_writes_a_page_and_json(command, tmp_path):
    page, facts = tmp_path / "new" / "page.html", tmp_path / "facts.json"
    code, out, _ = command("explain", "tiny-llama", "--seq", "8", "--packed", "--html", str(page), "--json", str(facts))
    assert code == 0 and "attention" in out
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(facts.read_text())["graphs"] == 1


@pytest.mark.parametrize("shape", ["packed", "padded"])
def test_batches_take_the_shape_that_is_asked_for(command, monkeypatch, shape):
    asked = []
    good = Verification(True, 1.0, 1.0, None, [], 1e-4)
    monkeypatch.setattr(verifying, "verify", lambda model, batch, options: asked.append(batch) or good)
    assert command("verify", "tiny-llama", "--seq", "8", f"--{shape}")[0] == 0
    (batch,) = asked
    assert ("position_ids" in batch, "attention_mask" in batch) == (shape == "packed", shape == "padded")


def test_a_batch_is_packed_or_padded(command):
    code, out, err = command("verify", "tiny-llama", "--packed", "--padded")
    assert code == 2 and "not both" in err and out == ""


def test_verify(command):
    code, out, _ = command("verify", "tiny-llama", "--seq", "16", "-o", "lowering=eager")
    assert code == 0
    assert out.startswith("same training step")


def test_verify_fails_with_exit_code_1(command, monkeypatch):
    bad = Verification(False, 2.0, 1.0, None, [GradientError("w", 0.5, 0.0)], 1e-4, first_deviation="pass rope")
    monkeypatch.setattr(verifying, "verify", lambda *args, **kwargs: bad)
    assert command("verify", "tiny-llama") == (1, f"{bad}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-lama"], "did you mean 'tiny-llama'?"),
        (["./nowhere"], "is no folder with a config.json"),
        (["somebody/no-such-model"], "cannot load 'somebody/no-such-model'"),
        (["tiny-llama", "--device", "gpu"], "no device 'gpu'"),
        (["tiny-llama", "-o", "lowring=eager"], "did you mean 'lowering'?"),
        (["tiny-llama", "-o", "strict"], "is not NAME=VALUE"),
        (["tiny-llama", "--dtype", "fp8"], "fp8"),
        (["tiny-llama", "--batch", "0"], "--batch"),
        ([], "MODEL"),
    ],
)
def test_a_wrong_question_is_answered(command, arguments, message):
    code, out, err = command("explain", *arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_plan_prints_what_the_function_returns(command, monkeypatch, tmp_path):
    import unsloth.runtime.plan as planning

    asked = {}

    class Answer:
        fits = False

        def __str__(self):
            return "peak 3 GiB"

        def to_dict(self):
            return {"peak": 3}

        def draw(self, path):
            path.write_bytes(b"png")

    monkeypatch.setattr(planning, "plan", lambda model, **given: asked.update(given, model=model) or Answer())
    words = ["--budget", "2GiB", "--seq", "64", "--lora-r", "0", "--host-memory", "8GiB"]
    words += ["--png", str(tmp_path / "a" / "p.png")]
    code, out, _ = command("plan", "tiny-llama", *words, "--json", str(tmp_path / "p.json"))
    assert (code, out) == (1, "peak 3 GiB\n")  # it does not fit
    assert asked == {
        "model": "tiny-llama",
        "batch": 1,
        "seq": 64,
        "budget": "2GiB",
        "device_memory": None,
        "host_memory": "8GiB",
        "device": "H100",
        "lora_r": None,
        "quantization": "none",
    }
    assert (tmp_path / "a" / "p.png").read_bytes() == b"png"
    assert json.loads((tmp_path / "p.json").read_text()) == {"peak": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-lama"], "did you mean 'tiny-llama'?"),
        (["tiny-llama", "--budget", "24 Gibs"], "did you mean 24 GiB?"),
        (["tiny-llama", "--quantization", "int8"], "'nf4' or 'none'"),
    ],
)
def test_a_wrong_question_to_plan_is_answered(command, arguments, message):
    code, out, err = command("plan", *arguments)
    assert (code, out) == (2, "") and message in err


def test_a_folder_without_config(command, tmp_path):
    code, _, err = command("explain", str(tmp_path))
    assert code == 2
    assert "has no config.json" in err


def test_interrupt(command, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(explaining, "explain", interrupted)
    assert command("explain", "tiny-llama")[0] == 130


def test_a_bug_is_not_called_a_wrong_question(monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(explaining, "explain", broken)
    monkeypatch.setattr(sys, "argv", ["unsloth", "explain", "tiny-llama"])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_readme_shows_what_is_printed(command):
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (shown,) = re.findall(r"```console\n\$ unsloth explain (\S+)\n(.*?)```", readme, re.DOTALL)
    _, printed, _ = command("explain", shown[0])
    assert _comparable(printed) == _comparable(shown[1])


def _comparable(text: str) -> list[str]:
    """Without what changes from run to run and with transformers' versions: times and line numbers."""
    lines = [re.sub(r"\.py:\d+", ".py", line) for line in text.strip().splitlines()]
    return [line for line in lines if not line.startswith("time")]
