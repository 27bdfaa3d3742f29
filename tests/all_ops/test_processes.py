"""Forked children, data loaders and threads: the kernels run in all of them."""

from __future__ import annotations

import pytest
import torch

from extrope_kernels import _ext

pytestmark = pytest.mark.skipif(
    _ext.load("cpu") is not None or torch.cuda.is_available(), reason="about the CPU's kernels"
)

# Large enough that every call is shared out over threads.
SETUP = """
import os, signal, sys, threading
signal.alarm(240)  # a deadlock ends here
import torch
from extrope_kernels import apply_rope, methods, rope_attention, scores

FREQS = methods.rope(64)

def work(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 300, h, 64, generator=generator) for h in (4, 2, 2))
    rotated = apply_rope(q.repeat(1, 9, 1, 1), FREQS)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = rope_attention(*leaves, FREQS, scores.rerope(50))
    return [rotated, out.detach(), *torch.autograd.grad(out.sum(), leaves)]

def same(found, expected):
    return all(torch.equal(x, y) for x, y in zip(found, expected))
"""


def test_forks_data_loaders_and_threads(run_python):
    """One process shows them all, beginning with what must come before its own first call.

    First calls from many threads load the library once, and none runs before it is there. A forked
    child has none of its parent's threads: with one of its own nothing waits for them. With more,
    GNU's OpenMP, which PyTorch's wheels bring, hangs in the child's first parallel region, be it
    one of PyTorch's own operations.
    """
    run_python(SETUP + THREADS + FORK + LOADER)


THREADS = """
def first(n):
    ready.wait()
    found[n] = work(0)

if (child := os.fork()) == 0:  # the parent has called nothing yet, and goes on so
    signal.alarm(120)
    torch.set_num_threads(2)
    ready, found = threading.Barrier(8), [None] * 8
    threads = [threading.Thread(target=first, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    expected = work(0)
    os._exit(0 if all(same(x, expected) for x in found) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
torch.set_num_threads(2)
"""
FORK = """
def fork():
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        torch.set_num_threads(1)
        found = work(0)
        os._exit(0 if all(x.isfinite().all() for x in found) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert same(work(0), work(0))

fork()  # before the parent has called anything, and after
fork()
"""
LOADER = """
from torch.utils.data import DataLoader, Dataset

class Rotated(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return work(index)[1][0]

expected = torch.stack([work(index)[1][0] for index in range(6)])
loader = DataLoader(Rotated(), batch_size=2, num_workers=2, multiprocessing_context="fork")
assert torch.equal(torch.cat(list(loader)), expected)
"""
