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
    """Curvatures of 100 and 0.01, gradients of texts that spread by their roots, as Fisher's."""
    curvature = torch.tensor([100.0, 0.01], dtype=torch.float64)
    least = torch.tensor([0.01, 0.4], dtype=torch.float64)
    drawn = torch.Generator().manual_seed(0)
    descent = Descent(torch.zeros(2, dtype=torch.float64), tokens=1000)
    for _ in range(200):
        noise = torch.randn(2, generator=drawn, dtype=torch.float64) * (curvature / 1000).sqrt()
        descent.step(curvature * (descent.log_factors - least) + noise)
        assert (descent.log_factors.diff() >= 0).all()
    # A step takes in four texts: their mean spreads by half of that, over the curvature.
    spread = 0.5 / (1000 * curvature).sqrt()
    assert ((descent.log_factors - least).abs() < 4 * spread).all()


def test_first_gradients_only_tell_the_spread():
    start = torch.zeros(3, dtype=torch.float64)
    descent = Descent(start, tokens=1)
    for _ in range(3):
        descent.step(torch.ones(3, dtype=torch.float64))
        assert descent.log_factors is start
    descent.step(torch.ones(3, dtype=torch.float64))
    assert (descent.log_factors == -0.1).all()  # the largest step


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
