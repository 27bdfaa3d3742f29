"""Resonance RoPE: whole wavelengths."""

from __future__ import annotations

import math
from dataclasses import replace

from .._names import explains_wrong_calls
from .base import RopeFreqs, check_freqs


@explains_wrong_calls
def resonance(freqs: RopeFreqs) -> RopeFreqs:
    """Resonance RoPE: any method's wavelengths rounded to whole numbers of tokens.

    theta'_i = 2 pi / round(2 pi / theta_i)

    A pair then repeats after whole wavelengths: beyond the trained length the fast pairs meet only
    angles that they were trained on. The authors' cosines repeat to the bit, these as far as theta'
    is exact in float32. Pairs that do not rotate stay so; a wavelength below one token becomes one.

    freqs: from any method; its other fields stay as they are.

    Raises TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2403.00071
    """
    check_freqs("resonance", freqs)
    wavelengths = (2 * math.pi / freqs.inv_freq).round().clamp(min=1)
    return replace(freqs, inv_freq=2 * math.pi / wavelengths)
