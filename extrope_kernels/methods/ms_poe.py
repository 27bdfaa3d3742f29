"""Ms-PoE: positions rescaled by another ratio in every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._checks import check_count, check_real
from .._names import explains_wrong_calls
from .base import RopeFreqs, check_freqs

_NAME = "ms_poe"


@explains_wrong_calls
def ms_poe(
    freqs: RopeFreqs,
    *,
    heads: int,
    min_ratio: float = 1.2,
    max_ratio: float = 1.8,
    order: Sequence[int] | None = None,
    group: int = 1,
) -> RopeFreqs:
    """Ms-PoE: any method's positions divided by a ratio that grows from head to head.

    theta_{h,i} = theta_i / r_h,  r = min_ratio + (max_ratio - min_ratio) * n / (heads/group - 1)
    for the n-th head of the order, n = 0, 1, 2, ...

    The authors order the heads of every layer by their awareness of positions: the share of keys
    that the last query gives more than three times the average attention, greatest first. Their
    code divides by the number of heads, so its greatest ratio stays below max_ratio.

    Heads of one group share a ratio, since queries and the keys that they see must. So attention
    takes ms_poe(freqs, heads=heads_k). Without it, if k has fewer heads than q, rotate them in two
    calls: `apply_rope` of k by the same, of q by ms_poe(freqs, heads=heads_q,
    group=heads_q // heads_k).

    freqs: from any method without log_decay. inv_freq becomes (1, heads, rotary_dim/2), or
        (batch, heads, rotary_dim/2) where it was (batch, rotary_dim/2).
    heads: heads of the tensor to rotate, a multiple of group.
    min_ratio, max_ratio: ratios of the first and the last head of the order,
        0 < min_ratio <= max_ratio <= 1e37.
    order: the numbers of the heads, or of the groups of heads, each once, smallest ratio first;
        None for 0, 1, 2, ...
    group: adjacent heads that share a ratio.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2403.04797
    """
    check_freqs(_NAME, freqs)
    if freqs.inv_freq.dim() > 2:
        shape = tuple(freqs.inv_freq.shape)
        raise ValueError(f"{_NAME}: inv_freq must be the same for all heads, got shape {shape}")
    if freqs.log_decay is not None:
        raise ValueError(f"{_NAME}: freqs must have no log_decay (XPOS), got some")
    heads, group = check_count(_NAME, "heads", heads), check_count(_NAME, "group", group)
    if heads % group:
        raise ValueError(f"{_NAME}: heads must be a multiple of group ({group}), got {heads}")
    low = check_real(_NAME, "min_ratio", min_ratio, above=0)
    high = check_real(_NAME, "max_ratio", max_ratio, at_least=low, at_most=1e37)
    places = _order(order, heads // group)
    ratios = torch.empty(heads // group, dtype=torch.float32, device="cpu")
    ratios[places] = torch.linspace(low, high, heads // group, dtype=torch.float32, device="cpu")
    ratios = ratios.repeat_interleave(group).to(freqs.inv_freq.device)
    inv_freq = freqs.inv_freq.unsqueeze(-2) / ratios.unsqueeze(-1)
    return replace(freqs, inv_freq=inv_freq.view(-1, *inv_freq.shape[-2:]))


def _order(order: Sequence[int] | None, count: int) -> Tensor:
    if order is None:
        return torch.arange(count, device="cpu")
    if isinstance(order, str | bytes) or not isinstance(order, Sequence):
        raise TypeError(f"{_NAME}: order must be a list of ints, got {order!r}")
    if any(isinstance(head, bool) or not isinstance(head, int) for head in order):
        raise TypeError(f"{_NAME}: order must hold ints, got {order!r}")
    if sorted(order) != list(range(count)):
        raise ValueError(f"{_NAME}: order must hold each of 0 .. {count - 1} once, got {order}")
    return torch.tensor(order, device="cpu")
