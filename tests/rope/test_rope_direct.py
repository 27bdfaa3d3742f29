"""Small rotations on a CPU go past the dispatcher: to the same kernels, unless one looks on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import direct_calls
import pytest
import torch
from direct_calls import Called, Dispatched, Own, assert_keeps_no_references, assert_same
from torch import Tensor

from extrope_kernels import _ext, apply_rope, apply_rope_qk, methods
from extrope_kernels.ops._shared import direct

pytestmark = pytest.mark.skipif(_ext.load("cpu") is not None, reason="no CPU library")
FREQS = methods.yarn(32, factor=4.0, original_max_position_embeddings=64)
NORMS = {"q_norm_weight": torch.linspace(0.5, 1.5, 32), "k_norm_weight": torch.full((32,), 2.0)}


@dataclass
class Rotation:
    """q and k with 4 heads on 2, and what the call is given beside them."""

    tokens: tuple[int, ...] = (2, 3)
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    call: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)
        packed = torch.randn(*self.tokens, 6, self.head_dim, generator=generator).to(self.dtype)
        self.q, self.k = packed.split((4, 2), -2)

    def rotated(self, **call) -> tuple[Tensor, ...]:
        return apply_rope_qk(self.q, self.k, **{"freqs": FREQS, **self.call, **call})


CASES = {
    "usual": Rotation(),
    "one token at a position": Rotation((1, 1), call={"positions": 4096}),
    "bfloat16, 64 dims of 80": Rotation(
        dtype=torch.bfloat16, head_dim=80, call={"freqs": methods.rope(64)}
    ),
    "float16, interleaved, inverse": Rotation(
        dtype=torch.float16, call={"interleaved": True, "inverse": True}
    ),
    "float64, negative offset": Rotation(dtype=torch.float64, call={"positions": -7}),
    "positions": Rotation(call={"positions": torch.tensor([[3, 1, 4], [1, 5, 9]])}),
    "packed": Rotation((7,), call={"cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32)}),
    "XPOS": Rotation(call={"freqs": replace(methods.xpos(32), decay_origin=7.0)}),
    "by axes": Rotation(
        call={
            "freqs": methods.with_sections(methods.rope(32), [4, 6, 6]),
            "positions": torch.arange(18).view(3, 2, 3),
        }
    ),
    "norms": Rotation(call=NORMS),
    "a norm of all of q's heads": Rotation(
        call={"q_norm_weight": torch.linspace(0, 1, 128), "norm_eps": 0.5, "positions": 3}
    ),
    "named backend": Rotation(call={"backend": "cpu"}),
    "over threads": Rotation((2, 300)),
    "no tokens": Rotation((2, 0)),
}


USUAL = Rotation(call={"positions": 4})


@pytest.fixture(params=("rope", "rope_norm"))
def calls(monkeypatch, request) -> list:
    returned = direct_calls.counted(monkeypatch, request.param)
    if request.param == "rope_norm":
        monkeypatch.setattr(USUAL, "call", {**USUAL.call, **NORMS})
    return returned


@pytest.mark.parametrize("name", CASES)
def test_same_bits(monkeypatch, name):
    rotation = CASES[name]
    returned = [direct_calls.counted(monkeypatch, n) for n in ("rope", "rope_norm")]
    got = rotation.rotated()
    assert sorted(returned) == [[], [True]]
    assert_same(got, direct_calls.by_the_op(monkeypatch, rotation.rotated))
    assert sorted(returned) == [[], [True]]


@pytest.mark.parametrize("name", CASES)
def test_in_place(monkeypatch, name):
    rotation = CASES[name]
    returned = [direct_calls.counted(monkeypatch, n) for n in ("rope", "rope_norm")]
    q, k = rotation.q.clone(), rotation.k.clone()
    versions = [x._version for x in (q, k)]
    with torch.no_grad():
        got = apply_rope_qk(q, k, inplace=True, **{"freqs": FREQS, **rotation.call})
    assert got[0] is q and got[1] is k and sorted(returned) == [[], [True]]
    assert [x._version for x in (q, k)] == [n + 1 for n in versions]
    assert all(torch.equal(x, same) for x, same in zip(got, rotation.rotated(), strict=True))


def test_one_tensor(monkeypatch):
    returned = direct_calls.counted(monkeypatch, "rope")
    x = CASES["usual"].q
    got = apply_rope(x, FREQS)
    assert returned == [True]
    assert_same((got,), direct_calls.by_the_op(monkeypatch, lambda: (apply_rope(x, FREQS),)))
    apply_rope(x := x.clone(), FREQS, inplace=True)
    assert returned == [True, True] and torch.equal(x, got)


@pytest.mark.parametrize("wanted", ("q", "k", "inv_freq"))
def test_gradients_take_the_op(monkeypatch, wanted):
    returned, rotation = direct_calls.counted(monkeypatch, "rope"), Rotation()
    leaf = (FREQS.inv_freq if wanted == "inv_freq" else getattr(rotation, wanted)).clone()
    freqs = FREQS
    leaf.requires_grad_()
    if wanted == "inv_freq":
        freqs = replace(FREQS, inv_freq=leaf)
    else:
        setattr(rotation, wanted, leaf)
    sum(x.sum() for x in rotation.rotated(freqs=freqs)).backward()
    assert not returned and leaf.grad.count_nonzero() > 0
    with torch.no_grad():
        rotation.rotated(freqs=freqs)
    assert returned == [True]


@pytest.mark.parametrize("mode", (Dispatched, Called))
def test_modes_see_the_op(calls, mode):
    with mode() as looking_on:
        got = USUAL.rotated()
    assert not calls and any("rope" in name for name in looking_on.seen)
    assert_same(got, USUAL.rotated())
    assert calls == [True]


@pytest.mark.parametrize("name", ("q", "k"))
def test_negated_views(calls, name):
    """Whose memory holds the negated numbers."""
    rotation = Rotation(call=USUAL.call)
    setattr(rotation, name, torch._neg_view(-getattr(rotation, name)))
    assert all(map(torch.equal, rotation.rotated(), USUAL.rotated()))
    assert calls == [True]


@pytest.mark.parametrize("name", ("q", "k"))
def test_other_tensors_take_the_op(calls, name):
    rotation = Rotation(call=USUAL.call)
    setattr(rotation, name, getattr(rotation, name).as_subclass(Own))
    got = rotation.rotated()
    assert not calls and {type(x) for x in got} == {Own}
    assert_same([x.as_subclass(Tensor) for x in got], USUAL.rotated())


def test_large_results_take_the_op(monkeypatch, calls):
    monkeypatch.setattr(direct, "LARGE", USUAL.q.nbytes)
    expected = USUAL.rotated()
    assert not calls
    with torch.no_grad():
        q, k = USUAL.q.clone(), USUAL.k.clone()
        got = apply_rope_qk(q, k, FREQS, inplace=True, **USUAL.call)
    assert calls == [True] and all(map(torch.equal, got, expected))
    monkeypatch.setattr(direct, "LARGE", USUAL.q.nbytes + 1)
    assert_same(USUAL.rotated(), expected)
    assert calls == [True, True]


def test_batched_by_vmap(calls):
    q, k = (x[:, None] for x in (USUAL.q, USUAL.k))
    got = torch.vmap(lambda q, k: apply_rope_qk(q, k, FREQS, **USUAL.call))(q, k)
    assert not calls
    assert_same([x.squeeze(1) for x in got], USUAL.rotated())


def test_forward_derivatives_are_refused(calls):
    rotation = Rotation(call=USUAL.call)
    with torch.autograd.forward_ad.dual_level():
        rotation.q = torch.autograd.forward_ad.make_dual(rotation.q, torch.ones_like(rotation.q))
        with pytest.raises(NotImplementedError, match="has no forward-mode"):
            rotation.rotated()
    assert not calls


def test_inference_mode(calls):
    with torch.inference_mode():
        got = USUAL.rotated()
    assert calls == [True] and all(x.is_inference() for x in got)


@pytest.mark.parametrize(
    "change, words",
    (
        ({"k": torch.zeros(2, 3, 2, 32).to_sparse()}, "k must be a dense tensor"),
        ({"k": torch.zeros(2, 3, 2, 32, device="meta")}, "k must be on q's device"),
        ({"q": torch.zeros(2, 3, 4, 32, dtype=torch.int32)}, "q must be float32"),
        ({"k": torch.zeros(2, 3, 2, 16)}, "k must have q's shape"),
        ({"freqs": replace(FREQS, attention_factor=-1.0)}, "attention_factor must be > 0"),
        ({"positions": torch.arange(5)}, "positions must be"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "q must be"),
    ),
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_refusals_are_the_ops(calls, change, words):
    call = {"q": USUAL.q, "k": USUAL.k, "freqs": FREQS, **USUAL.call, **change}
    with pytest.raises((TypeError, ValueError), match=f"rope: .*{words}"):
        apply_rope_qk(**call)
    assert True not in calls


def test_in_place_results_must_not_overlap(calls):
    q = torch.ones(1, 1, 4, 32).expand(2, 3, 4, 32)
    with torch.no_grad(), pytest.raises(ValueError, match="rope: q must not be expanded"):
        apply_rope_qk(q, USUAL.k.clone(), FREQS, inplace=True, **USUAL.call)
    assert True not in calls and (q == 1).all()


def test_offsets_that_no_double_holds(calls):
    """The op takes int64: past 2**53 not every whole number is a double."""
    offset = 2**53 + 1
    got = USUAL.rotated(positions=offset)
    assert calls == [None]
    assert_same(got, USUAL.rotated(positions=torch.full((2, 1), offset)))


@pytest.mark.parametrize("name", ("rope", "rope_norm"))
def test_lets_go_of_pythons_lock(monkeypatch, name):
    long = Rotation((1, 6000), call=NORMS if name == "rope_norm" else {})
    assert direct_calls.lets_go_of_pythons_lock(monkeypatch, name, long.rotated)


def test_keeps_no_references(calls):
    wrong = Rotation(call={**USUAL.call, "positions": torch.arange(5)})

    def both():
        USUAL.rotated()
        with pytest.raises(ValueError, match="positions must be"):
            wrong.rotated()
        calls.clear()

    assert_keeps_no_references([USUAL.q, USUAL.k, FREQS.inv_freq, wrong.call["positions"]], both)
