"""Score methods as data: regions and maps give the relative positions of the definition."""

import math

import pytest
import torch
from support.score_examples import EXAMPLES, OF_PAIRS, by_regions, indices

from extrope_kernels import methods, rope_attention, scores
from extrope_kernels.ops._math.maps import columns_of, maps_of
from extrope_kernels.scores import FIRST_KEY, SCORES, PairMap, PositionMap, Region, Score
from extrope_kernels.scores.base import MapKind, PairRow

INF = float("inf")


def test_every_score_has_an_example():
    assert [*EXAMPLES, *OF_PAIRS] == list(SCORES)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("seqlen", [1, 5, 64])
def test_regions_give_the_definition(name, seqlen):
    want = EXAMPLES[name].relative(seqlen, seqlen).seen
    found = by_regions(seqlen, seqlen, EXAMPLES[name].score).seen
    torch.testing.assert_close(found, want, equal_nan=True, rtol=0, atol=1e-9)


def test_a_score_prints_its_parameters():
    shown = {
        "rerope(window=128)": scores.rerope(window=128),
        "leaky_rerope(window=8, factor=4.0)": scores.leaky_rerope(8, 4),
        "self_extend(window=8, factor=2)": scores.self_extend(8, 2.0),
        "dual_chunk(chunk_size=12, local_window=4)": scores.dual_chunk(12, 4),
        "blockwise_causal(block_size=8)": scores.blockwise_causal(8),
        "string(shift=9, window=3)": scores.string(9, 3),
        "dpe(window=8, group_sizes=(4,))": scores.dpe(8, [1, 2, 4, 8]),
    }
    assert [repr(score) for score in shown.values()] == list(shown)
    own = Score("own", (Region(FIRST_KEY, PositionMap(), PositionMap()),))
    assert repr(own).startswith("Score('own', (Region(start=")


@pytest.mark.parametrize("name", EXAMPLES)
def test_far_keys_are_stored_as_they_are_seen(name):
    score = EXAMPLES[name].score
    assert score.name == name and score.stored == score.regions[0].k_map


