"""Frequency methods: pure functions from a rotary dimension to `RopeFreqs`.

Every function takes `dim`, the rotary dimension, and all else by keyword. `METHODS` names them all;
the functions in `WRAPPERS` change the `RopeFreqs` of any method.

The tables are computed on the CPU with the authors' own float32 operations, in their order. They
have the bits of the authors' code on the same machine: torch's pow and exp may differ in the last
bit between CPU families. `RopeFreqs.to` moves them to a device.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .._names import AXES, no_attribute
from ._hf_source import is_bounded as is_bounded
from ._hf_source import stray as stray
from ._ramp import yarn_temperature as yarn_temperature

# "as" exports them to type checkers, which cannot read __all__ from the table.
from .abf import abf as abf
from .axial import axial as axial
from .base import RopeFreqs
from .by_axis import by_axis as by_axis
from .cope import cope as cope
from .dynamic_ntk import dynamic_ntk as dynamic_ntk
from .dynamic_yarn import dynamic_yarn as dynamic_yarn
from .giraffe_power import giraffe_power as giraffe_power
from .giraffe_truncation import giraffe_truncation as giraffe_truncation
from .hf_config import from_hf_config, trained
from .hf_config import stated_yarn as stated_yarn
from .hf_lengths import Lengths as Lengths
from .hf_lengths import lengths
from .llama3 import llama3 as llama3
from .longrope import longrope as longrope
from .mrrope import mrrope as mrrope
from .ms_poe import ms_poe as ms_poe
from .nope import nope as nope
from .ntk_aware import ntk_aware as ntk_aware
from .ntk_by_parts import ntk_by_parts as ntk_by_parts
from .ntk_mixed import ntk_mixed as ntk_mixed
from .pi import pi as pi
from .proportional import proportional as proportional
from .resonance import resonance as resonance
from .rope import rope as rope
from .sections import with_sections as with_sections
from .xpos import xpos as xpos
from .yarn import yarn as yarn

METHODS: dict[str, Callable[..., RopeFreqs]] = {
    method.__name__: method
    for method in (
        rope,
        abf,
        pi,
        ntk_aware,
        dynamic_ntk,
        ntk_by_parts,
        ntk_mixed,
        yarn,
        dynamic_yarn,
        giraffe_power,
        giraffe_truncation,
        xpos,
        llama3,
        longrope,
        proportional,
        axial,
        cope,
        mrrope,
        nope,
    )
}
# These change the frequencies of any method.
WRAPPERS: dict[str, Callable[..., RopeFreqs]] = {
    wrapper.__name__: wrapper for wrapper in (with_sections, by_axis, resonance, ms_poe)
}
AXES[__name__] = (*METHODS, *WRAPPERS)

__all__ = ["METHODS", "WRAPPERS", "RopeFreqs", "from_hf_config", "lengths", "trained"]
__all__ += [*WRAPPERS, *METHODS]

if not TYPE_CHECKING:  # to type checkers every name would exist

    def __getattr__(name: str) -> None:
        """Say where a score method is, or what was meant."""
        raise no_attribute(__name__, name, AXES[__name__])
