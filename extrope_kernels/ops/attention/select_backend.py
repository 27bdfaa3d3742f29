"""Select the GPU backend of attention if none is named: Triton, or what EXTROPE_ATTENTION names.

Triton takes every call. The composition over flash-attn takes fewer, by functions that its packages
keep to themselves, and no GPU has shown where it is faster.
"""

from __future__ import annotations

import os

from . import flash_attn

VARIABLE = "EXTROPE_ATTENTION"
_NAMES = ("triton", "flash_attn")


def select_backend() -> str:
    """Return the backend's name; raise if the environment names one that cannot run here."""
    name = os.environ.get(VARIABLE) or "triton"
    if name not in _NAMES:
        raise ValueError(f"attention: {VARIABLE} must be {' or '.join(_NAMES)}, got {name!r}")
    if name == "flash_attn" and (reason := flash_attn.missing()):
        raise NotImplementedError(f"attention: {VARIABLE}={name} cannot run here: {reason}")
    return name


def selection() -> str:
    """Describe the selection in a line, for `extrope info`."""
    try:
        return select_backend()
    except (ValueError, NotImplementedError) as error:
        return str(error)
