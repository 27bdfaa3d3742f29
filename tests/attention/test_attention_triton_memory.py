"""No Triton kernel of attention reads or writes outside of its tensors, masked lanes included."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's addresses")


def run(side: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "support" / "guard_pages.py"
    return subprocess.run([sys.executable, script, side], capture_output=True, text=True)


@pytest.mark.parametrize("side", ("before", "behind"))
def test_guard_pages_are_not_touched(side):
    done = run(side)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 100


def test_a_guard_page_ends_the_process():
    done = run("itself")
    assert done.stdout == "alive\n" and done.returncode == -signal.SIGSEGV
