"""The examples run as they are, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_demo():
    done = subprocess.run(
        [sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 graph, 0 breaks" in done.stdout
    assert "same training step" in done.stdout
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 1
