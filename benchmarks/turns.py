"""Workers at one time, each timed alone. Loaded by its path, as the worker is: it needs nothing but Python."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SETTLING = 1.0
"""Seconds in which a stopped system's device finishes what was launched."""


class Turns:
    """Lets systems load and compile at one time, and each be timed alone: the others are stopped meanwhile.

    In the folder lies a file per running worker, named by its process, and the log of who was alone when.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / f"{os.getpid()}.pid").touch()
        self.log.touch()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self.log.open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            started = time.perf_counter()
            self._signal(signal.SIGSTOP)
            try:
                time.sleep(SETTLING)
                yield
            finally:
                self._signal(signal.SIGCONT)
                log.write(f"{started} {time.perf_counter()}\n")

    def stopped(self, start: float, end: float) -> float:
        """Seconds between two times during which another worker was alone. The clock is the same in all processes."""
        spans = [tuple(map(float, line.split())) for line in self.log.read_text().splitlines()]
        return sum(max(0.0, min(end, b) - max(start, a)) for a, b in spans)

    def _signal(self, which: signal.Signals) -> None:
        for path in self.folder.glob("*.pid"):
            if int(path.stem) != os.getpid():
                with contextlib.suppress(ProcessLookupError):  # it is done
                    os.kill(int(path.stem), which)
