"""XPOS through the rotation: the origin of its amplitude, its range, a cache of raw keys."""

from dataclasses import replace

import pytest
import torch
from support.rope_cases import Case, check
from support.vectors import load

from extrope_kernels import apply_rope, apply_rope_qk, methods
from extrope_kernels.testing import assert_within_budget, device, make_qk

AUTHORS = load("xpos")
REACH_FP16 = 4532  # largest distance whose amplitude float16 holds, with the defaults


def xpos(dim, origin=0.0):
    return methods.xpos(dim, decay_origin=origin).to(device())


def logits(q, k):
    return torch.einsum("bihd,bjhd->bhij", q.double(), k.double())


def closed_form(q, k, freqs):
    """sum over pairs of Re(q_m conj(k_n) exp(i (m - n) theta)) zeta ** ((m - n) / 512), float64."""
    a, b = (torch.complex(*x.double().chunk(2, -1)) for x in (q, k))
    m, n = (torch.arange(x.shape[1], device=x.device).double() for x in (q, k))
    distance = (m[:, None] - n)[..., None]
    rotation = torch.polar(
        torch.exp(distance * freqs.log_decay.double()), distance * freqs.inv_freq.double()
    )
    return torch.einsum("bihp,bjhp,ijp->bhij", a, b.conj(), rotation).real


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_heads_of_their_own_frequencies_decay_too(backend, dtype):
    q, k = make_qk(2, 7, 2, 2, head_dim=32, dtype=dtype)
    of_heads = xpos(32).inv_freq * torch.tensor([[[1.0], [0.3]]], device=device())
    freqs = replace(xpos(32, 3.0), inv_freq=of_heads)
    check(Case(q, k, freqs, {"positions": 900}), backend)


def test_gradients_carry_the_origin(backend):
    q, k = (x.double().requires_grad_() for x in make_qk(1, 3, 2, 1, head_dim=8))
    freqs = xpos(8, 40_001.0)

    def rotate(q, k):
        return apply_rope_qk(q, k, freqs, positions=40_000, backend=backend)

    torch.autograd.gradcheck(rotate, (q, k))


def test_authors_scores(backend):
    for vector in AUTHORS["vectors"]:
        length, dim = vector["params"]["length"], vector["params"]["head_dim"]
        q, k = (
            torch.tensor(vector[name], device=device()).view(1, length, 1, dim).double()
            for name in "qk"
        )
        freqs = xpos(dim, -vector["min_pos"])
        want = torch.tensor(vector["scores_no_softmax_no_sqrt_d"], device=device())
        got = logits(*apply_rope_qk(q, k, freqs, interleaved=True, backend=backend))
        # How far the authors' float32 scores are from the closed form in float64.
        torch.testing.assert_close(
            got[0, 0], want.view(length, length).double(), atol=6.1e-7, rtol=0
        )


def test_float16_reaches_twice_as_far_around_the_middle():
    """The released code's keys are infinite past position 4,532."""
    seqlen = 2 * REACH_FP16
    q, k = make_qk(1, seqlen, 1, 1, head_dim=16, dtype=torch.float16)
    q, k = q * 0.1, k * 0.1  # the largest amplitude is the largest float16
    freqs = xpos(16, REACH_FP16)
    rotated = apply_rope_qk(q, k, freqs)
    assert all(x.isfinite().all() for x in rotated)
    near = slice(seqlen - 64, seqlen)
    got = logits(*(x[:, near] for x in rotated))
    same = logits(*(x[:, near] for x in apply_rope_qk(q, k, freqs, backend="reference")))
    exact = closed_form(q[:, near], k[:, near], freqs)
    seen = torch.ones(64, 64, dtype=torch.bool, device=device()).tril()
    for name, x in (("got", got), ("same", same)):
        assert x[..., seen].isfinite().all(), name
    error, budget = ((x - exact)[..., seen].abs().max() for x in (got, same))
    assert error <= 2 * budget


OVERFLOWS = (
    (False, {}, "got 0 to 9000; decay_origin=4500 covers them"),
    (False, {"positions": -9000}, "got -9000 to 0; decay_origin=-4500 covers them"),
    (False, {"positions": torch.tensor([5, 80])}, "got 5 to 9080; no origin covers them"),
    (
        False,
        {"positions": torch.arange(9001).flip(0) + 7},
        "got 7 to 9007; decay_origin=4507 covers them",
    ),
    (False, {"positions": torch.arange(9001) * 2.5}, "got 0 to 22500; no origin covers them"),
    (True, {}, "got 0 to 8999; decay_origin=4499 covers them"),
    (True, {"cu_seqlens": torch.tensor([0, 9001])}, "got 0 to 9000; decay_origin=4500 covers them"),
    (True, {"positions": -9000}, "got -9000 to -1; decay_origin=-4501 covers them"),
    (True, {"positions": torch.tensor([80, 5])}, "got 5 to 9004; decay_origin=4504 covers them"),
    (True, {"positions": torch.arange(9001) * 2.5}, "got 0 to 22500; no origin covers them"),
)


