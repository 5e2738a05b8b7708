"""Asking every rule about a subject, and the answer as people and programs read it."""

from __future__ import annotations

import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .rule import ERROR, RULES, WARNING, Evidence, Rule, Severity
from .subject import Subject

logger = logging.getLogger(__name__)

SHOWN = 3
"""Pieces of evidence that are written out per rule; the others are counted."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        rule: which rule found it.
        severity: the rule's, unless this case differs.
        evidence: what was seen, a sentence each.
    """

    rule: Rule
    severity: Severity
    evidence: tuple[str, ...]

    @property
    def stops(self) -> bool:
        """Whether training would certainly be wrong, or fail."""
        return self.rule.stops and self.severity is ERROR

    @property
    def told(self) -> str:
        """The evidence, shortened where there is much of it."""
        more = len(self.evidence) - SHOWN
        return "\n".join([*self.evidence[:SHOWN], *([f"and {more} more like it"] if more > 0 else [])])

    def to_dict(self) -> dict[str, Any]:
        rule = self.rule
        return {
            "rule": rule.id,
            "severity": str(self.severity),
            "looks_at": list(rule.looks_at),
            "wrong": rule.wrong,
            "evidence": list(self.evidence),
            "remedy": rule.remedy,
            "stops_training": self.stops,
        }


@dataclass
class Diagnosis:
    """What is wrong with a model, its tokenizer, its template and the data; ``print`` it.

    Attributes:
        name: of the model.
        findings: errors first.
        silent: ids of the rules that were asked and found nothing.
        not_asked: id → what a rule had to look at, and is not there.
        failed: id → why a rule could not be asked of this model.
        notes: what loading has put right, and other programs may not.
        seconds: that it took.
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    not_asked: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity is ERROR]

    @property
    def warnings(self) -> list[Finding]:
        return [f for f in self.findings if f.severity is WARNING]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    @property
    def stops(self) -> list[Finding]:
        """Errors with which training would certainly be wrong, or fail."""
        return [f for f in self.findings if f.stops]

    @property
    def summary(self) -> str:
        asked = len(self.silent) + len({f.rule.id for f in self.findings})
        found = f"{_count(self.errors, 'error')}, {_count(self.warnings, 'warning')}"
        return (
            f"{self.name}: {found if self.findings else 'nothing found'}; {asked} rules asked in {self.seconds:.1f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.name,
            "ok": self.ok,
            "findings": [f.to_dict() for f in self.findings],
            "silent": self.silent,
            "notes": self.notes,
            "not_asked": self.not_asked,
            "failed": self.failed,
            "seconds": round(self.seconds, 2),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.findings:
            table = Table(show_lines=True, highlight=False)
            table.add_column("rule", no_wrap=True)
            table.add_column("what was found → what to do", overflow="fold")
            for finding in self.findings:
                colour = "red" if finding.severity is ERROR else "yellow"
                name = Text.assemble((f"{finding.severity}", f"bold {colour}"), "\n", finding.rule.id)
                table.add_row(name, Text.assemble(finding.told, "\n", (f"→ {finding.rule.remedy}", "green")))
            parts.append(table)
        parts.append(Text(self.summary))
        parts += [Text(f"note: {note}") for note in self.notes]
        if self.not_asked:
            counts = Counter(self.not_asked.values()).most_common()
            told = "; ".join(f"{reason}, {count} rule{'s' * (count != 1)}" for reason, count in counts)
            parts.append(Text(f"not asked: {told}", style="dim"))
        parts += [Text(f"failed: {id}: {reason}", style="dim") for id, reason in self.failed.items()]
        return Group(*parts)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=120, color_system=None).print(self)
        return out.getvalue().rstrip()


def diagnose(subject: Subject, *, only: Callable[[Rule], bool] = lambda rule: True) -> Diagnosis:
    """Ask every rule.

    A rule that fails is no finding: it is listed in ``failed`` with its error.

    Args:
        only: which rules to ask.
    """
    started = time.perf_counter()
    found: list[Finding] = []
    result = Diagnosis(subject.name, notes=list(subject.notes))
    for rule in filter(only, RULES.values()):
        if (reason := next(filter(None, map(subject.lacks, rule.looks_at)), None)) is not None:
            result.not_asked[rule.id] = reason
            continue
        try:
            evidence = [e if isinstance(e, Evidence) else Evidence(e) for e in rule.check(subject)]
        except Exception as error:
            logger.debug("rule %s failed", rule.id, exc_info=True)
            first = (str(error).splitlines() or [""])[0][:160]
            result.failed[rule.id] = f"{type(error).__name__}: {first}"
            continue
        if not evidence:
            result.silent.append(rule.id)
        texts = {s: tuple(e.text for e in evidence if (e.severity or rule.severity) is s) for s in (ERROR, WARNING)}
        found += [Finding(rule, severity, told) for severity, told in texts.items() if told]
    result.findings = sorted(found, key=lambda f: f.severity is WARNING)
    result.seconds = time.perf_counter() - started
    return result


def _count(findings: Sequence[Finding], word: str) -> str:
    return f"{len(findings)} {word}{'s' * (len(findings) != 1)}"
