"""What does not fit together; single wrong arguments are in tests/all_ops."""

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


def refuse(name, error, message, **changes):
    with pytest.raises(error, match=f"^{re.escape(f'positions.{name}: {message}')}$"):
        getattr(positions, name)(**{**VALID[name], **changes})


@each_strategy
def test_valid_arguments_pass(name):
    getattr(positions, name)(**VALID[name])
    getattr(positions, name)(**{key: np.int64(value) for key, value in VALID[name].items()})


@each_strategy
def test_the_generator_draws_on_the_cpu(name):
    # Without a GPU there is no such generator to be had; only its device is looked at.
    class OnGpu(torch.Generator):
        device = torch.device("cuda:0")

    message = "generator must be on the CPU, got one on cuda:0"
    refuse(name, ValueError, message, generator=OnGpu())


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
