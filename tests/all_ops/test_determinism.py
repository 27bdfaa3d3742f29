"""The same bits in every run, on any number of threads, and from several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support.operations import LARGE, OPERATIONS, Operation, everywhere

each = pytest.mark.parametrize(("name", "implementation"), everywhere())


def fresh(operation: Operation, implementation: str, seed: int, dtype: torch.dtype):
    """A call, of tensors of its own: some are written to."""
    tensors = operation.tensors(seed, dtype)

    def call() -> list[torch.Tensor]:
        return operation(implementation, **{name: x.clone() for name, x in tensors.items()})

    return call


def same_bits(found, expected) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(found, expected))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each
def test_every_run_and_any_number_of_threads(name, implementation, dtype):
    """PyTorch's own operations, the reference's, promise this for one number of threads alone:
    where a thread's share ends, exp takes other instructions."""
    call = fresh(replace(OPERATIONS[name], sizes=LARGE), implementation, 0, dtype)
    first = call()
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 3) if implementation != "reference" else (threads,):
            torch.set_num_threads(count)
            assert same_bits(call(), first), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "implementation"), [case for case in everywhere() if case[1] != "reference"]
)
def test_calls_from_several_threads_at_once(name, implementation):
    operation = replace(OPERATIONS[name], sizes=LARGE)
    jobs = [fresh(operation, implementation, seed, torch.float32) for seed in range(3)]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            found = list(pool.map(lambda job: job(), jobs))
            assert all(same_bits(x, y) for x, y in zip(found, expected))
