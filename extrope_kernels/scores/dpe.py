"""DPE, dimension-wise positional embeddings manipulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int, check_of_pairs
from .._names import explains_wrong_calls
from .base import FIRST_KEY, SAME, PairMap, Region, Score


@explains_wrong_calls
def dpe(window: int, group_sizes: Sequence[Any] | Tensor, pairs: int | None = None) -> Score:
    """DPE: SelfExtend whose group size differs from one group of pairs of dims to the next.

    For pair n with group size s: i - j where i - j < window, else
    i // s - j // s + window - window // s.

    Slow pairs bear large groups; measure a model's recall to find which pairs need small ones.
    The authors' choice for Llama-3-8B: window=1024, group_sizes=[2, 8, 2, 8, 32, 32, 32, 4],
    pairs=64. If the window is no multiple of a size, the authors' prefill adds window / s, their
    decoding and this function window // s. A size of 1 leaves a pair unchanged (their top-k dims).

    window: in tokens.
    group_sizes: whole numbers >= 1, one per pair. With the argument pairs: one per equal part of
        the pairs.
    pairs: the number of pairs that rotate, rotary_dim/2; a multiple of the number of sizes.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.

    Paper: https://arxiv.org/abs/2504.18857
    """
    window = check_int("dpe", "window", window, at_least=1)
    sizes = check_of_pairs("dpe", "group_sizes", group_sizes)
    if not torch.compiler.is_compiling() and (sizes != sizes.round()).any():
        raise ValueError(f"dpe: group_sizes must be whole numbers >= 1, got {sizes.tolist()}")
    if pairs is not None:
        parts, over = divmod(check_int("dpe", "pairs", pairs, at_least=1, bits=20), sizes.shape[-1])
        if over:
            raise ValueError(
                f"dpe: pairs must be a multiple of the {sizes.shape[-1]} group_sizes, got {pairs}"
            )
        sizes = sizes.repeat_interleave(parts, -1)
    far_query = PairMap(sizes, window - (window / sizes).floor(), floor=True)
    far = Region(FIRST_KEY, far_query, PairMap(sizes, floor=True))
    near = Region(1 - window, SAME, SAME)
    given = {"window": window, "group_sizes": sizes}
    return Score("dpe", (far, near), given=given)
