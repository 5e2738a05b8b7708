"""Two GPUs of one machine train as one does on the batch of both. Skips without two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.test_two_processes import TWO, assert_weights, launch, make, of_both, results

MODES = {"eager": {"compile": False}, "compiled": {"options": {"strict": True}}}
ONE_BATCH = 4  # rows of a micro-batch, of all processes together


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What came of one process and of two, by mode."""
    if torch.cuda.device_count() < 2 or not torch.distributed.is_nccl_available():
        pytest.skip("needs two CUDA devices and NCCL")
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    return {
        # With both in sight, transformers would spread one process's batch over them.
        "one": launch(__file__, folders[0], CUDA_VISIBLE_DEVICES="0"),
        "two": launch(__file__, folders[1], *TWO),
    }


@pytest.mark.parametrize("mode", MODES)
def test_as_one_gpu_on_the_batch_of_both(found, mode) -> None:
    one, two = found["one"][mode], found["two"][mode]
    assert one["devices"] == ["cuda:0"] and two["devices"] == ["cuda:0", "cuda:1"]
    assert len(one["loss"]) == 4 and all(norm > 0 for norm in one["norm"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert_weights(two, one, 1e-4, 1e-6)
    for each in (one, two):
        assert each["breaks"] == 0 and (1 <= each["graphs"] <= 2) == (mode == "compiled")


@pytest.mark.parametrize("processes", ["one", "two"])
def test_compiled_as_eager(found, processes) -> None:
    eager, compiled = found[processes]["eager"], found[processes]["compiled"]
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    assert compiled["norm"] == pytest.approx(eager["norm"], rel=1e-3)


def main(folder: Path) -> None:
    """One of the processes."""
    found: dict[str, Any] = {}
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's; the trainer makes the process group
    rows = ONE_BATCH // processes
    for mode, more in MODES.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        made = make(folder / mode, more, use_cpu=False, save_strategy="no", per_device_train_batch_size=rows)
        made.train()
        device = str(made.args.device)
        found[mode] = {**results(made), "devices": of_both(device) if processes > 1 else [device]}
    if processes == 1 or torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(found))
    if processes > 1:
        assert "cuda:nccl" in torch.distributed.get_backend_config()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
