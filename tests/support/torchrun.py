"""Processes as torchrun starts them, of which each sends one answer."""

from __future__ import annotations

import os
import socket
from typing import Any

SECONDS = 120


def answers(context: Any, function: Any, size: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `size` ranks, alike in their environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        given = (there, function, (rank, size, port), arguments)
        processes.append(context.Process(target=_answer, args=given, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        assert all(pipe.poll(SECONDS) for pipe in pipes), "a rank did not end in time"
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()


def _answer(pipe: Any, function: Any, place: tuple[int, int, int], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    rank, size, port = place
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "localhost", **{k: str(v) for k, v in where.items()}})
    pipe.send(function(*arguments))
