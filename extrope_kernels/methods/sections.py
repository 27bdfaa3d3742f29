"""mRoPE: positions of several axes (time, height, width) in one rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .._checks import check_bool, check_length
from .._names import explains_wrong_calls
from .base import RopeFreqs, check_freqs


@explains_wrong_calls
def with_sections(
    freqs: RopeFreqs, sections: Sequence[int], *, interleaved: bool = False
) -> RopeFreqs:
    """mRoPE: an axis of the positions (time, height, width) for every frequency.

    The rotation then takes positions of shape (axes, batch, seqlen), such as the position_ids of
    Qwen2-VL's and Qwen3-VL's get_rope_index.

    freqs: from any method.
    sections: mrope_section of the model's configuration: the number of frequencies of each axis, in
        order; they add up to rotary_dim/2.
    interleaved: False for consecutive sections (Qwen2-VL, Qwen2.5-VL): [2, 3, 3] is tthhhwww. True
        for axis after axis until an axis has all of its frequencies; the first axis takes those
        left (Qwen3-VL, mrope_interleaved): [4, 2, 2] is thwthwtt.

    Models with other orders (Ernie 4.5 VL) set `axes` of RopeFreqs themselves.

    Raises ValueError where the sections do not fit the frequencies, TypeError for an argument of
    the wrong kind.
    Paper: https://arxiv.org/abs/2409.12191
    """
    name = "with_sections"
    check_freqs(name, freqs)
    if isinstance(sections, str | bytes) or not isinstance(sections, Sequence) or not sections:
        raise TypeError(f"{name}: sections must be a list of ints, got {sections!r}")
    sizes = [check_length(name, f"sections[{i}]", size) for i, size in enumerate(sections)]
    check_bool(name, "interleaved", interleaved)
    pairs = freqs.inv_freq.shape[-1]
    if sum(sizes) != pairs:
        raise ValueError(f"{name}: sections must add up to {pairs} frequencies, got {sizes}")
    axes = [axis for axis, size in enumerate(sizes) for _ in range(size)]
    if interleaved:
        axes = [0] * pairs
        for axis, size in enumerate(sizes[1:], start=1):
            places = range(axis, pairs, len(sizes))[:size]
            if len(places) < size:
                raise ValueError(
                    f"{name}: axis {axis} must have at most {len(places)} of {pairs} frequencies "
                    f"when interleaved, got sections {sizes}"
                )
            for place in places:
                axes[place] = axis
    return replace(freqs, axes=torch.tensor(axes, dtype=torch.int32, device=freqs.inv_freq.device))