@pytest.mark.parametrize("seqlen", [1, 5, 64])
def test_dpe_is_the_authors(seqlen):
    """The positions of dpe_flash_forward in dpe_for_llama.py (LuLuLuyi/DPE), with one token."""
    window, sizes = 16, [2, 8, 2, 8, 32, 32, 32, 4]
    score = SCORES["dpe"](window, sizes, pairs=16)
    i, j = indices(seqlen, seqlen)
    far = score.regions[0]
    found = far.q_map(i) - far.k_map(j)
    for pair in range(16):
        s = sizes[pair // 2]
        want = (i // s).long() - (j // s).long() + (window - window // s)
        assert torch.equal(found[..., pair], want.double())
    near = score.regions[1]
    assert near.start == 1 - window and near.q_map == near.k_map == PositionMap()


def test_dpe_with_one_size_is_self_extend():
    one, other = SCORES["dpe"](12, [4.0] * 5), SCORES["self_extend"](12, 4)
    i, j = indices(50, 50)
    found, want = (x.regions[0].q_map(i) - x.regions[0].k_map(j) for x in (one, other))
    assert torch.equal(found, want[..., None].expand_as(found))


def test_equal_pair_maps_are_equal_scores():
    one, same, other = (SCORES["dpe"](8, sizes) for sizes in ([1, 2], [1, 2], [2, 1]))
    assert one == same and one != other and hash(one) == hash(same)
    assert one.plain == other.plain and one.plain.regions[0].k_map.row == 1


def test_plain_attention_has_one_region():
    for made in (SCORES["leaky_rerope"](4, 1.0), SCORES["self_extend"](4, 1)):
        assert len(made.regions) == 1


def test_position_map():
    p = torch.tensor([-1, 0, 1, 5, 7])
    assert PositionMap()(p).tolist() == p.tolist()
    assert PositionMap(modulus=4, offset=4, cap=6)(p).tolist() == [6, 4, 5, 5, 6]
    assert PositionMap(divisor=2, floor=True, offset=1)(p).tolist() == [0, 1, 1, 3, 4]
    assert PositionMap(divisor=INF, offset=3)(p).tolist() == [3] * 5


def test_maps_survive_their_columns():
    made = [
        PositionMap(),
        PositionMap(7, offset=-3.0),
        PositionMap(4, 2.5),
        PositionMap(4, 2.0, True, -3.0, 6.0),
        PositionMap(divisor=INF, offset=5.0),
        PairRow(3, True, 2),
    ]
    assert [x.kind for x in made] == list(MapKind)
    columns = columns_of(made)
    assert maps_of("op", columns, len(made)) == made
    assert all(math.isfinite(x) for column in columns.values() for x in column)
    capped = columns_of([PositionMap(divisor=INF, offset=5, cap=3)])
    assert maps_of("op", capped, 1) == [PositionMap(divisor=INF, offset=3)]
    assert columns_of([PositionMap()] * 2) == {"map_kinds": [0, 0]}


@pytest.mark.parametrize(
    "name, parameters, refusal",
    [
        ("self_extend", (5, 2), "self_extend: window must be a multiple of factor 2, got 5"),
        ("dual_chunk", (4, 4), "local_window must be less than chunk_size 4, got 4"),
        ("string", (4, 5), "string: window must be at most shift 4, got 5"),
        ("dpe", (8, [1.5]), r"dpe: group_sizes must be whole numbers >= 1, got \[1.5\]"),
        ("dpe", (8, [[1, 2], [0, 1]]), r"dpe: group_sizes must be \(pairs,\) numbers, got"),
        ("dpe", (8, [1, 0]), r"dpe: group_sizes\[1\] must be > 0, got 0"),
        ("dpe", (8, [1, 2], 5), "dpe: pairs must be a multiple of the 2 group_sizes, got 5"),
        ("dpe", (8, [1, 2, 4, 8], 2**31), r"dpe: pairs must be < 2\*\*20, got 2147483648"),
    ],
)
def test_parameters_that_do_not_go_together(name, parameters, refusal):
    with pytest.raises(ValueError, match=refusal):
        SCORES[name](*parameters)


NUMBERS = r"a map must have a divisor >= 2\*\*-22 and an offset within 2\*\*53"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PositionMap(modulus=-5), "a map's modulus must be a whole number >= 0, got -5"),
        (PositionMap(modulus=2.5), "a map's modulus must be a whole number >= 0, got 2.5"),
        (PairMap([1.0, 2.0], modulus=-5), "a map's modulus must be a whole number >= 0, got -5"),
        (PositionMap(divisor=-1.0), NUMBERS),
        (PositionMap(divisor=2**-23), NUMBERS),
        (PositionMap(divisor=0), NUMBERS),
        (PositionMap(divisor=math.nan), NUMBERS),
        (PositionMap(offset=math.inf), NUMBERS),
        (PositionMap(offset=-(2.0**54)), NUMBERS),
        (PositionMap(cap=-(2.0**54)), r"a map's cap must be >= -2\*\*53"),
        (PositionMap(divisor=2, cap=3), "a map with a cap must have whole numbers only"),
        (PositionMap(offset=0.5, cap=3), "a map with a cap must have whole numbers only"),
        (PositionMap(cap=3.5), "a map with a cap must have whole numbers only"),
        (PositionMap(divisor=2.5, floor=True), "a map with floor must have a whole divisor"),
    ],
)
@pytest.mark.parametrize("place", ["q_map", "k_map", "stored"])
def test_maps_that_kernels_would_read_otherwise_are_refused(place, wrong, message):
    maps = {name: PositionMap() for name in ("q_map", "k_map", "stored")} | {place: wrong}
    region = Region(FIRST_KEY, maps["q_map"], maps["k_map"])
    with pytest.raises(ValueError, match=f"^mine: {message}"):
        Score("mine", (region,), stored=maps["stored"])


def test_keys_are_stored_by_one_map_for_all_pairs():
    with pytest.raises(TypeError, match=r"^mine: stored must be a PositionMap, got PairMap"):
        score_of(PairMap([1.0, 2.0]))


@pytest.mark.parametrize("number", [2.5, math.nan, -math.inf])
def test_starts_and_granularity_are_whole(number):
    region = Region(FIRST_KEY, PositionMap(), PositionMap())
    with pytest.raises(ValueError, match=r"^mine: granularity must be a whole number, got"):
        Score("mine", (region,), granularity=number)
    with pytest.raises(ValueError, match=r"^mine: a region's start must be a whole number, got"):
        Score("mine", (region._replace(start=number),))


def test_numbers_of_pairs_are_exact():
    """They are Python's, whatever PyTorch's default dtype is."""
    made = PairMap([1.1, 2.7], 0.3)
    assert made.divisor.tolist() == [1.1, 2.7] and made.offset.tolist() == [0.3, 0.3]


