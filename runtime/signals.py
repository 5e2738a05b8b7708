"""SIGTERM and SIGINT as a request, which a loop looks at where it can stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals(on_request: Callable[[int], None]) -> Iterator[None]:
    """Call ``on_request`` with the first signal's number; a second one ends the process as it would without us."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python sets no handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def asked(number: int, frame: Any) -> None:
        on_request(number)
        restore()
        os.write(2, b"\nunsloth: saving a checkpoint after this batch; once more to stop at once\n")

    for number in before:
        signal.signal(number, asked)
    try:
        yield
    finally:
        restore()
