"""examples/train_context_parallel.py learns the same, however many ranks there are."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import socket
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_context_parallel.py"
SECONDS = 120


def as_torchrun_does(pipe, rank, size, port, arguments):
    import torch

    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "localhost", **{k: str(v) for k, v in where.items()}})
    sys.argv = [str(SCRIPT), *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    pipe.send(printed.getvalue())


def losses(ranks, size, *arguments):
    """Of every step of a run, as rank 0 prints them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context, pipes, processes = ranks.context(), [], []
    for rank in range(size):
        here, there = context.Pipe()
        given = (there, rank, size, port, ["--seqlen", "64", "--batch", "2", *arguments])
        processes.append(context.Process(target=as_torchrun_does, args=given, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        assert all(pipe.poll(SECONDS) for pipe in pipes), "a rank did not end in time"
        printed = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
    found = re.findall(r"step (\d+): loss (\d+\.\d+)", printed[0])
    return {int(step): float(loss) for step, loss in found}


def test_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    given = ("--method", "rerope", "--window", "16")
    expected = losses(ranks, 1, "--steps", "8", *given)
    assert list(expected) == list(range(8)) and expected[7] < expected[0] - 0.5
    given += ("--checkpoint", str(tmp_path / "run"))
    found = losses(ranks, 2, "--steps", "4", *given)
    found |= losses(ranks, 4, "--cp", "2", "--steps", "8", "--strategy", "ring", *given)
    assert found == pytest.approx(expected, abs=1e-4)  # six decimals, of float32
