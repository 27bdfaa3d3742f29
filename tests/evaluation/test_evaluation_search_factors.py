"""Factors that rise, and what moves them."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from extrope_kernels import methods
from extrope_kernels.evaluation.search.factors import Descent, Evolution, rising


def test_rising_is_isotonic_regression():
    """By its closed form: the largest over starts of the smallest over ends of means."""
    drawn = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 16):
        values = torch.randn(count, generator=drawn, dtype=torch.float64)
        wanted = [
            max(
                min(values[start : end + 1].mean().item() for end in range(i, count))
                for start in range(i + 1)
            )
            for i in range(count)
        ]
        torch.testing.assert_close(rising(values), torch.tensor(wanted, dtype=torch.float64))


def test_descent_finds_the_least_of_a_bowl_that_is_steep_in_one_pair():
    """As of angles: the curvature of a pair's loss is that of a cosine at the farthest distance."""
    angles = torch.tensor([30.0, 1.0], dtype=torch.float64)
    least = torch.tensor([0.02, 0.4], dtype=torch.float64)
    drawn = torch.Generator().manual_seed(0)
    descent = Descent(torch.zeros(2, dtype=torch.float64), angles)

    def loss(at):
        return ((at - least) * angles).square().sum().item()

    for _ in range(60):
        noise = torch.randn(4, 2, generator=drawn, dtype=torch.float64) * angles / 10
        tried = descent.step(angles**2 * (descent.log_factors - least) + noise)
        assert (tried.diff() >= 0).all()
        descent.tell(tried, loss(tried) < loss(descent.log_factors))
    assert ((descent.log_factors - least).abs() * angles < 0.1).all()


def test_steps_are_short_and_what_is_not_better_is_taken_back():
    start = torch.zeros(3, dtype=torch.float64)
    descent = Descent(start, torch.tensor([1000.0, 20.0, 1.0]))
    downhill = -torch.ones(4, 3, dtype=torch.float64)
    first = descent.step(downhill)
    largest = torch.tensor([0.001, 0.05, 0.1], dtype=torch.float64)
    torch.testing.assert_close(first, largest)
    descent.tell(first, better=False)
    assert descent.log_factors is start
    torch.testing.assert_close(descent.step(downhill), largest / 4)
    descent.tell(first, better=True)
    assert descent.log_factors is first


def test_one_text_does_not_decide_a_step():
    """One gradient of a thousand times the others is as one of four that say nothing."""
    descent = Descent(torch.zeros(2, dtype=torch.float64), torch.ones(2))
    gradients = torch.tensor([[-1000.0, -1.0], [1.0, -1.0], [1.0, -1.0], [1.0, -1.0]])
    tried = descent.step(gradients.double())
    assert 0 < tried[0] < 0.51 * tried[1] and tried[1] == pytest.approx(0.1)


def test_evolution_keeps_what_is_better():
    evolution = Evolution(torch.zeros(8, dtype=torch.float64), seed=0)
    wanted = torch.linspace(0, 1, 8, dtype=torch.float64)

    def loss(at):
        return (at - wanted).square().sum().item()

    for _ in range(300):
        tried = evolution.mutation()
        assert (tried.diff() >= 0).all()
        evolution.tell(tried, loss(tried) < loss(evolution.log_factors))
    assert loss(evolution.log_factors) < 0.1 * loss(torch.zeros(8))


def test_longrope_hands_gradients_to_its_factors():
    factors = torch.tensor([1.0, 1.5, 2.0, 4.0], requires_grad=True)
    freqs = methods.longrope(
        8, short_factor=factors, long_factor=[1.0] * 4, seq_len=4, factor=2.0,
        original_max_position_embeddings=4,
    )  # fmt: skip
    same = methods.longrope(
        8, short_factor=factors.tolist(), long_factor=[1.0] * 4, seq_len=4, factor=2.0,
        original_max_position_embeddings=4,
    )  # fmt: skip
    assert torch.equal(freqs.inv_freq, same.inv_freq)
    freqs.inv_freq.sum().backward()
    torch.testing.assert_close(factors.grad, -same.inv_freq / factors.detach())
