"""Where layers sit and what they do, in models of several structures, none of which takes memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from unsloth.models import presets
from unsloth.models.parts import Place, expression, outer_parts, places, targets
from unsloth.models.source import ModelError


def layout(kind: str, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings))


@pytest.mark.parametrize(
    ("kind", "outside"),
    [
        ("llava", {"model.vision_tower": "vision", "model.multi_modal_projector": "projector"}),
        ("idefics3", {"model.vision_model": "vision", "model.connector": "projector"}),
        ("qwen2_vl", {"model.visual": "vision"}),
        ("git", {"git.image_encoder": "vision"}),  # where the tower lies inside of the language model's body
    ],
)
def test_towers_lie_beside_the_language_model(kind, outside):
    model = layout(kind)
    assert outer_parts(model) == outside
    found = places(model)
    assert not any(name.startswith("lm_head") for name in found)
    assert {(place.part, place.role) for place in found.values()} >= {
        ("vision", "attention"), ("vision", "mlp"), ("language", "attention"), ("language", "mlp")
    }  # fmt: skip


def test_roles_are_told_by_heads_and_not_by_names():
    class Mixing(nn.Module):
        def __init__(self, heads: int | None) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            if heads:
                self.n_heads = heads

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 4)
            blocks = [nn.ModuleDict({"first": Mixing(2), "second": Mixing(None)}) for _ in range(2)]
            self.blocks = nn.ModuleList(blocks)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    found = places(Body())
    assert found["blocks.1.first.inner"] == Place("language", "attention")
    assert found["blocks.1.second.inner"] == Place("language", "mlp")


def test_a_language_model_has_nothing_outside():
    assert outer_parts(presets.build("tiny-llama")) == {}


@pytest.mark.parametrize(
    ("settings", "there", "not_there"),
    [
        ({"vision": False}, {"language_model", "self_attn", "mlp"}, {"vision_tower", "projector"}),
        ({"language": False}, {"vision_tower", "projector", "self_attn", "mlp"}, {"language_model"}),
        ({"mlp": False}, {"vision_tower", "language_model", "self_attn"}, {"mlp", "projector"}),
        ({"attention": False}, {"vision_tower", "language_model", "projector", "mlp"}, {"self_attn"}),
        ({"layers": [1], "vision": False}, {"layers.1."}, {"layers.0.", "layers.2."}),
        ({"names": ["q_proj"]}, {"vision_tower", "language_model", "q_proj"}, {"k_proj", "mlp"}),
    ],
)
def test_targets(settings, there, not_there):
    model = layout("llava")
    pattern = targets(model, **settings)
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert all(any(part in name for name in names) for part in there)
    assert not any(part in name for name in names for part in not_there)
    assert len(pattern) < 1000 and all(isinstance(model.get_submodule(name), nn.Linear) for name in names)


def test_nothing_left_is_said():
    with pytest.raises(ModelError, match="leave nothing to train"):
        targets(layout("llava"), attention=False, mlp=False)


def test_an_expression_takes_no_other_name():
    assert expression(["a.0.q", "a.1.q"], ["a.0.k"]) == r"a\.\d+\.q"
    assert expression(["a.0.q"], ["a.1.q"]) == r"a\.0\.q"
