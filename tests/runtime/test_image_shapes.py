"""Images of random sizes: few graphs, eager's gradients, and a tower that is left alone where it computes otherwise."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from benchmarks import sweep_worker
from benchmarks.pictures import image_token
from tests.passes.recognising import LENGTH, assert_rewrites
from unsloth.compiler.options import Options
from unsloth.compiler.report import GraphReport
from unsloth.compiler.run import compiled, sizes_in_graph
from unsloth.passes.recognise.attention import Attention
from unsloth.runtime.image_shapes import PACKED, ImageShapes, packed_attention, state_sizes

BATCHES, GRAPHS, ROWS = 50, 4, 2
COMPARED = 10
"""Of the batches; each takes a step in eager as well."""


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _text(model: nn.Module, lengths: list[int], seed: int) -> dict[str, Any]:
    """Rows of text of a random length, in each of them an image of so many tokens, padded by more text."""
    length = random.Random(1000 + seed).randint(5, 40) + max(lengths)
    ids = torch.randint(32, 100, (ROWS, length), generator=torch.Generator().manual_seed(seed))
    place = torch.zeros(ROWS, length, dtype=torch.bool)
    for row, tokens in enumerate(lengths):
        place[row, 2 : 2 + tokens] = True
    ids[place] = image_token(model.config)
    batch = {"input_ids": ids, "labels": ids.masked_fill(place, -100), "attention_mask": torch.ones_like(ids)}
    return {**batch, "mm_token_type_ids": place.int(), "use_cache": False}


def _patches(model: nn.Module, seed: int) -> dict[str, Any]:
    """As Qwen2.5-VL takes images: the patches of all of them in one row, and their grid."""
    draw, patch = random.Random(seed), model.config.vision_config.patch_size  # type: ignore[union-attr]
    grid = torch.tensor([[1, 2 * draw.randint(1, 5), 2 * draw.randint(1, 5)] for _ in range(ROWS)])
    count = int(grid.prod(-1).sum())
    pixels = torch.randn(count, 2 * 3 * patch**2, generator=torch.Generator().manual_seed(seed))
    return {**_text(model, (grid.prod(-1) // 4).tolist(), seed), "pixel_values": pixels, "image_grid_thw": grid}


def _patches_by_rows(model: nn.Module, seed: int) -> dict[str, Any]:
    """As PaddleOCR-VL takes them: each patch with its colours and sides apart, row after row of its image."""
    batch, side = _patches(model, seed), model.config.vision_config.patch_size  # type: ignore[union-attr]
    return {**batch, "pixel_values": batch["pixel_values"].view(-1, 2, 3, side, side)[:, 0]}


def _squares(model: nn.Module, seed: int) -> dict[str, Any]:
    """As Idefics 3 takes them: a list of square images for each row, and a mask of their pixels."""
    side = 2 * random.Random(seed).randint(1, 2)
    pixels = side * model.config.vision_config.patch_size  # type: ignore[union-attr]
    batch = _text(model, [side * side // 4] * ROWS, seed)
    del batch["mm_token_type_ids"]
    images = torch.randn(ROWS, 1, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed))
    return {**batch, "pixel_values": images, "pixel_attention_mask": torch.ones(ROWS, 1, pixels, pixels).long()}


CASES = [("qwen2_5_vl", _patches), ("qwen3_vl", _patches), ("paddleocr_vl", _patches_by_rows), ("idefics3", _squares)]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_random_sizes_share_few_graphs(name: str, make: Any) -> None:
    model, *_ = sweep_worker.runnable(name, "vision")
    shapes = ImageShapes(model)
    reports: list[GraphReport] = []
    run = compiled(model, Options.parse({"strict": True, "lowering": "eager"}), reports)
    lengths = set()
    with sizes_in_graph():
        for seed in range(BATCHES):
            batch = make(model, seed)
            lengths.add((batch["pixel_values"].shape, batch["input_ids"].shape))
            ours = sweep_worker.step(run, model, shapes(batch))
            if seed < COMPARED:
                assert not sweep_worker.compare(ours, sweep_worker.step(model, model, batch))
    assert len(lengths) > 20
    assert len(reports) <= GRAPHS and shapes.outside
    variants = [s.detail for report in reports for s in report.rewritten if s.operator == "attention"]
    if name in ("qwen2_5_vl", "paddleocr_vl"):
        assert len(reports) == 1 and sum(variant == "documents" for variant in variants) == 2  # both of its towers'


def test_sizes_of_a_tower_of_windows_are_multiples_of_symbols() -> None:
    """Where nobody says how many patches belong to an index of windows they are quotients of quotients."""
    model, *_ = sweep_worker.runnable("qwen2_5_vl", "vision")
    shapes = ImageShapes(model)
    sizes: set[Any] = set()

    def backend(gm: Any, _: Any) -> Any:
        values = pytree.tree_leaves([n.meta.get("example_value") for n in gm.graph.nodes])
        found = [size for v in values if isinstance(v, Tensor) for size in v.shape]
        sizes.update(size.node.expr for size in found if isinstance(size, torch.SymInt))
        return gm.forward

    with sizes_in_graph():
        torch.compile(model, backend=backend)(**shapes(_patches(model, 0)))
    assert sizes and not any(size.has(FloorDiv) for size in sizes)


def test_patches_that_are_not_the_grids_are_refused() -> None:
    model, *_ = sweep_worker.runnable("qwen2_5_vl", "vision")
    batch = ImageShapes(model)(_patches(model, 0))
    for name in ("image_position_ids", "image_window_index"):
        with pytest.raises(RuntimeError):
            state_sizes(model.model, (), {**batch, name: batch[name][1:]})


def test_tiles_of_one_size_are_one_graph() -> None:
    """Although their number of features, whose root the model takes, would be a symbol if their sides were."""
    model, batch, eager = sweep_worker.runnable("internvl", "vision")
    shapes = ImageShapes(model)
    reports: list[GraphReport] = []
    run = compiled(model, Options.parse({"strict": True, "lowering": "eager"}), reports)
    with sizes_in_graph():
        for step in range(2):
            pixels = batch["pixel_values"] if step == 0 else batch["pixel_values"].flip(-1)
            ours = sweep_worker.step(run, model, shapes({**batch, "pixel_values": pixels}))
            wanted = eager if step == 0 else sweep_worker.step(model, model, {**batch, "pixel_values": pixels})
            assert not sweep_worker.compare(ours, wanted)
    assert len(reports) == 1 and shapes.outside


# -- attention within pieces of a row ---------------------------------------------------------------------------------

OFFSETS = torch.tensor([0, 2, 3, LENGTH], dtype=torch.int32)


def _packed(x: Tensor, offsets: Tensor) -> Tensor:
    q, k, v = x.chunk(3, dim=-1)
    return packed_attention(nn.Identity(), q, k, v, scaling=0.3, cu_seq_lens_q=offsets)[0].flatten(-2)


def _qkv() -> Tensor:
    return torch.randn(1, 2, LENGTH, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)


def test_pieces_attend_to_themselves() -> None:
    ours = _packed(_qkv(), OFFSETS)
    for begin, end in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
        alone = _qkv()[:, :, begin:end].chunk(3, dim=-1)
        expected = torch.nn.functional.scaled_dot_product_attention(*alone, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(ours[:, begin:end], expected.flatten(-2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_pieces_are_recognised_as_documents(dynamic: bool) -> None:
    assert_rewrites(Attention(), _packed, _qkv(), OFFSETS, to="packed_attention", variant="documents", dynamic=dynamic)


def test_numbers_that_may_fall_are_no_documents() -> None:
    """Equal numbers may then be apart, which offsets cannot say."""

    def function(x: Tensor, numbers: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        mask = numbers[:, None, :, None] == numbers[:, None, None, :]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(-2)

    variant = "the mask is kept: depends on the input numbers (documents)"
    numbers = torch.tensor([[0, 1, 0, 2, 2]])
    assert_rewrites(Attention(), function, _qkv(), numbers, to="masked_attention", variant=variant)


# -- towers that compute otherwise ------------------------------------------------------------------------------------


class Tower(nn.Module):
    """A model that reads its grid in a way of its own, and would take other values for it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, _attn_implementation="sdpa"))
        self.attention: list[str] = []

    def set_attn_implementation(self, names: dict[str, str]) -> None:
        self.attention.append(names["vision_config"])

    def get_image_features(self, pixel_values: Tensor, image_cu_seqlens: Tensor | None = None, **_: Any) -> Tensor:
        return pixel_values if image_cu_seqlens is None else pixel_values * 2


