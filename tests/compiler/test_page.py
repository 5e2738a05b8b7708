"""`explain` as a dictionary, as JSON and as one HTML page that needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import logging
import traceback
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch._dynamo.output_graph import GraphCompileReason

from unsloth import Explanation, explain
from unsloth.compiler import breaks
from unsloth.compiler.breaks import explain_break
from unsloth.compiler.report import GraphReport
from unsloth.models import presets
from unsloth.passes.runner import PassReport, Site


@pytest.fixture(scope="module")
def mistral() -> Explanation:
    ids = torch.randint(1, 100, (2, 32), generator=torch.Generator().manual_seed(0))
    return explain(presets.build("tiny-mistral"), {"input_ids": ids, "labels": ids})


class Reader(HTMLParser):
    """Collects text, attributes, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_self_contained(mistral: Explanation) -> None:
    page = mistral.to_html()
    reader = Reader(page)
    assert not reader.open and page.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_page_says_what_the_text_says(mistral: Explanation) -> None:
    text = " ".join(Reader(mistral.to_html()).text.split())
    for said in (
        "MistralForCausalLM, all parameters trained, float32", "1 graph, 0 breaks", "5/5", "norm", "half rotation",
        "causal ∧ window 16", "unsloth's attention", "loss_utils.py:", "not applicable",
        "options={\"logits\": \"drop\"}", "capture", "passes", "dynamo",
    ):  # fmt: skip
        assert said in text, said
    layers = [row for row, _ in mistral.to_dict()["layers"]]
    assert layers == ["0", "1", "other"]  # a row per layer, none shared


def test_json_is_the_dictionary(mistral: Explanation) -> None:
    facts = json.loads(mistral.to_json())
    assert facts["graphs"] == 1 and facts["coverage"]["places"]["norm"] == [5, 5]
    assert (
        facts["coverage"]["flops"]["fused"] + facts["coverage"]["flops"]["library"]
        <= facts["coverage"]["flops"]["total"]
    )
    (miss,) = facts["missed"]
    assert miss["operator"] == "linear_cross_entropy" and miss["how_far"] > 0 and len(miss["modules"]) == 1
    assert facts["masks"] == [
        {"mask": "causal ∧ window 16", "kernel": "unsloth's attention", "proven": True, "count": 2}
    ]


def test_what_nothing_comes_close_to_is_named() -> None:
    class Softmax(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            layer_norm = torch.nn.functional.layer_norm(y, (4,))
            return (torch.softmax(y @ y.mT, -1) @ y + torch.rms_norm(y, (4,)) + layer_norm).square().sum()

    explanation = explain(Softmax(4, 4), (torch.ones(1, 2, 4),), options={"disable": ["attention", "rms_norm"]})
    assert [(p.family, (p.source_line or "")[:13]) for p in explanation.unexplained] == [
        ("attention", "test_page.py:"),
        ("norm", "test_page.py:"),
    ]
    assert "left        norm in graph: no formula of ours comes close  (test_page.py:" in str(explanation)
    assert "left        1 layer norm: left to Inductor" in str(explanation)
    assert "Left as they are" in explanation.to_html()


def test_an_explanation_does_not_change(mistral: Explanation) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        mistral.model = "another"  # type: ignore[misc]


def test_what_comes_from_a_model_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    site = Site("rms_norm", f"model.{evil}", f"{evil}.py:1", evil, 3)
    report = GraphReport(passes=[PassReport("rms_norm", missed=[site], error=evil)], fallback=evil)
    page = Explanation(evil, (report,), (explain_break(evil),)).to_html()
    assert evil not in page and page.count("&lt;script&gt;") >= 5
    assert Reader(page).text.count("alert(1)") >= 5


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("logging.Logger method not supported for non-export cases", "ignore_logging_functions"),
        ("Tensor.requires_grad_() on an intermediate", "enable_input_require_grads"),
        ("Unsupported Tensor.item() call with capture_scalar_outputs=False", "capture_scalar_outputs"),
        ("Dynamic shape operator\n  Explanation: aten.nonzero", "capture_dynamic_output_shape_ops"),
        ("Data-dependent branching", "torch.where"),
        ("something nobody has seen", "TORCH_LOGS=graph_breaks"),
        ("", "TORCH_LOGS=graph_breaks"),
    ],
)
def test_breaks_have_a_remedy(reason: str, remedy: str) -> None:
    found = explain_break(reason)
    assert remedy in found.remedy and "\n" not in found.cause and found.cause


def test_a_break_is_explained_with_its_remedy() -> None:
    class Branching(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return (y if y.sum() > 0 else -y).sum()

    explanation = explain(Branching(4, 4), (torch.ones(2, 4),))
    (found,) = explanation.breaks
    assert "torch.where" in found.remedy
    assert (found.source_line or "").startswith("test_page.py:")
    assert f"break       {found.cause}  ({found.source_line})\n            → {found.remedy}" in str(explanation)


LOGGER = logging.getLogger(__name__)


def test_a_break_has_the_line_of_the_model() -> None:
    class Logging(torch.nn.Linear):
        def forward(self, x):
            LOGGER.warning("deliberate")
            return super().forward(x).sum()

    (found,) = explain(Logging(4, 4), (torch.ones(2, 4),)).breaks
    assert "logg" in found.cause.lower() and "ignore_logging_functions" in found.remedy
    assert (found.source_line or "").startswith("test_page.py:")


def test_a_break_in_the_middle_of_a_statement_is_one_break() -> None:
    stack = [traceback.FrameSummary("/home/me/model.py", 3, "forward"), traceback.FrameSummary("/x/torch/a.py", 1, "b")]
    ended = [GraphCompileReason("step_unsupported", stack, graph_break=False)]
    (found,) = breaks._distinct(["logging.Logger method\n  Hint: none"], ended)
    assert (found.cause, found.source_line) == ("logging.Logger method", "model.py:3")
    (alone,) = breaks._distinct([], ended)
    assert alone.cause == "step_unsupported"


def test_the_time_of_every_stage() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())

    def loss(x):
        return model(x).sum()

    wrapped = torch.nn.Module()
    wrapped.inner, wrapped.forward = model, loss
    seconds = explain(wrapped, (torch.ones(2, 4),), options={"lowering": "inductor", "strict": True}).seconds
    assert list(seconds)[:3] == ["dynamo", "capture", "passes"]
    assert {"joint trace", "partition", "inductor"} <= set(seconds) and min(seconds.values()) > 0
