"""Score methods as data: regions and maps give the relative positions of the definition."""

import pytest
import torch
from score_examples import EXAMPLES, by_regions

from extrope_kernels.scores import SCORES, PositionMap

INF = float("inf")


def test_every_score_has_an_example():
    assert list(EXAMPLES) == list(SCORES)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("seqlen", [1, 5, 64])
def test_regions_give_the_definition(name, seqlen):
    want = EXAMPLES[name].relative(seqlen, seqlen).seen
    found = by_regions(seqlen, seqlen, EXAMPLES[name].score).seen
    torch.testing.assert_close(found, want, equal_nan=True, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EXAMPLES)
def test_far_keys_are_stored_as_they_are_seen(name):
    score = EXAMPLES[name].score
    assert score.name == name and score.stored == score.regions[0].k_map
    assert len(score.numbers) == 1 + 11 * len(score.regions)


def test_plain_attention_has_one_region():
    assert len(SCORES["rerope"](4, 1.0).regions) == len(SCORES["self_extend"](4, 1).regions) == 1


def test_position_map():
    p = torch.tensor([-1, 0, 1, 5, 7])
    assert PositionMap()(p).tolist() == p.tolist()
    assert PositionMap(modulus=4, offset=4, cap=6)(p).tolist() == [6, 4, 5, 5, 6]
    assert PositionMap(divisor=2, floor=True, offset=1)(p).tolist() == [0, 1, 1, 3, 4]
    assert PositionMap(divisor=INF, offset=3)(p).tolist() == [3] * 5
    for made in (PositionMap(), PositionMap(4, 2.5, True, -3.0, 6.0), PositionMap(divisor=INF)):
        assert PositionMap.read(made.numbers()) == made and INF not in made.numbers()


@pytest.mark.parametrize(
    "name, parameters, refusal",
    [
        ("rerope", (0,), "rerope: window must be >= 1, got 0"),
        ("rerope", (True,), "rerope: window must be an int, got bool"),
        ("rerope", (4, 0.0), "rerope: factor must be > 0"),
        ("leaky_rerope", (4, float("nan")), r"leaky_rerope: factor must be > 0 .*, got nan"),
        ("leaky_rerope", (4, "2"), "leaky_rerope: factor must be a number, got str"),
        ("self_extend", (5, 2), "self_extend: window must be a multiple of factor 2, got 5"),
        ("self_extend", (4, 1.5), "self_extend: factor must be a whole number, got 1.5"),
        ("self_extend", (4, INF), "self_extend: factor must be a whole number, got inf"),
        ("dual_chunk", (4, 4), "local_window must be less than chunk_size 4, got 4"),
        ("dual_chunk", (4, -1), "local_window must be >= 0"),
        ("dual_chunk", (8.0, 1), "dual_chunk: chunk_size must be an int, got float"),
        ("blockwise_causal", (7,), "block_size must be even, got 7"),
        ("string", (4, 5), "string: window must be at most shift 4, got 5"),
        ("string", (2**62, 5), r"string: shift must be < 2\*\*62"),
    ],
)
def test_nonsense_is_refused(name, parameters, refusal):
    with pytest.raises((TypeError, ValueError), match=refusal):
        SCORES[name](*parameters)
