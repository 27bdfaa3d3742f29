"""Nonsense is refused with the strategy's name, what was expected and what came."""

import re

import numpy as np
import pytest
import torch

from extrope_kernels import positions

VALID = {
    "shape": {"batch": 2, "seqlen": 8, "max_shift": 20},
    "randomized": {"seqlen": 8, "max_len": 64, "batch": 2},
    "random_padding": {"batch": 2, "num_tokens": 5, "length": 16},
    "pose": {"batch": 2, "num_tokens": 50, "train_length": 16, "target_length": 64},
    "giraffe_randomized": {"batch": 2, "seqlen": 8},
}
each_strategy = pytest.mark.parametrize("name", VALID)
COUNTS = [
    (name, argument)
    for name in VALID
    for argument in VALID[name]
    if argument not in ("max_shift", "num_tokens")
]
AT_LEAST_0 = [("shape", "max_shift"), ("random_padding", "num_fixed_prefix")]


def refuse(name, error, message, **changes):
    with pytest.raises(error, match=f"^{re.escape(f'positions.{name}: {message}')}$"):
        getattr(positions, name)(**{**VALID[name], **changes})


@each_strategy
def test_valid_arguments_pass(name):
    getattr(positions, name)(**VALID[name])
    getattr(positions, name)(**{key: np.int64(value) for key, value in VALID[name].items()})


@pytest.mark.parametrize(
    ("name", "argument", "least"),
    [(*one, 1) for one in (*COUNTS, ("shape", "max_len"))] + [(*one, 0) for one in AT_LEAST_0],
)
def test_counts_are_ints_that_fit_int32(name, argument, least):
    for value in (least - 1, -1):
        message = f"{argument} must be >= {least}, got {value}"
        refuse(name, ValueError, message, **{argument: value})
    refuse(name, ValueError, f"{argument} must be < 2**31, got {2**31}", **{argument: 2**31})
    for value in ("8", 8.0, True, [8]):
        message = f"{argument} must be an int, got {type(value).__name__}"
        refuse(name, TypeError, message, **{argument: value})


@each_strategy
def test_generator_and_device(name):
    # Without a GPU there is no such generator to be had; only its device is looked at.
    class OnGpu(torch.Generator):
        device = torch.device("cuda:0")

    refuse(name, TypeError, "generator must be a torch.Generator or None, got int", generator=0)
    message = "generator must be on the CPU, got one on cuda:0"
    refuse(name, ValueError, message, generator=OnGpu())
    refuse(name, ValueError, "device must be a torch device, got 'gpu'", device="gpu")
    refuse(name, TypeError, "device must be a torch device, got 1.5", device=1.5)


@pytest.mark.parametrize("name", ["shape", "random_padding"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_training_is_a_bool(name, value):
    refuse(name, TypeError, f"training must be a bool, got {value!r}", training=value)


@pytest.mark.parametrize("value", ["k", "max", "", None, 1.0, True, ["K"]])
def test_shape_eval_shift_is_a_known_name_or_an_int(value):
    message = f'eval_shift must be "zero", "K" or an int, got {value!r}'
    refuse("shape", ValueError if isinstance(value, str) else TypeError, message, eval_shift=value)


FITS = "max_len must be >= seqlen + eval_shift (8 + "
OF_TOKENS = "num_tokens must be >= train_length (16) or the same in all documents, got "


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [
        ("shape", "eval_shift must be >= 0, got -1", {"eval_shift": -1}),
        ("shape", FITS + "0), got 7", {"max_len": 7}),
        ("shape", FITS + "20), got 27", {"max_len": 27, "eval_shift": "K"}),
        ("shape", FITS + "3), got 10", {"max_len": 10, "eval_shift": 3, "training": False}),
        ("randomized", "max_len must be >= seqlen (8), got 7", {"max_len": 7}),
        (
            "random_padding",
            "num_tokens must be <= length (16), got 17",
            {"num_tokens": [5, 17]},
        ),
        (
            "random_padding",
            "num_fixed_prefix must be <= num_tokens (5), got 6",
            {"num_tokens": [9, 5], "num_fixed_prefix": 6},
        ),
        ("pose", "target_length must be >= train_length (16), got 15", {"target_length": 15}),
        ("pose", OF_TOKENS + "[50, 9]", {"num_tokens": [50, 9]}),
        ("pose", OF_TOKENS + "[8, 9]", {"num_tokens": [8, 9]}),
    ],
)
def test_lengths_that_do_not_fit(name, message, changes):
    refuse(name, ValueError, message, **changes)


@pytest.mark.parametrize("name", ["random_padding", "pose"])
def test_num_tokens(name):
    def fails(error, message, value):
        refuse(name, error, f"num_tokens must {message}", num_tokens=value)

    for value in (5.0, "55", None, {5, 6}):
        fails(TypeError, f"be an int, or one int per sequence, got {value!r}", value)
    for value in (0, [5, 0], torch.tensor([0, 5])):
        fails(ValueError, "be >= 1, got 0", value)
    for value in (True, [5, True]):
        fails(TypeError, "be an int, got bool", value)
    fails(TypeError, "be an int, got float", [5, 5.0])
    for value in ([5], [5, 5, 5], torch.tensor([5, 5, 5])):
        fails(ValueError, f"have 2 entries, got {len(value)}", value)
    fails(ValueError, "have shape (2,), got (2, 1)", torch.tensor([[5], [5]]))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        fails(TypeError, f"hold integers, got a {dtype} tensor", torch.ones(2, dtype=dtype))
