"""Options are typed, and a misspelt one is answered with the right spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsloth.compiler.options import OptionError, Options, parse_bytes

PASSES = ["rms_norm", "rope", "glu"]


def test_defaults() -> None:
    assert Options.parse(None) == Options.parse({}) == Options(None, (), False, "inductor", "keep")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_buget": 1}, "unknown option 'memory_buget', did you mean 'memory_budget'?"),
        ({"zzz": 1}, r"unknown option 'zzz'; options are memory_budget, disable, strict, lowering, logits"),
        ({"lowering": "inductr"}, "lowering cannot be 'inductr', did you mean 'inductor'?"),
        ({"logits": True}, "logits cannot be True"),
        ({"strict": "yes"}, "strict cannot be 'yes'"),
        ({"strict": 1}, "strict cannot be 1"),
        ({"disable": "rmsnorm"}, "disable names an unknown pass 'rmsnorm', did you mean 'rms_norm'?"),
        ({"memory_budget": "24 apples"}, "memory_budget '24 apples' is not a size"),
        ({"memory_budget": -1}, "memory_budget -1 is not a size"),
        ({"memory_budget": True}, "memory_budget True is not a size"),
    ],
)
def test_bad_options_name_the_field(given: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        Options.parse(given, PASSES)
    assert message in str(error.value)


def test_values() -> None:
    options = Options.parse({"memory_budget": "24GiB", "disable": ["rope", "glu"], "strict": True}, PASSES)
    assert options == Options(memory_budget=24 * 2**30, disable=("rope", "glu"), strict=True)
    assert parse_bytes("1.5 gb") == 1_500_000_000 and parse_bytes("0") == 0 and parse_bytes("7B") == 7


@given(st.integers(min_value=0, max_value=2**50))
def test_bytes_round_trip(n: int) -> None:
    assert parse_bytes(n) == parse_bytes(str(n)) == parse_bytes(f"{n} B") == n
