"""The command line of the memory benchmark: rows, budgets, and what it prints."""

from __future__ import annotations

import pytest

from benchmarks.memory import AMPLE, GIB, bytes_of, parse_row, table


def test_rows_and_budgets_are_read() -> None:
    assert parse_row("llama-8b:qlora:1x512") == {"shape": "llama-8b", "mode": "qlora", "batch": 1, "seq": 512}
    done = {"least": {"predicted_gib": 10.0}, "most": {"predicted_gib": 30.0}}
    assert bytes_of("half", done) == 20 * GIB and bytes_of("quarter", done) == 15 * GIB
    assert (bytes_of("most", {}), bytes_of("least", {}), bytes_of("2GiB", {})) == (AMPLE, 0, 2 * GIB)
    with pytest.raises(ValueError, match="one of those failed"):
        bytes_of("half", {"least": done["least"], "most": {"error": "out of memory"}})
    for row, told in (("llama-8b:qlora", "is not SHAPE:MODE:BATCHxSEQ"), ("a:dora:1x2", "'dora' is none of lora")):
        with pytest.raises(ValueError, match=told):
            parse_row(row)


def test_the_table_shows_the_error_and_failures() -> None:
    row = {"name": "a:lora:1x2", "budget": "most", "predicted_gib": 10.3, "measured_gib": 10.0, "ratio": 1.03}
    row |= {"ms_median": 5.0, "predicted_extra_ms": 0.5, "policy": "keep"}
    text = table([row, {"name": "b:lora:1x2", "budget": "half", "error": "out of memory"}])
    assert "+3.0%" in text and "10.30" in text and "failed: out of memory" in text
