"""Options are typed, and a misspelt one is answered with the right spelling."""

from __future__ import annotations

import pytest
import torch
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
        ({"memory_budget": "24 apples"}, "memory_budget '24 apples' has an unknown unit; units are B, KiB, MiB, GiB"),
        ({"memory_budget": "24GBi"}, "unknown unit, did you mean 24 GB?"),
        ({"memory_budget": "80 GiBs"}, "unknown unit, did you mean 80 GiB?"),
        ({"memory_budget": "lots"}, "memory_budget 'lots' is not a size"),
        ({"memory_budget": 1.5}, "memory_budget '1.5' is no share between 0 and 1; a size needs a unit"),
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


@pytest.mark.parametrize("share", [0.5, "0.5", "50%", "50 %"])
def test_a_share_is_of_the_device(share: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="there is no CUDA device"):
        parse_bytes(share)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 80 * 2**30))
    assert parse_bytes(share) == 40 * 2**30


@given(st.integers(min_value=0, max_value=2**50))
def test_bytes_round_trip(n: int) -> None:
    assert parse_bytes(n) == parse_bytes(str(n)) == parse_bytes(f"{n} B") == n
