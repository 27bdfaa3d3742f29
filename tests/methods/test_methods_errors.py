"""Ranges, and what cannot be together; single wrong arguments are in tests/all_ops."""

import math
import re

import pytest
from support.method_examples import DIM, EXAMPLES
from support.method_examples import LENGTH as L

from extrope_kernels.methods import METHODS

each_method = pytest.mark.parametrize("name", METHODS)


def takes(*names):
    """Return (method, argument) for every method that has one of the arguments."""
    return [
        (method, name)
        for method in METHODS
        for name in names
        if name in (METHODS[method].__kwdefaults__ or {}) or name in EXAMPLES[method]
    ]


def refuse(method, error, message, dim=DIM, **changes):
    with pytest.raises(error, match=re.escape(f"{method}: {message}")):
        METHODS[method](dim, **{**EXAMPLES[method], **changes})


@pytest.mark.parametrize("name", ["ntk_aware", "dynamic_ntk", "ntk_by_parts", "axial"])
def test_dim_2_has_no_ntk_base_and_no_two_axes(name):
    refuse(name, ValueError, "dim must be >= 4, got 2", dim=2)


@pytest.mark.parametrize(
    ("method", "argument"),
    takes("base", "factor", "power", "exponent", "gamma", "scale_base", "partial_rotary_factor"),
)
def test_numbers_are_finite(method, argument):
    for value in (math.nan, math.inf, -math.inf):
        refuse(method, ValueError, f"{argument} must be finite, got {value}", **{argument: value})


@pytest.mark.parametrize(
    ("method", "argument"), takes(L, "max_position_embeddings", "truncate_pos", "seq_len")
)
def test_lengths_are_whole(method, argument):
    for value in (2**62, 1e300):
        refuse(method, ValueError, f"{argument} must be < 2**62, got {value}", **{argument: value})
    whole = f"{argument} must be a whole number of tokens, got 2.5"
    refuse(method, ValueError, whole, **{argument: 2.5})


GIRAFFE = ("giraffe_power", "giraffe_truncation")
RANGES = [
    *((name, "factor", 0.5, ">= 1") for name in GIRAFFE),
    *(
        (name, "factor", value, "between 1e-37 and 1e37")
        for name, _ in takes("factor")
        for value in (1e-38, 1e38)
        if name not in GIRAFFE
    ),
    *((name, "power", -0.5, ">= 0") for name in GIRAFFE),
    ("ntk_mixed", "exponent", -0.1, ">= 0"),
    ("ntk_mixed", "exponent", 1.1, "<= 1"),
    ("proportional", "partial_rotary_factor", -0.1, ">= 0"),
    ("proportional", "partial_rotary_factor", 1.5, "<= 1"),
    *(("ntk_by_parts", name, 1.5, "<= 1") for name in ("ntk_factor", "extrapolation_factor")),
    *(("ntk_by_parts", name, -1, ">= 0") for name in ("ntk_factor", "extrapolation_factor")),
    *((name, "attention_factor", 0, "> 0") for name, _ in takes("attention_factor")),
    *((name, "mscale", -1, ">= 0") for name in ("yarn", "dynamic_yarn")),
    *((name, "mscale_all_dim", -1, ">= 0") for name in ("yarn", "dynamic_yarn")),
]


@pytest.mark.parametrize(("method", "argument", "value", "bound"), RANGES)
def test_ranges(method, argument, value, bound):
    refuse(method, ValueError, f"{argument} must be {bound}, got {value}", **{argument: value})


PAPER = {"variant": "paper"}
OTHERS = [
    (
        "llama3",
        {"low_freq_factor": 5},
        "high_freq_factor must be >= low_freq_factor, got 4.0 and 5",
    ),
    ("llama3", {"high_freq_factor": 0.5}, "high_freq_factor must be >= low_freq_factor, got 0.5"),
    ("yarn", {"beta_slow": 1e-320}, "beta_slow must be >= 1e-30, got 1e-320"),
    ("mrrope", {"beta_slow": 1e-320}, "beta_slow must be >= 1e-30, got 1e-320"),
    ("yarn", {"beta_fast": 1, "beta_slow": 32}, "beta_fast must be >= beta_slow, got 1 and 32"),
    ("dynamic_yarn", {"beta_fast": 0.5}, "beta_fast must be >= beta_slow, got 0.5 and 1.0"),
    ("ntk_by_parts", {"beta_0": 0.5}, "beta_0 must be >= beta_1, got 0.5 and 0.75"),
    ("ntk_by_parts", {"gamma_1": 17}, "gamma_0 must be >= gamma_1, got 16 and 17"),
    ("ntk_by_parts", {**PAPER, "beta_fast": 0.5}, "beta_fast must be >= beta_slow, got 0.5"),
    ("yarn", {L: 1}, f"{L} and base must let some pair of dims make between 1 and 32 rotations"),
    ("ntk_by_parts", {"beta_fast": 16.0}, "beta_fast must be left out for variant 'pr1', got 16.0"),
    ("ntk_by_parts", {**PAPER, "gamma_0": 8}, "gamma_0 must be left out for variant 'paper', got"),
    ("longrope", {"long_factor": [1.0] * 7 + [0]}, "long_factor[7] must be > 0, got 0"),
    ("longrope", {L: 1}, f"{L} must be > 1, got 1"),
    (
        "longrope",
        {"factor": None},
        "one of factor, max_position_embeddings and attention_factor must be given, got None",
    ),
    (
        "dynamic_yarn",
        {"finetuned": True},
        "max_position_embeddings must be given when finetuned, got None",
    ),
]


@pytest.mark.parametrize(("method", "changes", "message"), OTHERS)
def test_impossible_together(method, changes, message):
    refuse(method, ValueError, message, **changes)


@each_method
def test_arguments_after_dim_are_keywords(name):
    with pytest.raises(TypeError, match="positional argument"):
        METHODS[name](16, 10000.0)