@pytest.mark.parametrize("offset", (math.nan, math.inf, 1e30, -1e30))
def test_what_a_map_of_pairs_gives_is_a_position(offset):
    for divisor, moved in (([1.0, 2.0], [0.0, offset]), ([1.0, 1e-20], 0.0)):
        with pytest.raises(ValueError, match=f"^PairMap: {NUMBERS}"):
            PairMap(divisor, moved)


# -------------------------------------------------------------------------------------------------
# On another device; meta stands for a GPU


def test_copies_serve_a_later_training():
    score, freqs = scores.dpe(4, [1, 2, 4]), methods.rope(6).to("meta")
    q = torch.zeros(1, 9, 2, 8, device="meta")
    with torch.inference_mode():
        rope_attention(q, q, q, freqs, score)
    rope_attention(q.requires_grad_(), q, q, freqs, score).sum().backward()
    assert q.grad.shape == q.shape


def test_copies_are_real():
    """Those that a graph is made of are not."""
    score, freqs = scores.dpe(4, [1, 2, 4]), methods.rope(6).to("meta")
    q = torch.zeros(1, 9, 2, 8, device="meta")

    class Attend(torch.nn.Module):
        def forward(self, q):
            return rope_attention(q, q, q, freqs, score)

    torch.export.export(Attend(), (q,), strict=False)
    assert type(score.pair_maps_on(q)) is torch.Tensor


def test_numbers_are_read_whatever_the_default_device():
    with torch.device("meta"):
        score = scores.dpe(4, [1, 2, 4])
    assert score.pair_maps.device.type == "cpu"


def test_regions_are_one_to_three_in_order():
    """Said when the score is made, not at its first call."""
    same = PositionMap()
    regions = [Region(start, same, same) for start in (FIRST_KEY, -9, -5, -2)]
    for wrong in ((), regions, regions[:2][::-1]):
        with pytest.raises(ValueError, match=r"^mine: one to three regions must start in order"):
            Score("mine", tuple(wrong))
    with pytest.raises(ValueError, match=r"^mine: granularity must be >= 1, got 0"):
        Score("mine", tuple(regions[:1]), granularity=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PairMap(None), TypeError, "PairMap: divisor must be numbers, got None"),
        (lambda: PairMap([1.0 + 2j]), TypeError, "PairMap: divisor must be real numbers"),
        (
            lambda: PairMap(torch.ones(2, requires_grad=True)),
            ValueError,
            "PairMap: divisor must not require grad, got one that does",
        ),
        (
            lambda: PairMap([[1.0], [2.0]]),
            ValueError,
            r"PairMap: divisor must be \(pairs,\), got shape \(2, 1\)",
        ),
        (lambda: PairMap([1.0], floor=0.5), TypeError, "PairMap: floor must be a bool, got 0.5"),
        (
            lambda: PairMap([1.0, 2.0, 4.0], [1.0, 2.0]),
            ValueError,
            r"PairMap: offset must be a number or as divisor \(3,\), got shape \(2,\)",
        ),
        (lambda: score_of(None), TypeError, "mine: a map must be a PositionMap or a PairMap, got"),
        (
            lambda: score_of(PositionMap(modulus="x")),
            TypeError,
            "mine: a map's modulus must be a whole number, got 'x'",
        ),
        (
            lambda: score_of(PositionMap(floor=0.5)),
            TypeError,
            "mine: a map's floor must be a bool, got 0.5",
        ),
        (lambda: Score("mine", (None,)), TypeError, "mine: regions must be Regions, got None"),
    ],
)
def test_nonsense_is_named(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


def score_of(stored):
    return Score("mine", (Region(FIRST_KEY, PositionMap(), PositionMap()),), stored=stored)


def test_a_score_of_numbers_is_made_once():
    """Of the same numbers of the same types; a refusal is the function's own each time."""
    assert scores.rerope(7) is scores.rerope(7) is not scores.rerope(8)
    with pytest.raises(TypeError, match=r"^rerope: .* takes window, and got window = int, float$"):
        scores.rerope(7, 4.0)  # Leaky ReRoPE's
    assert scores.rerope(7) is not scores.leaky_rerope(7, math.inf)
    assert scores.self_extend(8, 2) is not scores.self_extend(8, 2.0)  # shown as they were given
    for _ in range(2):
        for wrong in (True, 7.0, [7]):
            with pytest.raises(TypeError, match="rerope: window must be an int, got"):
                scores.rerope(wrong)
