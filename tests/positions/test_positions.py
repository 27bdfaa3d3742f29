"""Positions: the authors' numbers and the distributions."""

import itertools

import pytest
import torch
from support.position_checks import assert_uniform, seeded, tensors
from support.vectors import load

from extrope_kernels import apply_rope_qk, methods, positions
from extrope_kernels.positions.pose import take_pieces
from extrope_kernels.positions.random_padding import place
from extrope_kernels.positions.randomized import choose

DATA = load("position")
VECTORS = {vector["id"]: vector for vector in DATA["vectors"]}
CALLS = {
    "shape": lambda **options: positions.shape(3, 8, 50, **options),
    "randomized": lambda **options: positions.randomized(8, 100, batch=3, **options),
    "random_padding": lambda **options: positions.random_padding(3, [8, 2, 5], 16, **options),
    "pose": lambda **options: positions.pose(3, 50, 16, 64, **options),
    "giraffe_randomized": lambda **options: positions.giraffe_randomized(3, 8, **options),
}
each_strategy = pytest.mark.parametrize("name", CALLS)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


# The authors' numbers


def test_shape_vector():
    vector = VECTORS["shape_onmt_K20"]
    size = vector["params"]["batch"], vector["params"]["seq_len"], vector["params"]["K"]
    seed = vector["params"]["torch_seed"]
    drawn = positions.shape(*size, generator=seeded(seed))
    assert drawn.tolist() == vector["train_positions"]
    assert drawn[:, 0].tolist() == vector["train_offsets"]
    drawn = positions.shape(*size, max_len=5000, generator=seeded(seed))
    assert drawn.tolist() == vector["train_positions"]
    evaluated = positions.shape(*size, training=False, eval_shift="K")
    assert evaluated.tolist() == [vector["eval_positions"]] * size[0]
    assert evaluated[0, 3].item() == vector["eval_step3_position"][0]


def test_randomized_vector():
    # jax's own bits cannot be had, but the draws that are the sorted choice give that choice.
    vector = VECTORS["randomized_pe_jax_seed0"]
    drawn = torch.tensor(vector["positions"])
    assert torch.equal(choose(drawn, vector["params"]["noise_max_length"]), drawn)


@pytest.mark.parametrize("name", ["random_padding_n6_N16_f0", "random_padding_n6_N16_f4"])
def test_random_padding_vectors(name):
    vector = VECTORS[name]
    params = vector["params"]
    tokens = torch.tensor([[params["n_tokens"]]])
    drawn, mask = place(torch.tensor([[params["front_pad"]]]), tokens, params["input_len"], 0)
    assert drawn[0, : params["n_tokens"]].tolist() == vector["positions"]
    assert mask.int().tolist() == [vector["attention_mask"]]


@pytest.mark.parametrize("seed", [0, 1])
def test_pose_vectors(seed):
    vector = VECTORS[f"pose_seed{seed}_Lc16_Lt64_N50"]
    draws = [torch.tensor([[vector["draws"][key]]]) for key in ("chunk1_len", "rt2", "skip")]
    drawn, token_indices = take_pieces(vector["params"]["train_len"], *draws)
    assert drawn.tolist() == [vector["positions"]]
    assert token_indices.tolist() == [vector["token_indices"]]


# The contract that all share


@each_strategy
def test_same_generator_same_result(name):
    call = CALLS[name]
    generator = seeded(5)
    first, second = call(generator=generator), call(generator=generator)
    assert same(first, call(generator=seeded(5)))
    assert not same(first, second)


@each_strategy
def test_without_generator_torch_decides(name):
    call = CALLS[name]
    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    call(generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, call()) and same(second, call())
    assert same(first, call(generator=seeded(5)))


@each_strategy
def test_kinds_and_surroundings(name):
    results = tensors(CALLS[name](generator=seeded()))
    kinds = {"giraffe_randomized": [torch.float32], "random_padding": [torch.int64, torch.bool]}
    expected = kinds.get(name, [torch.int64] * len(results))
    assert [result.dtype for result in results] == expected
    assert all(result.device.type == "cpu" and result.shape[0] == 3 for result in results)
    assert all(t.is_meta for t in tensors(CALLS[name](generator=seeded(), device="meta")))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = CALLS[name](generator=seeded())
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(results, again)


# SHAPE


def test_shape_draws_one_shift_per_sequence():
    drawn = positions.shape(20_000, 5, 20, generator=seeded())
    assert torch.equal(drawn - drawn[:, :1], torch.arange(5).expand(20_000, 5))
    assert_uniform(drawn[:, 0], 0, 19)


@pytest.mark.parametrize(
    ("max_shift", "max_len", "largest"), [(0, None, 0), (20, 15, 9), (20, 6, 0), (20, 5, 0)]
)
def test_shape_keeps_within_max_len(max_shift, max_len, largest):
    drawn = positions.shape(500, 5, max_shift, max_len=max_len, generator=seeded())
    assert drawn[:, 0].min() == 0 and drawn[:, 0].max() == largest


@pytest.mark.parametrize(("eval_shift", "start"), [("zero", 0), ("K", 20), (0, 0), (7, 7)])
def test_shape_at_evaluation(eval_shift, start):
    state = torch.get_rng_state()
    drawn = positions.shape(2, 5, 20, training=False, eval_shift=eval_shift)
    assert torch.equal(drawn, torch.arange(start, start + 5).expand(2, 5))
    assert torch.equal(torch.get_rng_state(), state)


