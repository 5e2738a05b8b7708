"""Finding errors that raise nothing: rules over a model's files, its code and the data it is to be trained on."""

from __future__ import annotations

# Importing a module of rules adds them to RULES.
from . import arithmetic, attention, configs, data, losses, templates, tokens, weights  # noqa: F401
from .diagnosis import Diagnosis, Finding, diagnose
from .rule import PARTS, RULES, Rule, Severity
from .subject import Row, Run, Subject, of_loaded, read

__all__ = [
    "PARTS",
    "RULES",
    "Diagnosis",
    "Finding",
    "Row",
    "Rule",
    "Run",
    "Severity",
    "Subject",
    "diagnose",
    "of_loaded",
    "read",
]
