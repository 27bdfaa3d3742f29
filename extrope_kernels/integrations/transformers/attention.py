"""The ops that attend, by the one place where this folder imports them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import RopeFreqs
from ...ops.attention import attend
from ...ops.decode import attend_with_kvcache
from ...scores import Score
from .._shared.plain import PLAIN


def rope_attention(
    q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, score: Score | None = None, **options: Any
) -> Tensor:
    return attend(score or PLAIN, q, k, v, freqs, op="extend", **options)


def rope_attention_with_kvcache(
    q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, score: Score | None = None, **options: Any
) -> Tensor:
    return attend_with_kvcache(score or PLAIN, q, k, v, freqs, op="extend", **options)


def no_freqs(x: Tensor) -> RopeFreqs:
    """Return frequencies of 0, for queries and keys that a layer has rotated itself, or never."""
    return RopeFreqs(torch.zeros(1, dtype=torch.float32, device=x.device))


def sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, score: Score | None = None, **options: Any
) -> Tensor:
    from ... import distributed

    return distributed.attend(score or PLAIN, q, k, v, freqs, op="extend", **options)
