"""What a method takes where no number is given: its authors', as the docstrings name them."""

import inspect
import math

import pytest
import torch

from extrope_kernels import RopeFreqs, apply_rope
from extrope_kernels.methods import METHODS, WRAPPERS

YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "ramp": "index"}
PR1 = {"beta_0": 1.25, "beta_1": 0.75, "gamma_0": 16, "gamma_1": 2}
PR1 |= {"ntk_factor": 1.0, "extrapolation_factor": 1.0}
# Beside the base and those that are None. The bases: 500,000 of ABF's paper and of Llama 3.1, and
# RoPE's.
DEFAULTS = {
    "ntk_by_parts": {"variant": "pr1", **PR1, **YARN},
    "ntk_mixed": {"exponent": 0.625},
    "yarn": YARN,
    "dynamic_yarn": {"finetuned": False, **YARN},
    "giraffe_power": {"factor": 1.0},
    "giraffe_truncation": {"factor": 1.0, "power": 0.0},
    "xpos": {"scale_base": 512, "gamma": 0.4, "decay_origin": 0.0},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"factor": 1.0},
    "axial": {"axes": 2, "ladder": "own"},
    "cope": {"clip": 20},
    "mrrope": {"beta_fast": 32.0, "beta_slow": 1.0},
    "with_sections": {"interleaved": False},
    "ms_poe": {"min_ratio": 1.2, "max_ratio": 1.8, "group": 1},
}


def test_amplitudes_grow_from_position_0():
    freqs = RopeFreqs(torch.ones(1), log_decay=torch.ones(1))
    x = torch.ones(1, 2, 1, 2)
    growth = apply_rope(x, freqs).norm(dim=-1).flatten() / 2**0.5
    assert growth.tolist() == pytest.approx([1.0, math.e])


@pytest.mark.parametrize("name", [*METHODS, *WRAPPERS])
def test_defaults(name):
    parameters = inspect.signature((METHODS | WRAPPERS)[name]).parameters.values()
    given = {p.name: p.default for p in parameters if p.default not in (p.empty, None)}
    base = {"base": 5e5 if name in ("abf", "llama3") else 1e4}
    if name in (*WRAPPERS, "nope"):
        base = {}
    assert given == base | DEFAULTS.get(name, {})