# Random Padding


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("kind", [list, torch.tensor, lambda n: torch.tensor(n).int()])
def test_random_padding_places(prefix, kind):
    tokens = [3, 7, 16, 5, 15]
    drawn, mask = positions.random_padding(
        5, kind(tokens), 16, num_fixed_prefix=prefix, generator=seeded()
    )
    assert drawn.shape == mask.shape == (5, 16)
    assert torch.equal(drawn.sort().values, torch.arange(16).expand(5, 16))
    for row, places, n in zip(drawn.tolist(), mask.tolist(), tokens):
        assert row[:prefix] == list(range(prefix))
        assert row[prefix:n] == list(range(row[prefix], row[prefix] + n - prefix))
        assert sorted(row[:n]) == [place for place, used in enumerate(places) if used]


@pytest.mark.parametrize(("tokens", "prefix"), [(4, 0), (4, 4), (1, 0), (9, 9), ([2, 9, 5], 1)])
def test_random_padding_at_inference_is_behind(tokens, prefix):
    drawn, mask = positions.random_padding(3, tokens, 9, num_fixed_prefix=prefix, training=False)
    assert torch.equal(drawn, torch.arange(9).expand(3, 9))
    assert mask.sum(-1).tolist() == (tokens if isinstance(tokens, list) else [tokens] * 3)
    assert (mask.int().diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("prefix", [0, 2])
def test_random_padding_in_front_is_uniform(prefix):
    drawn, _ = positions.random_padding(8_000, 3, 6, num_fixed_prefix=prefix, generator=seeded())
    assert_uniform(drawn[:, prefix], prefix, prefix + 3)


# PoSE


def test_pose_draws_are_uniform_and_inclusive():
    drawn, token_indices = positions.pose(40_000, 50, 16, 64, generator=seeded())
    skip = drawn[:, -1] - 15
    assert_uniform(token_indices[:, -1] + 1, 16, 50)
    assert_uniform(skip, 0, 48)
    gap = (drawn != torch.arange(16)).int().argmax(dim=-1)
    assert_uniform(gap[skip > 0], 1, 8)


def test_pose_takes_two_pieces():
    drawn, token_indices = positions.pose(500, [50, 16, 17, 1000, 80] * 100, 16, 64)
    assert drawn.shape == token_indices.shape == (500, 16)
    for row, indices, n in zip(
        drawn.tolist(), token_indices.tolist(), [50, 16, 17, 1000, 80] * 100
    ):
        assert row[0] == indices[0] == 0 and row[-1] < 64 and indices[-1] < n
        for values in (row, indices):
            steps = [b - a for a, b in itertools.pairwise(values)]
            assert min(steps) >= 1 and sum(step > 1 for step in steps) <= 1
            assert all(step == 1 for step in steps[8:])


@pytest.mark.parametrize(("num_tokens", "n"), [(1, 1), (2, 2), (9, 9), (16, 16), ([9, 9, 9], 9)])
def test_pose_takes_all_of_a_short_document(num_tokens, n):
    drawn, token_indices = positions.pose(3, num_tokens, 16, 64, generator=seeded())
    assert torch.equal(token_indices, torch.arange(n).expand(3, n))
    assert drawn.shape == (3, n) and (drawn[:, -1] < 64).all()


def test_pose_may_reach_no_further_than_it_trains():
    drawn, token_indices = positions.pose(3, 20, 8, 8, generator=seeded())
    assert torch.equal(drawn, torch.arange(8).expand(3, 8)) and (token_indices[:, -1] < 20).all()


# Giraffe


def test_giraffe_steps():
    vector = VECTORS["giraffe_randomized_positions_n12_seed0"]
    drawn = positions.giraffe_randomized(1, vector["params"]["seq_len"], generator=seeded(0))
    assert torch.equal(drawn, torch.tensor([vector["positions"]]))
    drawn = positions.giraffe_randomized(200, 64, generator=seeded())
    steps = 2 * torch.rand(200, 64, generator=seeded())
    total = steps.sum(dim=-1)
    assert 50 < (total > 64).sum() < 150
    ulp = torch.finfo(torch.float32).eps
    assert (drawn.diff(dim=-1) >= 0).all() and (drawn > 0).all()
    assert (drawn <= 64 * (1 + ulp)).all()
    torch.testing.assert_close(drawn[:, -1], total.clamp(max=64))
    plain = total <= 64
    assert torch.equal(drawn[plain], steps.cumsum(dim=-1)[plain])


# What attention sees of them


@pytest.mark.parametrize("freqs", [methods.rope(16), methods.xpos(16)], ids=["rope", "xpos"])
@pytest.mark.parametrize("name", ["shape", "random_padding"])
def test_moving_together_changes_no_logit(name, freqs):
    places = {
        "shape": positions.shape(3, 16, 100, generator=seeded()),
        "random_padding": positions.random_padding(3, 16, 100, generator=seeded())[0][:, :16],
    }[name]
    q, k = torch.randn(2, 3, 16, 2, 16, generator=seeded(3), dtype=torch.float64)
    rotated = [apply_rope_qk(q, k, freqs, positions=at) for at in (None, places)]
    plain, moved = (torch.einsum("bihd,bjhd->bhij", *pair) for pair in rotated)
    # Angle and rotation each round; the angle's error grows with the position.
    norms = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    assert places[:, 0].min() > 0
    assert (moved - plain).abs().max() <= 8 * torch.finfo(torch.float64).eps * 116 * norms
