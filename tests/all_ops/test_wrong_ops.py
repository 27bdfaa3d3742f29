"""Ops called bare with one argument changed refuse the call, or are right: see `wrong_ops`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import wrong_ops

TESTS = Path(__file__).parents[1]
QUICK, ALL = 400, 6000


def problems(first: int, last: int) -> list[str]:
    """What is wrong with these cases; a signal ends one, and the next process goes on behind it."""
    found = []
    while first < last:
        command = [sys.executable, "-m", "support.wrong_ops", str(first), str(last)]
        done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
        numbers = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
        found += [line for line in done.stdout.splitlines() if not line.isdigit()]
        if done.returncode == 0:
            assert numbers[-1:] == [last - 1]
            return found
        assert numbers, done.stderr
        case = wrong_ops.cases()[numbers[-1]]
        found.append(f"{case}: the process ended by {done.returncode}: {done.stderr[-300:]}")
        first = numbers[-1] + 1
    return found


def test_every_op_has_cases():
    names = {case.call.op for case in wrong_ops.cases()[:QUICK]}
    assert names == wrong_ops.ALL - wrong_ops.NOT_CALLED


def test_is_refused_or_right():
    assert problems(0, QUICK) == []


@pytest.mark.thorough
@pytest.mark.parametrize("first", range(QUICK, ALL, 1400))
def test_many_more_are_refused_or_right(first):
    assert problems(first, first + 1400) == []


def test_a_write_beside_an_output_is_seen():
    memory = wrong_ops.Memory({"x": torch.zeros(4, 4)[:, :2]}, behind=True)
    x = memory.arguments["x"]
    assert memory.changed(()) is None
    x.fill_(1)
    assert memory.changed([x]) is None
    assert memory.changed(()) == "wrote"
    x.as_strided((1,), (1,), 3).fill_(1)  # between its rows
    assert memory.changed([x]) == "wrote outside of its outputs"


def test_a_result_of_other_elements_is_seen():
    x = torch.randn(4, 8)
    assert wrong_ops.differs(x * (1 + 1e-6), x) is None
    assert "is off by" in wrong_ops.differs(x.flip(0), x)
    assert "is off by" in wrong_ops.differs(torch.full_like(x, torch.nan), x)
    assert wrong_ops.differs(x[:2], x) == "is (2, 8), not (4, 8)"
