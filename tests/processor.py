"""The speed of this machine's processor: limits in seconds are those of a known one, and CI's may be half as fast."""

from __future__ import annotations

import resource
import subprocess
import sys

KNOWN = 1.6
"""Processor seconds of the imports below at which a dry run takes four of its five: it takes 2.5 times as long
as they do (7.3 and 2.9 s, the least of several runs of each on one machine)."""


def seconds_of(*command: object, **options: object) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Processor seconds that a command takes, and what came of it; other processes may have the other processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def slowness() -> float:
    """How many times as long as on the known processor work takes here and now; 1 at least.

    The yardstick is the import of PyTorch and transformers, in a process of its own: most of what commands with a limit
    spend their time on is of that kind.
    """
    seconds, done = seconds_of(sys.executable, "-c", "import torch, transformers")
    assert done.returncode == 0, done.stderr
    return max(1.0, seconds / KNOWN)
