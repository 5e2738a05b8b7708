"""Write the parts of docs/doctor.md that come from the code: ``python -m tests.write_doctor_rules``."""

from __future__ import annotations

import re
from pathlib import Path

from unsloth.runtime.doctor import doctor, rule_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "doctor.md"


def example() -> str:
    """What is printed about a template that belongs to another model."""
    printed = str(doctor("tiny-llama", chat_template="llama-3"))
    shown = "\n".join(line.rstrip() for line in re.sub(r" in [\d.]+ s", "", printed).splitlines())
    return f"```console\n$ unsloth doctor tiny-llama --chat-template llama-3\n{shown}\n```"


def generated(text: str) -> str:
    """The page with its generated parts as they should be."""
    for name, part in (("example", example()), ("rules", rule_table())):
        head, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
        _, end, tail = rest.partition(f"<!-- {name}:end -->")
        assert begin and end, name
        text = f"{head}{begin}{part}\n{end}{tail}"
    return text


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
