"""The sampling profiler sees who computes, and not who waits."""

from __future__ import annotations

import threading
import time

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
    assert "computes tests/test_benchmark_sampling.py:11" in samples.table(least=0.0)