def test_a_tower_that_computes_otherwise_is_left_alone() -> None:
    tower = Tower()
    batch = {"pixel_values": torch.randn(8, 4), "image_grid_thw": torch.tensor([[1, 2, 4]])}
    shapes = ImageShapes(tower)
    with pytest.warns(UserWarning, match="its images' features change"):
        assert shapes(batch).keys() == batch.keys()
    assert tower.attention == [PACKED, "sdpa"]
    assert shapes(batch).keys() == batch.keys() and len(tower.attention) == 2  # asked once


class Rowwise(Tower):
    """Whose patches lie row after row of their image, although 2 × 2 of them are merged behind it."""

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, image_position_ids: Tensor | None = None, **_: Any
    ) -> Tensor:
        (_, rows, columns) = image_grid_thw[0].tolist()
        own = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return pixel_values + (own if image_position_ids is None else image_position_ids)


def test_the_order_of_patches_is_found_out() -> None:
    tower = Rowwise()
    shapes = ImageShapes(tower)
    for rows, columns in ((2, 4), (4, 2)):
        batch = {"pixel_values": torch.randn(8, 2), "image_grid_thw": torch.tensor([[1, rows, columns]])}
        ready = shapes(batch)
        assert torch.equal(tower.get_image_features(**ready), tower.get_image_features(**batch))
        assert ready["image_position_ids"][:2].tolist() == [[0, 0], [0, 1]] and shapes.outside
    assert tower.attention == [PACKED]


class Worded(Tower):
    """Each cell of whose grid is a feature already, whatever its tower merges into one."""

    def __init__(self) -> None:
        super().__init__()
        self.config.image_token_id = 9

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        return pixel_values


def test_features_are_counted_as_the_model_has_them() -> None:
    shapes = ImageShapes(Worded())
    images = {"pixel_values": torch.randn(8, 4), "image_grid_thw": torch.tensor([[1, 2, 4]])}
    text = torch.tensor([[1, *[9] * 8]])
    assert "image_cu_seqlens" in shapes({**images, "input_ids": text})
    with pytest.raises(ValueError, match="the text has 7 image tokens, its images have 8 features"):
        shapes({**images, "input_ids": text[:, :-1]})


def test_batches_without_images_come_through() -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": False}
    assert ImageShapes(nn.Linear(2, 2))(batch) == batch
