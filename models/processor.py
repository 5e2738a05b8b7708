"""The processor of a model that takes images: its tokenizer, and what makes pixels ready for it."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from .source import ModelError, Source, explained, locate
from .tokenizer import separate_padding

logger = logging.getLogger(__name__)

FILES = ("processor_config.json", "preprocessor_config.json")
"""Either of them says how images are prepared."""


def has_processor(source: Source) -> bool:
    """Whether a model's (or an adapter's) folder says how images are prepared."""
    return source.folder is not None and any((source.files / name).is_file() for name in FILES)


def load_processor(
    name: str,
    *,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    require_chat_template: bool = False,
) -> ProcessorMixin:
    """Load the processor of a model; its tokenizer as :func:`~unsloth.models.tokenizer.load_tokenizer` has them.

    Images are prepared by transformers' own code on PIL or, where it is installed, on torchvision. Without torchvision
    a processor that takes videos as well (Qwen2-VL's, for one) is loaded for images alone.

    Raises:
        ModelError: when there is no processor, it cannot be loaded without torchvision, or lacks the chat template that
            is required.
    """
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision, "token": token}
    source = locate(name, gguf_file=gguf_file, tokenizer_only=True, **where)
    if source.adapter and not has_processor(source):
        where["revision"] = None
        return load_processor(source.base_model, **where, require_chat_template=require_chat_template)
    if source.gguf or not has_processor(source):
        raise ModelError(f"{name!r} takes no images: it has no {' and no '.join(FILES)}")
    with explained(name):
        try:
            processor = AutoProcessor.from_pretrained(source.files, trust_remote_code=trust_remote_code)
        except ImportError as error:
            if importlib.util.find_spec("torchvision") is not None or "orchvision" not in str(error):
                raise
            processor = _without_videos(source, error)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(f"{name!r} takes no images: its processor is a {type(processor).__name__}")
    separate_padding(processor.tokenizer, name)
    if require_chat_template and not (processor.chat_template or processor.tokenizer.chat_template):
        raise ModelError(
            f"the processor of {name!r} has no chat template, as those of base models have none: take the instruct "
            "model, or set processor.chat_template"
        )
    return processor


def _without_videos(source: Source, error: ImportError) -> Any:
    """A processor of the model's class that has no part for videos, which is what wants torchvision."""
    config = AutoConfig.from_pretrained(source.files)
    theirs: Any = PROCESSOR_MAPPING.get(type(config), ProcessorMixin)
    parts = list(theirs.get_attributes())
    if "video_processor" in parts:
        parts.remove("video_processor")
        named = {"get_attributes": classmethod(lambda cls: list(parts)), "__module__": theirs.__module__}
        try:
            processor = type(theirs.__name__, (theirs,), named).from_pretrained(source.files)
        except (ImportError, AttributeError, TypeError, ValueError) as second:
            logger.debug("without videos: %s", second)
        else:
            logger.info("%s: loaded for images alone; videos need torchvision", source.name)
            return processor
    raise ModelError(
        f"the processor of {source.name!r} needs torchvision, of the version that belongs to your torch: pip install "
        "--no-deps torchvision==… (without --no-deps, pip may replace torch)"
    ) from error