@pytest.mark.parametrize("packed, options, message", OVERFLOWS)
def test_an_amplitude_that_overflows_is_refused(packed, options, message):
    """Packed as sequences of 1 and of 9000 tokens, or of 9001; else of 9001."""
    q, k = make_qk(2, 9001, 1, 1, head_dim=2, dtype=torch.float16)
    if device() == "cuda" and (packed or isinstance(options.get("positions"), torch.Tensor)):
        pytest.skip("positions on the device are not read back")
    if packed:
        q, k, options = q[0], k[0], {"cu_seqlens": torch.tensor([0, 1, 9001]), **options}
    before = q.clone()
    with pytest.raises(ValueError, match=rf"rope: positions .* 4532 of .*float16, {message}"):
        apply_rope_qk(q, k, xpos(2), inplace=True, **options)
    assert torch.equal(q, before)


@pytest.mark.skipif(device() == "cuda", reason="boundaries on the device are not read back")
def test_each_packed_sequence_is_as_long_as_it_is():
    """The longest one does not start where the last position is."""
    x, boundaries = torch.full((1000, 1, 2), 0.5), torch.tensor([0, 1, 1000])
    far = torch.tensor([36_260, 0])
    assert apply_rope(x, xpos(2), cu_seqlens=boundaries, positions=far).isfinite().all()
    with pytest.raises(ValueError, match="got 0 to 36261"):
        apply_rope(x, xpos(2), cu_seqlens=boundaries, positions=far + torch.tensor([1, 0]))


def test_the_range_is_that_of_the_dtype():
    for dtype, reach in ((torch.float16, REACH_FP16), (torch.float32, 36_260)):
        x = torch.full((1, 1, 1, 2), 0.5, dtype=dtype, device=device())
        assert apply_rope(x, xpos(2).for_keys(), positions=reach).isfinite().all()
        with pytest.raises(ValueError, match=f"within {reach} of .* in {dtype}, got"):
            apply_rope(x, xpos(2), positions=reach + 1)


def test_decode_over_raw_keys_equals_prefill(backend):
    """The cache holds keys as they came; each step rotates them around an origin of its own."""
    q, k = make_qk(1, 41, 2, 2, head_dim=16)
    exact = closed_form(q, k, xpos(16))
    prefill = logits(*apply_rope_qk(q, k, xpos(16, 20), backend=backend))
    for last in (0, 17, 40):
        freqs = xpos(16, last)
        query = apply_rope(q[:, last : last + 1], freqs, positions=last, backend=backend)
        keys = apply_rope(k[:, : last + 1], freqs.for_keys(), backend=backend)
        row, same = logits(query, keys)[:, :, 0], prefill[:, :, last, : last + 1]
        row, same = row.float(), same.float()  # as exact as the rotated tensors
        assert_within_budget("row", row, same, exact[:, :, last, : last + 1])


@pytest.mark.parametrize(
    "freqs",
    [
        methods.rope(16),
        methods.yarn(16, factor=4.0, original_max_position_embeddings=64),
        methods.xpos(16, decay_origin=20),
        methods.axial(16, axes=2),
    ],
)
def test_the_op_takes_frequencies_whole(freqs):
    q, k = make_qk(1, 40, 2, 1, head_dim=16)
    freqs = freqs.to(q.device)
    positions = torch.arange(40, device=q.device)
    if freqs.axes is not None:
        positions = torch.stack((positions, positions.flip(0)))[:, None]
    found = torch.ops.extrope.rope_fwd(q, k, freqs.inv_freq, positions, **freqs.kwargs)
    wanted = apply_rope_qk(q, k, freqs, positions=positions)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_origin_follows_to_another_device_and_other_sections():
    freqs = methods.xpos(16, decay_origin=3)
    for other in (freqs.to("meta"), freqs.for_keys(), methods.with_sections(freqs, (4, 4))):
        assert (other.decay_origin, other.steepest_decay) == (3, freqs.steepest_decay)
    assert methods.rope(16).for_keys().log_decay is None
    steepest = freqs.log_decay.double().abs().max().item()
    assert freqs.steepest_decay == pytest.approx(steepest, rel=1e-6)
    assert replace(freqs, steepest_decay=0.0).steepest_decay == 0
