"""What the tests of positions share: generators, and a test of uniformity."""

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def assert_uniform(values, low, high, variance=1.0):
    """Pearson's statistic over {low, ..., high} stays below its 0.999 quantile.

    `variance`: of a count, as a fraction of what independent values would have.
    """
    quantiles = {3: 16.27, 7: 24.32, 9: 27.88, 19: 43.82, 34: 65.25, 48: 84.04}
    values = values.flatten()
    assert values.min() == low and values.max() == high
    counts = (values - low).bincount().double()
    expected = values.numel() / counts.numel()
    statistic = ((counts - expected) ** 2).sum().item() / expected / variance
    assert statistic < quantiles[counts.numel() - 1], statistic
