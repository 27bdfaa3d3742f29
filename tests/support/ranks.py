"""Processes that share a sequence, for the benchmark and the tests of `distributed`.

Four of them start once and then run functions, so that a test costs its arithmetic and not the
import of torch. A rank that does not answer in time is a failure: ranks that wait for ever are
ended.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

WORLD = 4
SECONDS = 1200  # for one case, if its kernels are compiled first on a busy machine
PRELOADED = ["extrope_kernels.distributed", "torch.distributed.device_mesh"]


class Ranks:
    """Processes that run module-level functions on all ranks: function(mesh, **arguments).

    gpus: so many, with a GPU each under NCCL, instead of four under gloo.
    """

    def __init__(
        self, seconds: float = SECONDS, preloaded: Sequence[str] = (), gpus: int = 0
    ) -> None:
        self.seconds, self.gpus = seconds, gpus
        self.preloaded = [*PRELOADED, *preloaded]
        self.processes: list = []
        self.pipes: list = []

    def run(
        self, function: Callable[..., Any], size: int | tuple[int, int], **arguments: Any
    ) -> list[Any]:
        """Run a function; return its result on each rank of a mesh: 1, 2, 4, (2, 2), or gpus."""
        if not self.processes:
            self._start()
        pipes = self.pipes[: size if isinstance(size, int) else WORLD]
        for pipe in pipes:
            pipe.send((function, size, arguments))
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(self.seconds):
                self.stop()
                raise TimeoutError(f"rank {rank} did not answer within {self.seconds} s")
            answers.append(pipe.recv())
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            self.stop()  # others may wait for the one that failed
            raise AssertionError("\n".join(errors))
        return [result for _, result in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def context(self) -> Any:
        """Return a context that forks from a process with all imports and without threads.

        With GPUs each starts anew: imports may open CUDA, which no fork survives.
        """
        if self.gpus:
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.preloaded)
        return context

    def _start(self) -> None:
        context = self.context()
        store = os.path.join(tempfile.mkdtemp(), "store")
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(threads, "1"))
        for rank in range(self.gpus or WORLD):
            here, there = context.Pipe()
            given = (rank, there, store, sys.path, self.gpus)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        for name, value in threads.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _serve(rank: int, pipe: Any, store: str, path: list[str], gpus: int) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=gpus or WORLD,
        timeout=timedelta(seconds=SECONDS),
    )
    if gpus:
        meshes = {gpus: init_device_mesh("cuda", (gpus,))}
    else:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        meshes = {1: None, 2: grid["inner"], 4: init_device_mesh("cpu", (4,)), (2, 2): grid}
    while True:
        try:
            function, size, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((None, function(meshes[size], **arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
