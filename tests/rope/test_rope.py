"""Every backend against float64: dtypes, layouts, shapes, positions, frequencies."""

from __future__ import annotations

import pytest
import torch
from truncation import truncation

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, methods
from extrope_kernels.testing import DTYPES, assert_within_budget, device, make_qk

HEAD_DIMS = (2, 8, 64, 72, 80, 96, 128, 256)


def frequencies(dim, **changes):
    """YaRN-like: an attention factor, frequencies from 1 down."""
    inv_freq = methods.rope(dim).inv_freq.to(device())
    return RopeFreqs(changes.get("inv_freq", inv_freq), changes.get("attention_factor", 1.1))


def check(q, k, freqs, backend, **options):
    """apply_rope_qk of `backend` against the reference in the same dtype and in float64."""
    outs = apply_rope_qk(q, k, freqs, backend=backend, **options)
    sames = apply_rope_qk(q, k, freqs, backend="reference", **options)
    exacts = apply_rope_qk(q.double(), k.double(), freqs, backend="reference", **options)
    slack = truncation(backend, q.dtype)
    for name, out, same, exact in zip("qk", outs, sames, exacts):
        assert_within_budget(name, out, same, exact, slack)
    return outs


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(backend, head_dim, dtype, interleaved):
    q, k = make_qk(head_dim=head_dim, dtype=dtype)
    check(q, k, frequencies(head_dim), backend, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(
    "rotary_dim, rotary_offset", ((2, 0), (20, 3), (64, 0), (64, 16), (64, 8), (78, 2))
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_partial_rotary_passes_the_rest_through(
    backend, dtype, rotary_dim, rotary_offset, interleaved
):
    """And rotates dims in their place as the same dims alone."""
    q, k = make_qk(head_dim=80, dtype=dtype)
    freqs, options = frequencies(rotary_dim), {"interleaved": interleaved}
    outs = check(q, k, freqs, backend, rotary_offset=rotary_offset, **options)
    dims = slice(rotary_offset, rotary_offset + rotary_dim)
    alone = [x[..., dims].contiguous() for x in (q, k)]
    alone = apply_rope_qk(*alone, freqs, backend="reference", **options)
    same = apply_rope_qk(q, k, freqs, backend="reference", rotary_offset=rotary_offset, **options)
    for x, out, own, whole in zip((q, k), outs, alone, same):
        assert torch.equal(whole[..., dims], own)
        for rest in (slice(rotary_offset), slice(rotary_offset + rotary_dim, None)):
            assert torch.equal(x[..., rest], out[..., rest])


@pytest.mark.parametrize("heads_q, heads_k", ((1, 1), (73, 1), (8, 2)))
@pytest.mark.parametrize("batch, seqlen", ((1, 1), (3, 1), (1, 31), (2, 17), (2, 0), (0, 5)))
def test_shapes(backend, batch, seqlen, heads_q, heads_k):
    q, k = make_qk(batch, seqlen, heads_q, heads_k, head_dim=16)
    check(q, k, frequencies(16), backend)


def test_one_tensor_is_what_it_is_among_two(backend):
    q, k = make_qk()
    together = apply_rope_qk(q, k, frequencies(64), backend=backend)
    assert torch.equal(apply_rope(q, frequencies(64), backend=backend), together[0])
    assert torch.equal(apply_rope(k, frequencies(64), backend=backend), together[1])


# -------------------------------------------------------------------------------------------------
# Positions
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64, torch.float32, torch.float64))
@pytest.mark.parametrize("shape", ("seqlen", "batch", "one_batch", "offsets", "offset_column"))
def test_position_tensors(backend, shape, dtype):
    q, k = make_qk(batch=3, seqlen=7)
    sizes = {
        "seqlen": (7,),
        "batch": (3, 7),
        "one_batch": (1, 7),
        "offsets": (3,),
        "offset_column": (3, 1),
    }
    positions = torch.randint(0, 1_000_000, sizes[shape], device=device()).to(dtype)
    if dtype.is_floating_point:
        positions = positions / 64
        if "offset" in shape:  # exact in float32, as their sums with an index are not
            positions = positions + 2**24
    check(q, k, frequencies(64), backend, positions=positions)


@pytest.mark.parametrize("lengths", ((5, 1, 7), (0, 6, 0, 0, 3, 0), (13,)))
@pytest.mark.parametrize("offsets", (False, True))
@pytest.mark.parametrize("per_sequence", (False, True))
def test_packed_equals_one_by_one(backend, lengths, offsets, per_sequence):
    q, k = make_qk(1, sum(lengths), 4, 2)
    count = len(lengths)
    starts = torch.arange(count, device=device()) * 1000
    inv_freq = frequencies(64).inv_freq
    if per_sequence:
        inv_freq = inv_freq / torch.arange(1, count + 1, device=device()).float()[:, None]
    cu_seqlens = torch.tensor([0, *lengths], device=device()).cumsum(0)
    packed = apply_rope_qk(
        q[0],
        k[0],
        frequencies(64, inv_freq=inv_freq),
        cu_seqlens=cu_seqlens,
        positions=starts if offsets else None,
        backend=backend,
    )
    for i, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        freqs = frequencies(64, inv_freq=inv_freq[i] if per_sequence else inv_freq)
        alone = apply_rope_qk(
            q[:, rows],
            k[:, rows],
            freqs,
            positions=int(starts[i]) if offsets else 0,
            backend=backend,
        )
        for x, y in zip(packed, alone):
            assert torch.equal(x[rows], y[0]), f"sequence {i} of length {length}"


# -------------------------------------------------------------------------------------------------
# Frequencies and amplitude
@pytest.mark.parametrize(
    "shape", ((32,), (1, 32), (3, 32), (1, 1, 32), (3, 1, 32), (1, 4, 32), (3, 4, 32))
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_frequencies_per_sequence_and_head(backend, shape, dtype):
    q, k = make_qk(batch=3, seqlen=5, heads_q=4, heads_k=4)
    inv_freq = torch.rand(shape, device=device(), dtype=dtype)
    check(q, k, frequencies(64, inv_freq=inv_freq), backend, positions=1000)


def test_zero_and_large_frequencies(backend):
    q, k = make_qk(head_dim=8)
    inv_freq = torch.tensor([0.0, 1e-30, 6.5, 4000.0], device=device())
    check(q, k, frequencies(8, inv_freq=inv_freq), backend, positions=77)


@pytest.mark.parametrize("decay", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
def test_inverse_undoes(backend, interleaved, decay):
    q, k = make_qk(dtype=torch.float64)
    freqs = methods.xpos(64).to(device()) if decay else frequencies(64)
    options = dict(positions=100_003, interleaved=interleaved, backend=backend)
    if decay:
        options["positions"] = 300
    there = apply_rope_qk(q, k, freqs, **options)
    back = apply_rope_qk(*there, freqs, inverse=True, **options)
    for x, y in zip((q, k), back):
        torch.testing.assert_close(x, y, rtol=0, atol=32 * torch.finfo(torch.float64).eps)


@pytest.mark.thorough
@pytest.mark.skipif(device() != "cpu", reason="chooses among the CPU's kernels")
@pytest.mark.parametrize("narrower", ("baseline", "avx2"))
def test_narrower_instructions(narrower, run_narrower):
    tests = "cpu and (head_dims or float64 or log_decay or strided)"
    files = [f"tests/rope/test_rope{name}.py" for name in ("", "_decay", "_gradients", "_memory")]
    run_narrower(narrower, *files, "-k", tests)
