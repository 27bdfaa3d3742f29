"""CUDA graphs: captured once and replayed on other numbers, positions and lengths.

Where no GPU is, what stands for a graph runs the call again on the same tensors: the cases are
right then, and a replay that does nothing, or keeps the lengths of the capture, is caught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.operations import OPERATIONS, Operation, nothing
from torch import Tensor

from extrope_kernels.testing import device

ON_GPU = device() == "cuda"
# A replay must be this much nearer to the new results than the old ones are: its accuracy is for
# other tests.
NEARER = {torch.float32: 1e-3, torch.bfloat16: 0.1}
Replay = Callable[[], object]


def capture(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Replay]:
    """The results of run() in their places, and what computes them anew."""
    if not ON_GPU:
        return rerun(run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


def rerun(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Replay]:
    results = [x.detach() for x in run()]

    def replay():
        for result, new in zip(results, run()):
            result.copy_(new.detach())

    return results, replay


def finite(x: Tensor) -> Tensor:
    return x.detach().double().masked_fill(x == -torch.inf, 0.0)


def expected(case: Operation, number: int, dtype: torch.dtype) -> list[Tensor]:
    tensors = case.tensors(number, dtype)
    return [finite(x) for x in case("reference", **{n: x.clone() for n, x in tensors.items()})]


def check(case: Operation, backend: str, capture: Callable = capture) -> None:
    dtype = torch.bfloat16 if backend == "flash_attn" else torch.float32
    static = {name: x.clone() for name, x in case.tensors(0, dtype).items()}
    results, replay = capture(lambda: case(backend, **static))
    before = expected(case, 0, dtype)
    for number in (1, 2):
        for name, x in case.tensors(number, dtype).items():
            static[name].copy_(x)
        replay()
        now = expected(case, number, dtype)
        for i, (got, new, old) in enumerate(zip(results, now, before, strict=True)):
            apart = (new - old).abs().max()
            assert apart > 0.1, f"result {i} of round {number} is that of the round before"
            error = (finite(got) - new).abs().max()
            assert error < NEARER[dtype] * apart, f"result {i} of round {number}: {error}, {apart}"
        before = now


EVERYWHERE = [
    (name, backend)
    for name, operation in OPERATIONS.items()
    for backend in operation.backends
    if backend != "reference" and (ON_GPU or backend != "triton")  # which a CPU interprets
]


@pytest.mark.parametrize(("name", "implementation"), EVERYWHERE)
def test_replay_computes_on_what_is_there(name, implementation):
    check(OPERATIONS[name], implementation)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", OPERATIONS)
def test_replay_of_the_best_backend(name):
    check(OPERATIONS[name], None)


# -------------------------------------------------------------------------------------------------
# The check can fail


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_replay_that_does_nothing_is_caught(name):
    def idle(run):
        return rerun(run)[0], lambda: None

    with pytest.raises(AssertionError, match=r"^result \d of round 1: "):
        check(OPERATIONS[name], "reference", idle)


FROZEN = dict(EVERYWHERE)


@pytest.mark.parametrize("name", [n for n in FROZEN if OPERATIONS[n].lengths is not nothing])
def test_lengths_of_the_capture_are_caught(name):
    """As where the host read them, or kept a copy."""
    case = OPERATIONS[name]
    old = {key: x.to(device()) for key, x in case.lengths(0, case.sizes).items()}

    def function(backend, **given):
        given |= {} if backend == "reference" else old
        return case.function(**given, backend=backend)

    with pytest.raises(AssertionError, match="of round 1: "):
        check(replace(case, function=function), FROZEN[name], rerun)
