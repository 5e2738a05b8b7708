"""The sampling profiler sees who computes, and not who waits; what it looks at dies as it would."""

from __future__ import annotations

import threading
import time
import weakref

from benchmarks.sampling import sampled


def computes(seconds: float) -> int:
    """Keeps the processor busy, by itself."""
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        count += 1
    return count


def test_stacks_are_counted_and_waiting_is_not() -> None:
    over = threading.Event()
    waiter = threading.Thread(target=over.wait)
    waiter.start()
    with sampled(0.005) as samples:
        computes(0.5)
    over.set()
    waiter.join()
    by_name = {code.co_name: count for code, count in samples.below.items()}
    assert samples.count >= 10 and by_name["computes"] >= 0.5 * samples.count
    assert by_name["test_stacks_are_counted_and_waiting_is_not"] >= by_name["computes"]
    assert "wait" not in {code.co_name for code in samples.top}
    assert "computes tests/test_benchmark_sampling.py:12" in samples.table(least=0.0)


class Value:
    """Something that a function makes."""


def seen_to_its_end() -> weakref.ref[Value]:
    """A value that nobody holds any more, made by a call that was looked at several times, last just before its end."""
    value = Value()
    time.sleep(0.1)
    return weakref.ref(value)


def test_no_value_outlives_its_call() -> None:
    with sampled(0.02) as samples:
        alive = [seen_to_its_end()() for _ in range(3)]
    assert alive == [None] * 3
    assert any(code is seen_to_its_end.__code__ for code in samples.below)
