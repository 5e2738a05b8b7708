"""What does Python do all this time? A profiler that looks at every thread's stack now and then.

It slows nothing down, unlike one that is told of every call: what a compiler of a million small calls spends where is
seen as it is. Threads that only wait are left out.

It changes nothing either, which takes care: a frame that somebody holds keeps its function's values alive after the
call, and PyTorch asks how many hold a tensor. ``torch.arange`` detaches one that is held twice, which a trace above
autograd cannot follow.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

WAITING = {"wait", "_worker", "select", "poll", "accept", "recv", "recv_into", "read", "_recv_msg", "_python_exit"}


class Samples:
    """Seconds by function: of which it was on a stack, and of which it was at its top."""

    def __init__(self, interval: float) -> None:
        self.interval, self.count = interval, 0
        self.below: Counter[CodeType] = Counter()
        self.top: Counter[CodeType] = Counter()

    def look(self, own: int) -> None:
        """The stacks of all threads but ``own``, the one that looks. No frame is held when it returns."""
        self.count += 1
        collects = gc.isenabled()
        gc.disable()  # a collection outlasts this thread's turn, and then calls end that are being looked at
        try:
            self._walk(own)
        finally:
            if collects:
                gc.enable()

    def _walk(self, own: int) -> None:
        for thread, frame in sys._current_frames().items():
            if thread != own:
                self.add(frame)

    def add(self, frame: FrameType | None) -> None:
        """One thread's stack."""
        if frame is None or frame.f_code.co_name in WAITING:
            return
        self.top[frame.f_code] += 1
        seen: set[CodeType] = set()
        while frame is not None:
            seen.add(frame.f_code)
            frame = frame.f_back
        self.below.update(seen)

    def table(self, most: int = 60, least: float = 0.2) -> str:
        """The functions below which most time went, a line each."""
        lines = [f"{'below':>8}{'itself':>8}  function"]
        for code, count in self.below.most_common(most):
            if (seconds := count * self.interval) >= least:
                place = "/".join(code.co_filename.split("/")[-2:])
                own = self.top[code] * self.interval
                lines.append(f"{seconds:>8.2f}{own:>8.2f}  {code.co_qualname} {place}:{code.co_firstlineno}")
        return "\n".join(lines)


@contextmanager
def sampled(interval: float = 0.01) -> Iterator[Samples]:
    """Look every ``interval`` seconds while the block runs."""
    samples, done = Samples(interval), threading.Event()

    def watch() -> None:
        own = threading.get_ident()
        while not done.wait(interval):
            samples.look(own)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()
