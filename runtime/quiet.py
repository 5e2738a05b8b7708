"""The libraries' own bars and notes, left out: a command says what it does in one place."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import datasets
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave them out, and have them back."""
    verbosity, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    had_bars = not datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of TRL to transformers, about names that we do not use
            warnings.filterwarnings("ignore", module="openpyxl")  # of what it leaves out of a sheet, such as its look
            warnings.filterwarnings("ignore", "Could not find a config file in")  # of PEFT, which looks beside a GGUF
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()
        if had_bars:
            datasets.enable_progress_bars()
