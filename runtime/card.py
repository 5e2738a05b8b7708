"""A model card: what was trained on what and how, how well it learnt, and how to load it.

The front matter is the hub's (https://huggingface.co/docs/hub/model-cards). What a run has left in its folder is read
from there: ``run.json`` (settings, data report, results), ``log.json``, ``loss.png``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

RUN = "run.json"

_LOADED_BY = {
    "merged": 'model = AutoModelForCausalLM.from_pretrained("{place}")\n'
    'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    "adapter": "base = AutoModelForCausalLM.from_pretrained({base})\n"
    'model = PeftModel.from_pretrained(base, "{place}")',
}
_IMPORTS = {
    "merged": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "adapter": "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM",
}


def run_record(config: Any, data: Sequence[Any], result: Any) -> dict[str, Any]:
    """What ``unsloth train`` writes down about a run, for :data:`RUN`: plain values.

    Args:
        config: the :class:`~unsloth.runtime.config.TrainConfig`; what was set in it is written.
        data: what is known of each data set; its text is the report.
        result: the :class:`~unsloth.runtime.train.TrainResult`.
    """
    before, after = result.held_out or (None, None)
    first, second = result.answers or (None, None)
    return {
        "settings": config.model_dump(mode="json", exclude_unset=True, exclude={"output_dir", "overwrite"}),
        "data": [str(each) for each in data],
        "images": any(each.has_images for each in data),
        "results": {
            "steps": result.steps,
            "tokens_per_second": result.tokens_per_second,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "answer_before": first,
            "answer_after": second,
        },
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
    }


def write_card(folder: Path, record: Mapping[str, Any], *, is_adapter: bool, title: str) -> None:
    """Put the record of a run, and the card that tells of it, into the folder of its results."""
    (folder / RUN).write_text(json.dumps(record, indent=1), encoding="utf-8")
    card = model_card(
        title=title,
        base=str(record["settings"]["model_name_or_path"]),
        kind="adapter" if is_adapter else "merged",
        files=[],
        run=record,
        curve="loss.png",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_run(folder: Path | None) -> dict[str, Any]:
    """The record of the run that filled a folder; empty where there is none that can be read."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(
    *,
    title: str,
    base: str,
    kind: str,
    files: Sequence[str],
    adapters: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    curve: str | None = None,
) -> str:
    """The text of ``README.md``.

    Args:
        title: of the model.
        base: what it was trained from: a hub id, or a folder or a file, of which the last name is written.
        kind: "merged", "adapter" or "gguf".
        files: the weights' names, for GGUF.
        adapters: settings of PEFT's LoRA.
        run: as :func:`run_record` made it.
        curve: name of the picture of the loss.
    """
    run = run or {}
    base_id = base if _is_hub_id(base) else None
    front: dict[str, Any] = {
        "library_name": {"adapter": "peft", "gguf": "gguf"}.get(kind, "transformers"),
        "pipeline_tag": "image-text-to-text" if run.get("images") else "text-generation",
        "tags": ["unsloth", *(["lora"] if adapters else [])],
    }
    if base_id:
        front["base_model"] = base_id
    called = base_id or Path(base).name or base
    lines = ["---", yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip(), "---", "", f"# {_plain(title)}"]
    lines += ["", f"Fine-tuned from {_code(called)}.", ""]
    lines += _loading(kind, title, called, files, images=bool(run.get("images")))
    if curve:
        lines += ["## Curves", "", f"![training loss]({curve})", ""]
    if results := {k: v for k, v in run.get("results", {}).items() if v is not None}:
        lines += ["## Results", "", *_table(results), ""]
    if run.get("data"):
        lines += ["## Data", "", "```text", *(str(entry).replace("```", "'''") for entry in run["data"]), "```", ""]
    if adapters:
        lines += ["## Adapters", "", *_table(adapters), ""]
    if run.get("settings"):
        lines += ["## Settings", "", *_table(run["settings"]), ""]
    versions = run.get("versions") or {}
    if versions:
        lines += ["Trained with " + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in versions.items()) + ".", ""]
    return "\n".join(lines)


def _loading(kind: str, title: str, base: str, files: Sequence[str], *, images: bool) -> list[str]:
    if kind == "gguf":
        called = [f"llama-cli -m {name}" for name in files]
        return ["```bash", *called, "```", ""]
    called = f'"{_quoted(base)}"'
    if base.endswith(".gguf"):
        called = f'"its-folder", gguf_file={called}'
    code = _LOADED_BY[kind].format(place=_quoted(title), base=called)
    lines = [_IMPORTS[kind], "", code]
    if images:
        others = {"AutoModelForCausalLM": "AutoModelForImageTextToText", "AutoTokenizer": "AutoProcessor"}
        for text, one in others.items():
            lines = [line.replace(text, one) for line in lines]
        lines = [line.replace("tokenizer = ", "processor = ") for line in lines]
    return ["```python", *lines, "```", ""]


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {_code(name)} | {_code(_short(value))} |" for name, value in values.items()]
    return ["| | |", "|---|---|", *rows]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and Path(value).is_absolute():  # where it lay is nobody's business
        value = Path(value).name
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else text[:299] + "…"


def _code(text: Any) -> str:
    """As code in a cell of a table, whatever is in it."""
    plain = _plain(text).replace("|", "\\|")
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"


def _plain(text: Any) -> str:
    return " ".join(str(text).split())


def _quoted(text: str) -> str:
    return _plain(text).replace("\\", "\\\\").replace('"', '\\"')


def _is_hub_id(name: str) -> bool:
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
