"""Randomized positions: Floyd's algorithm without its loop, exactly uniform, in work of seqlen."""

import itertools
import math
from collections import Counter

import pytest
import torch
from support.position_checks import assert_uniform, seeded, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from extrope_kernels import positions
from extrope_kernels.positions.randomized import choose


def floyd(draws, max_len):
    """The algorithm as it was published, one draw after the other."""
    chosen = set()
    for step, draw in enumerate(draws, max_len - len(draws)):
        chosen.add(step if draw in chosen else draw)
    return sorted(chosen)


@pytest.mark.parametrize(("n", "max_len"), [(1, 1), (1, 4), (2, 5), (3, 6), (4, 4), (4, 6), (5, 6)])
def test_choice_over_all_draws(n, max_len):
    """Every draw there is, each once: all choices come equally often, and Floyd's are ours."""
    draws = list(itertools.product(*(range(step + 1) for step in range(max_len - n, max_len))))
    chosen = choose(torch.tensor(draws), max_len).tolist()
    assert chosen == [floyd(draw, max_len) for draw in draws]
    counts = Counter(map(tuple, chosen))
    assert len(counts) == math.comb(max_len, n) and len(set(counts.values())) == 1


@pytest.mark.parametrize("max_len", [500, 501, 700, 5000, 10**6])
def test_choice_is_floyds(max_len):
    last = torch.arange(max_len - 500, max_len)
    draws = torch.randint(2**62, (4, 500), generator=seeded()) % (last + 1)
    assert choose(draws, max_len).tolist() == [floyd(row, max_len) for row in draws.tolist()]


@pytest.mark.parametrize(("n", "max_len"), [(1, 1), (7, 7), (6, 7), (40, 2048), (1000, 10**6)])
def test_randomized_rises_within_range(n, max_len):
    drawn = positions.randomized(n, max_len, batch=50, generator=seeded())
    assert drawn.shape == (50, n)
    assert drawn.min() >= 0 and drawn.max() < max_len
    assert (drawn.diff(dim=-1) > 0).all()


def test_randomized_choices_and_marginals_are_uniform():
    pairs = positions.randomized(2, 5, batch=20_000, generator=seeded())
    number = {pair: i for i, pair in enumerate(itertools.combinations(range(5), 2))}
    assert_uniform(torch.tensor([number[tuple(pair)] for pair in pairs.tolist()]), 0, 9)
    # A count of a choice without repetition varies by (1 - n/M) M/(M - 1) of the independent one.
    drawn = positions.randomized(7, 20, batch=5_000, generator=seeded(1))
    assert_uniform(drawn, 0, 19, variance=(1 - 7 / 20) * 20 / 19)
    drawn = positions.randomized(1000, 10**6, batch=20, generator=seeded(2))
    assert_uniform(drawn // 10**5, 0, 9)


def test_randomized_is_shared_or_per_sequence():
    shared = positions.randomized(10, 1000, generator=seeded())
    assert shared.shape == (10,)
    single = positions.randomized(10, 1000, batch=1, generator=seeded())
    assert torch.equal(single, shared.unsqueeze(0))
    rows = positions.randomized(10, 1000, batch=5, generator=seeded())
    assert len(set(map(tuple, rows.tolist()))) == 5


class Work(TorchDispatchMode):
    """Records the number of elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.sizes, self.drawn = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tensors(result) if isinstance(t, torch.Tensor)]
        self.sizes += made
        if "rand" in func.__name__:
            self.drawn += sum(made)
        return result


@pytest.mark.parametrize("n", [1, 64, 4096])
def test_randomized_work_does_not_grow_with_max_len(n):
    work = {}
    for max_len in (2 * n, 10**6):
        with Work() as work[max_len]:
            positions.randomized(n, max_len, generator=seeded())
        assert work[max_len].drawn == n
        assert max(work[max_len].sizes) == n
    # Only the pointers' doublings vary, and fall where draws seldom meet.
    assert sum(work[10**6].sizes) <= sum(work[2 * n].sizes)
