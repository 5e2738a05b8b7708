"""A tiny model of images and texts in a folder, with its processor, and images to give it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.vision_digits import small_model


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    model, processor = small_model(hidden=32, layers=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(colour: Any = "red", size: tuple[int, int] = (40, 24), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def encoded(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **settings)
    return file.getvalue()


def chat(*content: Any, answer: str = "red") -> dict[str, Any]:
    """A question of texts and images (names of files end in .png), and its answer."""
    parts = [
        {"type": "text", "text": c} if isinstance(c, str) and not c.endswith(".png") else {"type": "image", "image": c}
        for c in content
    ]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}
