"""How fast this machine's processor is now: bars in seconds are those of a known one, and CI's may be half as fast."""

from __future__ import annotations

import argparse
import inspect
import time

KNOWN = 0.056
"""Processor seconds that the work below takes where the bars were set: 2 cores of an AMD EPYC, both busy."""


def slowness() -> float:
    """How many times as long as on the known processor work takes here and now; 1 at least.

    Interpreted Python, which is what the tests with a bar in seconds spend theirs on: the least of five compilations of
    a module of the standard library, in processor seconds.
    """
    source = inspect.getsource(argparse)

    def once() -> float:
        started = time.process_time()
        for _ in range(4):
            compile(source, argparse.__name__, "exec")
        return time.process_time() - started

    return max(1.0, min(once() for _ in range(5)) / KNOWN)
