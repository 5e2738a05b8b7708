"""A checkpoint as users have them: weights, configuration and tokenizer of a tiny model in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from unsloth.models import presets
from unsloth.models.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    presets.build("tiny-llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(checkpoint, tmp_path):
    """A copy of the checkpoint without the files that the patterns name, for tests that damage it."""

    def copy(*without: str) -> Path:
        folder = tmp_path / "copy"
        folder.mkdir()
        for path in checkpoint.iterdir():
            if not any(path.match(pattern) for pattern in without):
                (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy
