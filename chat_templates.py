"""``from unsloth.chat_templates import get_chat_template, …``: names that scripts written for Unsloth import here."""

from __future__ import annotations

from .runtime.scripts.chats import get_chat_template, standardize_data_formats, standardize_sharegpt, to_sharegpt
from .runtime.scripts.responses_only import train_on_responses_only

__all__ = [
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]
