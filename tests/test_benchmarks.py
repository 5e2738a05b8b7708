"""The harness: rows are measured, kept, resumed, and failures are rows; the README shows what was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks import profiled, step, suites, table, vision_shapes, worker
from unsloth.models.parts import places
from unsloth.models.presets import SHAPES

TINY = ["--shape", "tiny-llama", "--batch", "2", "--seq", "16", "--device", "cpu", "--steps", "2", "--warmup", "1"]


def run(path: Path, systems: str, *more: str) -> list[dict[str, Any]]:
    step.main([*TINY, "--out", str(path), "--systems", systems, *more])
    return step.read(path)


def test_rows_are_measured_resumed_and_equal_in_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    rows = run(path, "hf,ours:lowering=eager:logits=drop")
    assert [r.get("error") for r in rows] == [None, None], rows
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["first_step_s"] > 0 and row["grad_norm"] > 0
        assert len(row["losses"]) == 5 and row["device"] == "cpu" and row["versions"]["torch"]
        assert row["command"].startswith("python -m benchmarks.step") and row["date"]
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-5)
    assert rows[0]["losses"][-1] < rows[0]["losses"][0]

    def never(*_: Any) -> Any:
        raise AssertionError("a row that is there was measured again")

    monkeypatch.setattr(step, "measure", never)
    assert run(path, "hf,ours:lowering=eager:logits=drop") == rows


def test_systems_are_checked_against_float32(tmp_path: Path) -> None:
    rows = run(tmp_path / "rows.json", "float32,hf")
    assert [r.get("error") for r in rows] == [None, None], rows
    assert step.deviations(rows) == [] and step.deviations(rows[1:]) == []
    losses, norm = rows[1]["losses"], rows[1]["first_grad_norm"]
    wrong = {**rows[1], "losses": [losses[0] * 1.002, *losses[1:]], "first_grad_norm": float("nan")}
    loss, gradient = step.deviations([rows[0], wrong])
    assert loss.startswith("hf: loss of the first step") and gradient.startswith("hf: grad_norm")
    assert step.deviations([rows[0], {**rows[1], "first_grad_norm": norm * 1.03}]) != []


@pytest.mark.parametrize("shape", ["tiny-qwen2.5-vl", "tiny-llama-vision"])
def test_models_of_images_are_measured_and_equal_in_loss(tmp_path: Path, shape: str) -> None:
    rows = run(tmp_path / "rows.json", "hf,ours:lowering=eager:logits=drop:strict=true", "--shape", shape)
    assert [r.get("error") for r in rows] == [None, None], rows
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-5)
    assert rows[0]["trained_parameters"] == rows[1]["trained_parameters"] > 0


@pytest.mark.parametrize("shape", vision_shapes.SHAPES)
def test_adapters_are_on_every_layer_of_language_model_and_tower(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(vision_shapes.config(shape))
    layers = {name: place.part for name, place in places(model).items()}
    adapted = {name for name in layers if re.fullmatch(vision_shapes.SHAPES[shape].adapted, name)}
    assert adapted == {name for name, part in layers.items() if part != "projector" and "merger" not in name}


@pytest.mark.parametrize(("shape", "tokens"), [("qwen2.5-vl-7b", 37 * 37 + 2), ("llama-3.2-11b-vision", 1)])
def test_an_image_counts_as_the_tokens_that_stand_for_it(shape: str, tokens: int) -> None:
    made = vision_shapes.batch(shape, 2, 512, torch.bfloat16)
    assert made["input_ids"].shape == (2, 512 + tokens) and made["pixel_values"].dtype == torch.bfloat16
    assert ((made["labels"] == -100).sum(1) == tokens).all()


def test_a_failure_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    (row,) = run(path, "ours:lowering=nonsense")
    assert "lowering cannot be 'nonsense'" in row["error"] and row["log"]
    assert "failed" in step.table([row])
    (row,) = run(path, "ours:lowering=nonsense", "--limit", "1")
    assert row["error"] == "not done after 1 s"


def test_an_interrupted_write_leaves_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    step.write(path, [{"system": "hf"}])
    monkeypatch.setattr(step.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        step.write(path, [])
    assert step.read(path) == [{"system": "hf"}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("our", "unknown system 'our'"),
        ("hf:logits=drop", "hf takes no options"),
        ("ours:logits", "an option is written name=value"),
    ],
)
def test_bad_systems_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step.parse_system(name)


def test_variants_carry_their_options() -> None:
    assert step.parse_system("ours:disable=rope+glu:memory_budget=0:strict=true") == (
        "ours",
        {"disable": ["rope", "glu"], "memory_budget": 0, "strict": True},
    )


def test_a_suite_measures_its_workloads_into_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [suites.Work(name, "tiny-llama", "lora", 2, seq, ("hf",)) for name, seq in (("short", 16), ("long", 32))]
    monkeypatch.setitem(suites.SUITES, "tiny", tuple(tiny))
    monkeypatch.setattr(step, "RESULTS", tmp_path)
    monkeypatch.setattr(step, "measure", measured := Recorded())
    command = ["--suite", "tiny", "--device", "cpu", "--card", "card"]
    step.main([*command, "--only", "long"])
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-llama-lora-2x32-card.json"]
    step.main(command)
    assert [(name, args.seq) for name, args in measured.calls] == [("hf", 32), ("hf", 16)]  # each once


class Recorded:
    """Stands in for a measurement, whose arguments it keeps."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __call__(self, name: str, args: Any, *_: Any) -> dict[str, Any]:
        self.calls.append((name, args))
        system, options = step.parse_system(name)
        workload = {n: getattr(args, n) for n in step.WORKLOAD} | {"options": options}
        row = {"tokens_per_s": 1.0, "ms_median": 1.0, "first_step_s": 1.0, "losses": [1.0], "grad_norm": 1.0}
        return {"system": system, "workload": workload, **row, "peak_allocated_gib": None, "peak_reserved_gib": None}


