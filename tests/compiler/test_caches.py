"""A second process finds what the first one compiled, and never what was compiled under other circumstances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unsloth.compiler.inline import InlineReferences
from unsloth.kernels.glu import swiglu

_STEP = """
import json, sys
import torch
from torch.nn.functional import linear, silu
from torch._dynamo.utils import counters

def loss(x, gate, up, weight):
    x = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    return (silu(linear(x, gate)) * linear(x, up)).square().sum()

found = []
for options in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    tensors = [torch.randn(4, 8), *(torch.randn(s, requires_grad=True) for s in ((16, 8), (16, 8), (8,)))]
    compiled = torch.compile(loss, backend="unsloth", options={"strict": True, **options})
    compiled(*tensors).backward()
    ours = [t.grad for t in tensors[1:]]
    eager = torch.autograd.grad(loss(*tensors), tensors[1:])
    torch.testing.assert_close(ours, list(eager))
    found.append({**counters["aot_autograd"], **counters["inductor"]})
print(json.dumps(found))
"""


ENABLED = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
OTHERS = {"budget": {"memory_budget": 0}, "passes": {"disable": ["rms_norm"]}}


def _in_a_process(script: str, argument: object, caches: Path) -> Any:
    """What a script prints last, as JSON; it is given the argument so, and caches of its own folder."""
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(argument)],
        env={**os.environ, **ENABLED, "TORCHINDUCTOR_CACHE_DIR": str(caches)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, int]]]:
    """PyTorch's counters for each step of two processes that share a cache: one step, then the same and others."""
    folder = tmp_path_factory.mktemp("caches")

    def run(*options: dict[str, object]) -> list[dict[str, int]]:
        return _in_a_process(_STEP, options, folder)

    return [run({}), run({}, *OTHERS.values())]


def test_the_second_process_compiles_nothing(processes) -> None:
    (cold,), (warm, *_) = processes
    assert cold["autograd_cache_miss"] == 1 and cold["autograd_cache_saved"] == 1 and cold["fxgraph_cache_miss"] == 2
    assert warm["autograd_cache_hit"] == 1 and "autograd_cache_bypass" not in {**cold, **warm}
    assert warm["fxgraph_cache_hit"] == 2 and "fxgraph_cache_miss" not in warm


@pytest.mark.parametrize("options", OTHERS)
def test_other_options_find_nothing(processes, options: str) -> None:
    other = processes[1][1 + list(OTHERS).index(options)]
    assert other["autograd_cache_miss"] == 1 and "autograd_cache_hit" not in other


def test_a_kernel_that_is_switched_off_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = InlineReferences().uuid()
    monkeypatch.setattr(swiglu, "disabled", "deliberate")
    assert InlineReferences().uuid() != before


_PLANNED = """
import json, sys
import torch
from torch._dynamo.utils import counters
from unsloth.compiler.options import Options
from unsloth.compiler.run import compiled

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = torch.nn.Embedding(16, 32), torch.nn.Linear(32, 32)

    def forward(self, ids):
        return torch.tanh(self.layer(torch.tanh(self.layer(self.table(ids))))).square().sum()

found = []
for length in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    reports, ids = [], torch.ones(2, length, dtype=torch.long)
    torch._dynamo.mark_dynamic(ids, 1)
    compiled(Model(), Options.parse({"memory_budget": "64MiB"}), reports)(ids).backward()
    (report,) = reports
    plan = report.partitioner.last_plan
    found.append([plan.tokens, plan.limit, plan.peak_bytes, sorted(plan.kept), counters["aot_autograd"]])
print(json.dumps(found))
"""


def test_a_graph_comes_with_what_it_was_planned_for(tmp_path: Path) -> None:
    """Its prediction and its guard; a batch of another size first is planned for anew, though its graph is the same."""

    def run(*lengths: int) -> list[tuple[list[object], dict[str, int]]]:
        return [(plan, counts) for *plan, counts in _in_a_process(_PLANNED, lengths, tmp_path)]

    ((cold, counts),) = run(48)
    assert counts["autograd_cache_miss"] == 1 and cold[0] == 96 and cold[1] > 96 and cold[3]
    (warm, counts), (other, others) = run(48, 80)
    assert counts["autograd_cache_hit"] == 1 and warm == cold
    assert others["autograd_cache_miss"] == 1 and other[0] == 160 and other[2] > cold[2]
