"""examples/train_context_parallel.py learns the same, however many ranks there are."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from torchrun import answers

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_context_parallel.py"


def printed(*arguments):
    sys.argv = [str(SCRIPT), *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return out.getvalue()


def losses(ranks, size, *arguments):
    """Of every step of a run, as rank 0 prints them."""
    given = ("--seqlen", "64", "--batch", "2", *arguments)
    first, *_ = answers(ranks.context(), printed, size, *given)
    found = re.findall(r"step (\d+): loss (\d+\.\d+)", first)
    return {int(step): float(loss) for step, loss in found}


def test_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    given = ("--method", "rerope", "--window", "16")
    expected = losses(ranks, 1, "--steps", "8", *given)
    assert list(expected) == list(range(8)) and expected[7] < expected[0] - 0.5
    given += ("--checkpoint", str(tmp_path / "run"))
    found = losses(ranks, 2, "--steps", "4", *given)
    found |= losses(ranks, 4, "--cp", "2", "--steps", "8", "--strategy", "ring", *given)
    assert found == pytest.approx(expected, abs=1e-4)  # six decimals, of float32
