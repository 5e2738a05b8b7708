"""The checkpoint that tests of models have; a file with one of its own has that."""

from __future__ import annotations

from tests.models.conftest import checkpoint, copy_of  # noqa: F401
