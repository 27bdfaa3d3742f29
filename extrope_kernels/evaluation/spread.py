"""How far a number can be trusted: standard errors of means, intervals of shares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, None for one value or where one is not finite."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), None  # statistics raises errors of its own for these
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def share_interval(hits: int, trials: int) -> tuple[float, float]:
    """Return the interval of 95% of a share by Wilson's score, which holds for few trials, too.

    Paper: https://doi.org/10.1080/01621459.1927.10502953
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    share, spread = hits / trials, z**2 / trials
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = ((centre + side * half) / (1 + spread) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def with_error(mean: float, error: float | None, digits: int) -> str:
    """Return a cell of a table: 2.471, or 2.471±.012."""
    text = f"{mean:.{digits}f}"
    return text if error is None else f"{text}±{f'{error:.{digits}f}'.removeprefix('0')}"
