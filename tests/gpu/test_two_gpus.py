"""On a GPU that is not the current one: right results, the current one left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import two_gpus

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_operation_on_the_other_gpu():
    command = [sys.executable, "-m", "support.two_gpus"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------
# The check can fail


def found(current: int = 0, in_use: bool = False) -> list[str]:
    return list(two_gpus.problems("rope", "cpu", None, lambda: current, lambda device: in_use))


def test_nothing_is_wrong_with_the_cpu():
    assert found() == []


def test_what_is_wrong_is_told(monkeypatch):
    assert found(current=1) == ["GPU 1 is current"]
    assert found(in_use=True) == ["a context was opened on GPU 0"]
    right = two_gpus.results

    def nothing_written(name, where, backend):
        return [x * 0 if backend is None else x for x in right(name, where, backend)]

    monkeypatch.setattr(two_gpus, "results", nothing_written)
    told = [text.split(" is off")[0] for text in found()]
    assert told == [f"result {i}" for i in range(4)]  # two rotated tensors, two gradients