@pytest.mark.parametrize("suite", suites.SUITES)
def test_suites_name_what_there_is(suite: str) -> None:
    for work in suites.SUITES[suite]:
        assert work.shape in {**SHAPES, **vision_shapes.SHAPES} and work.mode in ("lora", "qlora", "full")
        for system in work.systems:
            step.parse_system(system)


def test_every_committed_result_says_where_it_is_from() -> None:
    for path in step.RESULTS.glob("*.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert row["command"] and row["date"], path
            assert "error" in row or (row["device"] and row["versions"]["torch"] and row["grad_norm"] > 0), path


def test_the_readme_shows_the_committed_results() -> None:
    text = table.README.read_text()
    assert table.updated(text, table.tables()) == text, "run python -m benchmarks.table"
    with pytest.raises(ValueError, match="has no"):
        table.updated("nothing", "")


def test_ratios_compare_like_with_like() -> None:
    def row(system: str, speed: float, memory: float, **work: Any) -> dict[str, Any]:
        workload = {"shape": "s", "mode": "lora", "batch": 1, "seq": 8, "checkpointing": "none", "options": {}} | work
        made = {"system": system, "workload": workload, "device": "card"}
        return made | {"tokens_per_s": speed, "peak_allocated_gib": memory}

    rows = [row("ours", 1200, 9), row("recorded", 1500, 9), row("hf", 500, 30), row("liger", 1000, 10)]
    rows += [row("ours", 900, 4, options={"memory_budget": "4GiB"}), row("hf", 600, 5, checkpointing="hf")]
    _, _, free, saved = table.ratios([rows]).splitlines()
    assert free == "| s lora, 1×8 tokens, card | 1,500 | liger | 1.50 × | 0.90 × |"
    assert saved == "| s lora, 1×8 tokens, memory saved, card | 900 | hf:checkpointing=hf | 1.50 × | 0.80 × |"


def test_systems_at_one_time_are_timed_alone(tmp_path: Path) -> None:
    rows = run(tmp_path / "rows.json", "hf,ours:lowering=eager", "--parallel", "2")
    assert [r.get("error") for r in rows] == [None] * 2, rows
    assert {r["system"] for r in rows} == {"hf", "ours"}
    assert all(0 < r["first_step_s"] < 120 for r in rows)


def test_a_stopped_worker_does_not_count_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[worker.Turns.__module__], "SETTLING", 0.2)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        (tmp_path / f"{other.pid}.pid").touch()
        turns = worker.Turns(tmp_path)
        started = time.perf_counter()
        with turns.alone():
            assert _state(other.pid) == "T"  # stopped
        ended = time.perf_counter()
        assert _state(other.pid) == "R"
        assert 0.2 <= turns.stopped(started, ended) <= ended - started
        assert turns.stopped(ended, ended + 1) == 0
    finally:
        other.kill()
        other.wait()


def test_a_profile_says_which_copies_arithmetic_waits_for() -> None:
    kernels = [
        ("mm", 0, 10_000, 7),
        ("glu", 15_000, 20_000, 7),
        ("DtoH", 2_000, 12_000, 9),
        ("DtoH", 16_000, 17_000, 9),
    ]
    first, second, pause = profiled.streams(profiled.Kernel(*k) for k in kernels).splitlines()
    assert first == "stream 7: busy 15.0 of 20.0 ms, idle 5.0"
    assert second == "stream 9: busy 11.0 ms from 2.0 to 17.0, 2.0 in pauses of the first; DtoH"
    assert pause.split() == ["pause", "5.00", "ms", "at", "10.0,", "after", "mm,", "before", "glu"]
    assert profiled.streams([]) == "nothing ran on the device"


def test_a_profile_is_split_by_what_kernels_compute() -> None:
    kernels = [
        ("nvjet_tst_128x256_64x4_TNT", 0, 400),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", 500, 700),
        ("_descriptor_kernel", 650, 750),  # beside the one before
        ("_glu_forward_kernel", 750, 800),
    ]
    parts = profiled.split(profiled.Kernel(name, start, end) for name, start, end in kernels)
    times = {"products_ms": 0.5, "attention_ms": 0.2, "rest_ms": 0.05, "idle_ms": 0.1, "span_ms": 0.8}
    assert parts == pytest.approx({**times, "kernels": 4})
    row = {"system": "ours", "workload": {"options": {}, "checkpointing": "none"}, "tokens_per_s": 1.0, "losses": [1.0]}
    row |= {"ms_median": 1.0, "first_step_s": 1.0, "peak_allocated_gib": None, "peak_reserved_gib": None}
    text = step.table([row | {"profile": parts, "floor": {"products_ms": 0.4, "attention_ms": 0.1}}])
    assert "0.8 ms in 4 kernels: products 0.5 (floor 0.4), attention 0.2 (floor 0.1), rest 0.1, idle 0.1" in text


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
