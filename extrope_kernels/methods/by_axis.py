"""A method for the pairs of some axes of positions (mRoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .._names import explains_wrong_calls
from .base import RopeFreqs, check_freqs, copy_to

_NAME = "by_axis"


@explains_wrong_calls
def by_axis(freqs: RopeFreqs, axes: Sequence[int], *, over: RopeFreqs) -> RopeFreqs:
    """By axis: any method's frequencies for some axes of mRoPE alone, the others as trained.

    A pair keeps its index, so YaRN blends it by its own wavelength, as on a model of one axis. The
    amplitude of `freqs` stays: it multiplies all dims, hence the whole logit. YaRN
    has none with attention_factor=1.

    [0] is time alone. Where sections are consecutive (Qwen2.5-VL) its pairs are the fastest, which
    YaRN leaves as they are: only its amplitude is new. [1, 2] with `ntk_aware` is what GIRAFFE's
    code, for Qwen2-VL, calls M-RoPE++: time as trained. Text has one position on all axes: past
    the trained length the pairs that stay meet angles that no training had.

    freqs: from any method without log_decay, over the same training.
    axes: the axes that take its frequencies: 0 for time, 1 for height, 2 for width.
    over: the frequencies that the model was trained with, and their axes: `methods.trained(config)`
        or `with_sections`.

    Raises ValueError for axes that `over` does not have, or frequencies that do not fit it;
    TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2412.12735
    """
    check_freqs(_NAME, freqs)
    check_freqs(_NAME, over, "over")
    if over.axes is None or over.inv_freq.shape != freqs.inv_freq.shape[-1:]:
        shape = tuple(over.inv_freq.shape)
        raise ValueError(
            f"{_NAME}: over must have an axis for each of {freqs.inv_freq.shape[-1]} pairs, got "
            f"{shape} frequencies {'without' if over.axes is None else 'with'} axes"
        )
    if freqs.log_decay is not None:
        raise ValueError(f"{_NAME}: freqs must have no log_decay (XPOS), got some")
    if isinstance(axes, str | bytes) or not isinstance(axes, Sequence) or not axes:
        raise TypeError(f"{_NAME}: axes must be a list of ints, got {axes!r}")
    known = over.axes.unique().tolist()
    if any(type(axis) is not int or axis not in known for axis in axes):
        names = ", ".join(map(str, known))
        raise ValueError(f"{_NAME}: axes must be among {names}, those of over, got {axes}")
    changed = torch.isin(over.axes, torch.tensor(axes, device=over.axes.device))
    device = freqs.inv_freq.device
    kept = copy_to(over.inv_freq, device)
    inv_freq = torch.where(copy_to(changed, device), freqs.inv_freq, kept)
    return replace(freqs, inv_freq=inv_freq, axes=over.axes.to(device))
