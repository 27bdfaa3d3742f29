"""The same bits in every run, on any number of threads, and from several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.operations import OPERATIONS, everywhere

each = pytest.mark.parametrize(("name", "implementation"), everywhere())


def same_bits(found, expected) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(found, expected))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each
def test_every_run_and_any_number_of_threads(name, implementation, dtype):
    """PyTorch's own operations, the reference's, promise this for one number of threads alone:
    where a thread's share ends, exp takes other instructions."""
    operation = OPERATIONS[name]
    tensors = operation.inputs(dtype)
    first = operation.run(implementation, **tensors)
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 3) if implementation != "reference" else (threads,):
            torch.set_num_threads(count)
            found = operation.run(implementation, **tensors)
            assert same_bits(found, first), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "implementation"), [case for case in everywhere() if case[1] != "reference"]
)
def test_calls_from_several_threads_at_once(name, implementation):
    operation = OPERATIONS[name]
    jobs = [operation.inputs(torch.float32, seed) for seed in range(3)]
    expected = [operation.run(implementation, **tensors) for tensors in jobs]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            found = list(pool.map(lambda tensors: operation.run(implementation, **tensors), jobs))
            assert all(same_bits(x, y) for x, y in zip(found, expected))
