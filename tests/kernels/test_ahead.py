"""Kernels compiled beforehand are those that launches want: nothing is compiled a second time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx

from unsloth.kernels.ahead import compile_ahead

CODE = """
import json
from concurrent.futures import ThreadPoolExecutor

import torch, triton
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.runtime.jit import JITFunction

from tests.kernels.compile_for_cards import Card
from unsloth.kernels import low_rank_product, rows
from unsloth.kernels.ahead import kernels_of
from unsloth.kernels.glu import swiglu
from unsloth.kernels.launch import collecting
from unsloth.kernels.rms_norm import rms_norm

triton.runtime.driver.set_active(Card)
low_rank_product._is_hopper = lambda device: True
low_rank_product._multiprocessors = rows._processors = lambda device: 132
compiled = []
compile_, launch = JITFunction._do_compile, JITFunction.run
JITFunction._do_compile = lambda self, *args: compiled.append(self.__name__) or compile_(self, *args)

graph, mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())

def value(*shape):
    node = graph.placeholder(f"v{len(graph.nodes)}")
    with mode:
        node.meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return node

x, weight = value(2, 64, 512), value(512)
norm = (weight, 1e-5, 0.0, True)
for i in range(3):  # layers
    graph.call_function(rms_norm.overload, (x, *norm))
graph.call_function(swiglu.launch[swiglu.overload_backward], (x, x, x, [True, True]))
varying = value(2, 64, 512)
varying.meta["val"] = mode.from_tensor(torch.empty(2, 64, 512))  # of symbolic sizes, known in this batch
assert isinstance(varying.meta["val"].shape[1], torch.SymInt)
graph.call_function(rms_norm.overload, (varying, *norm))
unknown = value(2, 64, 512)
with mode:
    unknown.meta["val"] = torch.empty(mode.shape_env.create_unbacked_symint(), 512, dtype=torch.float64)
graph.call_function(rms_norm.overload, (unknown, *norm))

pending = kernels_of([graph], "cpu")
found = [len(pending), len(compiled), len(kernels_of([graph], "cpu"))]
a, b, p, q = (torch.zeros(s, dtype=torch.bfloat16) for s in ((128, 512), (256, 512), (128, 16), (256, 16)))
with FakeTensorMode() as own, collecting() as more:
    fakes = [own.from_tensor(t) for t in (a, b, p, q)]
    low_rank_product.low_rank_product(fakes[0], fakes[1].T, fakes[2], fakes[3].T)
pending += more.values()
with ThreadPoolExecutor(2) as pool:
    for kernel in pending:
        kernel.start(pool)
for kernel in pending:
    kernel.wait()
ahead = sorted(compiled)

JITFunction.run = lambda self, *args, grid, warmup, **kwargs: (
    launch(self, *args, grid=grid, warmup=True, **kwargs) and None
)
x, weight = torch.zeros(2, 64, 512, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
rms_norm.forward(x, weight, 1e-5, 0.0, True)
rms_norm.forward(x.float(), weight, 1e-5, 0.0, True)
swiglu.backward(x, x, x, [True, True])
low_rank_product.low_rank_product(a, b.T, p, q.T)
print(json.dumps([found, ahead, sorted(compiled)]))
"""

EVERY = """
import json

import torch, triton
from torch._subclasses import FakeTensorMode
from triton.runtime.jit import JITFunction

from tests.kernels import compile_for_cards as cards
from unsloth.kernels import low_rank_product, reasons, thin_products
from unsloth.kernels.launch import collecting

triton.runtime.driver.set_active(cards.Card)
low_rank_product._multiprocessors = thin_products._multiprocessors = lambda device: 132
low_rank_product._is_hopper = lambda device: True
reasons._capability = lambda device: (9, 0)
asked = []
JITFunction._do_compile = lambda self, key, *args, **kwargs: asked.append([self.__name__, str(key)])
launch = JITFunction.run
JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launch(self, *args, grid=grid, warmup=True, **kwargs)

found = {}
for sample in (cards.norms, cards.gates, cards.rotation, cards.weights, cards.products, cards.thin):
    with FakeTensorMode(), collecting() as pending:
        sample(torch.bfloat16, 64)
    for kernel in pending.values():
        kernel.compile()
    ahead = list(asked)
    asked.clear()
    sample(torch.bfloat16, 64)
    found[sample.__name__] = [sorted(ahead), sorted(asked)]
    asked.clear()
print(json.dumps(found))
"""


def _said(code: str, cache: Path) -> Any:
    """What a process without Triton's interpreter prints last."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_asked_for_as_it_is_launched(tmp_path: Path) -> None:
    """By Triton's own key: argument types, alignments, constants and options. Nothing is compiled."""
    found = _said(EVERY, tmp_path)
    assert len(found) == 6
    for name, (ahead, launched) in found.items():
        assert ahead, name
        assert ahead == launched, name


def test_what_is_compiled_ahead_is_what_launches_want(tmp_path: Path) -> None:
    found, ahead, afterwards = _said(CODE, tmp_path)
    assert found == [3, 0, 0]  # each once, nothing yet, and nothing that is asked for already
    assert ahead == ["_descriptor_kernel", "_forward_kernel", "_forward_kernel", "_glu_backward_kernel"]
    assert afterwards == ahead


def test_without_a_gpu_nothing_is_compiled() -> None:
    if not torch.cuda.is_available():
        assert compile_ahead([fx.Graph()]) == 0
