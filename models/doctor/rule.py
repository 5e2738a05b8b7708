"""What a rule is: something that can be wrong, how to find it out, and what to do about it.

A rule is a function that looks at a :class:`~unsloth.models.doctor.subject.Subject` and yields its evidence, one
sentence each; none means that nothing is wrong. Its docstring says what would be wrong, and stands in docs/doctor.md.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .subject import Subject


class Severity(enum.StrEnum):
    """How bad it is: an error makes results wrong; a warning may, in ways that depend on what is done next."""

    ERROR = "error"
    WARNING = "warning"


ERROR, WARNING = Severity.ERROR, Severity.WARNING

PARTS = {
    "config": "its configuration",
    "tokenizer": "its tokenizer",
    "template": "its chat template",
    "data": "a sample of the data",
    "weights": "its weights",
    "code": "its code, by running a tiny model of the same class",
    "run": "the settings of a run",
}
"""What a rule can look at."""


class Evidence(NamedTuple):
    """What a rule found, in a sentence with the numbers; its severity where this case differs from the rule's."""

    text: str
    severity: Severity | None = None


Check = Callable[["Subject"], Iterator[str | Evidence]]


@dataclass(frozen=True)
class Rule:
    """Something that can be wrong.

    Attributes:
        id: for users and programs; stays.
        severity: unless the evidence says otherwise.
        looks_at: names of :data:`PARTS`; a subject that lacks one of them is not asked.
        wrong: what is wrong where the rule speaks up.
        remedy: what to do.
        check: yields evidence.
        stops: training would certainly be wrong, or fail; `unsloth train` then does not begin.
    """

    id: str
    severity: Severity
    looks_at: tuple[str, ...]
    wrong: str
    remedy: str
    check: Check
    stops: bool = False

    @property
    def cheap(self) -> bool:
        """Whether it reads what training reads anyway, and runs no model."""
        return "code" not in self.looks_at


RULES: dict[str, Rule] = {}
"""Every rule by its id, in the order in which they are asked."""


def rule(id: str, severity: Severity, looks_at: str, *, remedy: str, stops: bool = False) -> Callable[[Check], Check]:
    """Make a check a rule; its docstring becomes :attr:`Rule.wrong`.

    Args:
        looks_at: names of :data:`PARTS`, separated by spaces.
    """

    def register(check: Check) -> Check:
        parts = tuple(looks_at.split())
        assert id not in RULES and parts and set(parts) <= PARTS.keys() and check.__doc__, id
        wrong = " ".join(inspect.cleandoc(check.__doc__).split())
        RULES[id] = Rule(id, severity, parts, wrong, remedy, check, stops)
        return check

    return register
