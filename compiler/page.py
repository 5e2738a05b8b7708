"""An explanation as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .coverage import LEFT

if TYPE_CHECKING:
    from .explain import Explanation

_TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(explanation: Explanation) -> str:
    """The page. Whatever comes from the model (names, source lines, reasons) is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    facts: dict[str, Any] = explanation.to_dict()
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(e=explanation, left=LEFT, **facts)
