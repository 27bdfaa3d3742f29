"""Score methods as data: regions and maps give the relative positions of the definition."""

import inspect

import pytest
import torch
from score_examples import EXAMPLES

from extrope_kernels.scores import SCORES, PositionMap


def make(name):
    known = inspect.signature(SCORES[name]).parameters
    return SCORES[name](**{k: v for k, v in EXAMPLES[name].parameters.items() if k in known})


def relative(score, seqlen):
    """[i][j] of the formula in scores/base.py; NaN where no region holds the pair."""
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None]
    block = i // score.granularity * score.granularity
    seen = torch.full((seqlen, seqlen), torch.nan, dtype=torch.float64)
    for region in score.regions:
        here = (j >= block + region.start) & (j <= i)
        seen = torch.where(here, region.q_map(i) - region.k_map(j), seen)
    return seen


def test_every_score_has_an_example():
    assert list(EXAMPLES) == list(SCORES)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("seqlen", [1, 5, 64])
def test_regions_give_the_definition(name, seqlen):
    example = EXAMPLES[name]
    want = example.relative(seqlen, seqlen, **example.parameters).seen
    torch.testing.assert_close(
        relative(make(name), seqlen), want, equal_nan=True, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_far_keys_are_stored_as_they_are_seen(name):
    score = make(name)
    assert score.stored == score.regions[0].k_map
    assert len(score.maps) == len(score.stored_maps) == 5 * (2 * len(score.regions) + 1)
    assert score.starts == sorted(score.starts)


def test_plain_attention_has_one_region():
    assert len(SCORES["rerope"](4, 1.0).regions) == len(SCORES["self_extend"](4, 1).regions) == 1


def test_position_map():
    p = torch.tensor([-1, 0, 1, 5, 7])
    assert PositionMap()(p).tolist() == p.tolist()
    assert PositionMap(modulus=4, offset=4, cap=6)(p).tolist() == [6, 4, 5, 5, 6]
    assert PositionMap(divisor=2, floor=True, offset=1)(p).tolist() == [0, 1, 1, 3, 4]
    assert PositionMap(divisor=float("inf"), offset=3)(p).tolist() == [3] * 5


@pytest.mark.parametrize(
    "name, parameters, refusal",
    [
        ("rerope", {"window": 0}, "rerope: window must be >= 1, got 0"),
        ("rerope", {"window": True}, "rerope: window must be an int, got bool"),
        ("rerope", {"window": 4, "factor": 0.0}, "rerope: factor must be > 0"),
        (
            "rerope",
            {"window": 4, "factor": float("nan")},
            r"rerope: factor must be > 0 .*, got nan",
        ),
        (
            "self_extend",
            {"window": 5, "factor": 2},
            "self_extend: grouped needs a window that is a multiple",
        ),
        (
            "self_extend",
            {"window": 4, "factor": 1.5},
            "self_extend: grouped needs an integer factor",
        ),
        ("dual_chunk", {"chunk_size": 4, "local_window": 4}, "local_window must be less than"),
        ("dual_chunk", {"chunk_size": 4, "local_window": -1}, "local_window must be >= 0"),
        ("blockwise_causal", {"block_size": 7}, "block_size must be even, got 7"),
        ("string", {"shift": 4, "window": 5}, "string: window must be at most shift 4, got 5"),
        ("string", {"shift": 2**62, "window": 5}, r"string: shift must be < 2\*\*62"),
    ],
)
def test_nonsense_is_refused(name, parameters, refusal):
    with pytest.raises((TypeError, ValueError), match=refusal):
        SCORES[name](**parameters)
