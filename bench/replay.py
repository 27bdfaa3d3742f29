"""The time of a call on a GPU: its launches as a CUDA graph, replayed with a cold L2 cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls: what compiles lazily, or caches, does so before the capture
FLUSHED = 2**30  # bytes: more than any L2, and long enough to write that the host is ahead by then
_scratch: list[Tensor] = []


def replayed(function: Callable[[], object]) -> Callable[[], float]:
    """Capture the call; what is returned replays it once and gives the milliseconds.

    Raises what the call raises, in particular where it waits for the GPU and so has no graph.
    """
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    main.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The outer one: a capture that fails leaves its own stream the current one.
    with torch.cuda.stream(main), torch.cuda.graph(graph):
        function()

    def milliseconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush_l2()  # the GPU is busy with it while the host queues the rest
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def _flush_l2() -> None:
    if not _scratch:
        _scratch.append(torch.empty(FLUSHED, dtype=torch.uint8, device="cuda"))
    _scratch[0].zero_()
