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
PER_ROW = pytest.mark.parametrize("name", ["random_padding", "pose"])


def refuse(name, error, message, **changes):
    with pytest.raises(error, match=f"^{re.escape(f'positions.{name}: {message}')}$"):
        getattr(positions, name)(**{**VALID[name], **changes})


@each_strategy
def test_valid_arguments_pass(name):
    getattr(positions, name)(**VALID[name])
    getattr(positions, name)(**{key: np.int64(value) for key, value in VALID[name].items()})


@pytest.mark.parametrize(("name", "argument"), [*COUNTS, ("shape", "max_len")])
def test_counts_are_positive_and_fit_int32(name, argument):
    for value in (0, -1):
        refuse(name, ValueError, f"{argument} must be >= 1, got {value}", **{argument: value})
    refuse(name, ValueError, f"{argument} must be < 2**31, got {2**31}", **{argument: 2**31})


@pytest.mark.parametrize(("name", "argument"), AT_LEAST_0)
def test_counts_that_may_be_0(name, argument):
    refuse(name, ValueError, f"{argument} must be >= 0, got -1", **{argument: -1})
    refuse(name, ValueError, f"{argument} must be < 2**31, got {2**31}", **{argument: 2**31})


@pytest.mark.parametrize(("name", "argument"), COUNTS + AT_LEAST_0)
@pytest.mark.parametrize("value", ["8", 8.0, True, [8]])
def test_counts_are_ints(name, argument, value):
    kind = type(value).__name__
    refuse(name, TypeError, f"{argument} must be an int, got {kind}", **{argument: value})


@each_strategy
def test_generator(name):
    refuse(name, TypeError, "generator must be a torch.Generator or None, got int", generator=0)


@each_strategy
def test_generator_of_another_device(name, monkeypatch):
    # Without a GPU there is no such generator to be had; only its device is looked at.
    class OnGpu(torch.Generator):
        device = torch.device("cuda:0")

    message = "generator must be on the CPU, got one on cuda:0"
    refuse(name, ValueError, message, generator=OnGpu())


@each_strategy
def test_device(name):
    refuse(name, ValueError, "device must be a torch device, got 'gpu'", device="gpu")
    refuse(name, TypeError, "device must be a torch device, got 1.5", device=1.5)


@pytest.mark.parametrize("name", ["shape", "random_padding"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_training_is_a_bool(name, value):
    refuse(name, TypeError, f"training must be a bool, got {value!r}", training=value)


@pytest.mark.parametrize("value", ["k", "max", ""])
def test_shape_eval_shift_is_a_known_name(value):
    message = f'eval_shift must be "zero", "K" or an int, got {value!r}'
    refuse("shape", ValueError, message, eval_shift=value)


@pytest.mark.parametrize("value", [None, 1.0, True, ["K"]])
def test_shape_eval_shift_is_a_name_or_an_int(value):
    message = f'eval_shift must be "zero", "K" or an int, got {value!r}'
    refuse("shape", TypeError, message, eval_shift=value)


def test_shape_eval_shift_is_not_negative():
    message = "eval_shift must be >= 0, got -1"
    refuse("shape", ValueError, message, eval_shift=-1)


@pytest.mark.parametrize("training", [True, False])
def test_shape_fits_max_len(training):
    def fails(message, **changes):
        refuse("shape", ValueError, message, training=training, **changes)

    fails("max_len must be >= seqlen + eval_shift (8 + 0), got 7", max_len=7)
    fails("max_len must be >= seqlen + eval_shift (8 + 20), got 27", max_len=27, eval_shift="K")
    fails("max_len must be >= seqlen + eval_shift (8 + 3), got 10", max_len=10, eval_shift=3)


def test_randomized_needs_room():
    refuse("randomized", ValueError, "max_len must be >= seqlen (8), got 7", max_len=7)


@PER_ROW
@pytest.mark.parametrize("value", [5.0, "55", None, {5, 6}])
def test_num_tokens_is_an_int_or_a_list(name, value):
    message = f"num_tokens must be an int, or one int per sequence, got {value!r}"
    refuse(name, TypeError, message, num_tokens=value)


@PER_ROW
def test_num_tokens_entries(name):
    for value in (0, [5, 0], torch.tensor([0, 5])):
        message = "num_tokens must be >= 1, got 0"
        refuse(name, ValueError, message, num_tokens=value)
    for value in (True, [5, True]):
        refuse(name, TypeError, "num_tokens must be an int, got bool", num_tokens=value)
    refuse(name, TypeError, "num_tokens must be an int, got float", num_tokens=[5, 5.0])


@PER_ROW
def test_num_tokens_is_one_per_sequence(name):
    for value in ([5], [5, 5, 5], torch.tensor([5, 5, 5])):
        message = f"num_tokens must have 2 entries, got {len(value)}"
        refuse(name, ValueError, message, num_tokens=value)
    message = "num_tokens must have shape (2,), got (2, 1)"
    refuse(name, ValueError, message, num_tokens=torch.tensor([[5], [5]]))


@PER_ROW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_num_tokens_tensor_holds_integers(name, dtype):
    message = f"num_tokens must hold integers, got a {dtype} tensor"
    refuse(name, TypeError, message, num_tokens=torch.ones(2, dtype=dtype))


def test_random_padding_tokens_fit():
    def fails(message, **changes):
        refuse("random_padding", ValueError, message, **changes)

    fails("num_tokens must be <= length (16), got 17", num_tokens=[5, 17])
    fails(
        "num_fixed_prefix must be <= num_tokens (5), got 6", num_tokens=[9, 5], num_fixed_prefix=6
    )


def test_pose_lengths():
    def fails(message, **changes):
        refuse("pose", ValueError, message, **changes)

    fails("target_length must be >= train_length (16), got 15", target_length=15)
    message = "num_tokens must be >= train_length (16) or the same in all documents, got "
    fails(message + "[50, 9]", num_tokens=[50, 9])
    fails(message + "[8, 9]", num_tokens=[8, 9])
