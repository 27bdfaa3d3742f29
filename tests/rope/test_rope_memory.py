"""Where the rotation reads and writes: strides, in place, large results, denormals."""

from __future__ import annotations

import math

import pytest
import torch

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, methods, rope_append_kvcache
from extrope_kernels.testing import device, make_qk

FREQS = RopeFreqs(methods.rope(64).inv_freq.to(device()), 1.1)


def test_outputs_keep_the_memory_layout(backend):
    q, k = make_qk(2, 6, 4, 2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out_q, out_k = apply_rope_qk(q, k, FREQS, backend=backend)
    assert out_q.stride() == q.stride() and out_k.stride() == k.stride()


@pytest.mark.gpu_memory(9)
def test_more_than_2_to_31_elements_by_stride(backend, tmp_path):
    """A sparse file gives the address range without the memory."""
    far = 2**31 + 64
    storage = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2 * far, dtype=torch.bfloat16
    )
    if device() == "cuda":
        storage = torch.empty(2 * far, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((2, 3, 2, 64), (far, 128, 64, 1))
    values, _ = make_qk(2, 3, 2, dtype=torch.bfloat16)
    x.copy_(values)
    expected = apply_rope(values, FREQS, backend=backend)
    assert torch.equal(apply_rope(x, FREQS, backend=backend), expected)
    assert torch.equal(apply_rope(x, FREQS, inplace=True, backend=backend), expected)


def test_nan_and_inf_stay_in_their_pair(backend):
    q, _ = make_qk(1, 3, 1, head_dim=8)
    q[0, 1, 0, 2], q[0, 2, 0, 5] = math.nan, math.inf
    out = apply_rope(
        q, RopeFreqs(methods.rope(8).inv_freq.to(device())), positions=5, backend=backend
    )
    bad = ~out.isfinite()
    expected = torch.zeros_like(bad)
    expected[0, 1, 0, [2, 6]] = True
    expected[0, 2, 0, [1, 5]] = True
    assert torch.equal(bad, expected)


def negated(x):
    """x, of whose elements a bit says that they are the opposite of what is in memory."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize("which", ("positions", "log_decay", "inv_freq", "weight", "cache"))
def test_a_negative_bit_is_a_minus(backend, which):
    q, k = make_qk(2, 5, 2, 2)
    freqs = methods.xpos(64).to(device())
    positions = torch.arange(5.0, device=device(), dtype=torch.float64)
    caches = [torch.zeros(2, 9, 2, 64, device=device()) for _ in range(2)]

    def run(x):
        def given(name, value):
            return x if name == which else value

        freq = RopeFreqs(
            given("inv_freq", freqs.inv_freq), 1.0, given("log_decay", freqs.log_decay)
        )
        options = {"q_norm_weight": given("weight", weight)} if which == "weight" else {}
        if which == "cache":
            at = {"cache_seqlens": 1, "backend": backend}
            out = rope_append_kvcache(q, k, k, *caches, RopeFreqs(x), **at)
            return out, caches[0].clone()
        at = given("positions", positions)
        return apply_rope_qk(q, k, freq, positions=at, backend=backend, **options)

    weight = torch.rand(64, device=device()) + 0.5
    values = {"positions": positions, "log_decay": freqs.log_decay, "weight": weight}
    x = negated(values.get(which, freqs.inv_freq))
    assert x.is_neg()
    for got, want in zip(run(x), run(x.resolve_neg().contiguous())):
        assert torch.equal(got, want)


# -------------------------------------------------------------------------------------------------
# Results too large for the caches, which the CPU kernels write past those


MOST_KEPT = 24 << 20  # bytes: csrc/cpu/runtime/caches.h


@pytest.mark.parametrize("norm", ["none", "each head", "all heads"])
@pytest.mark.parametrize(
    "dtype, head_dim, interleaved", [(torch.float32, 96, True), (torch.bfloat16, 128, False)]
)
def test_as_its_parts(dtype, head_dim, interleaved, norm):
    heads, part = (5, 2), 3000
    tokens = MOST_KEPT // (sum(heads) * head_dim * dtype.itemsize) + part + 7
    q, k = (torch.randn(1, tokens, n, head_dim).to(dtype) for n in heads)
    options = {"interleaved": interleaved, "backend": "cpu"}
    if norm != "none":
        weights = (torch.rand(n * head_dim if norm == "all heads" else head_dim) for n in heads)
        options |= dict(zip(("q_norm_weight", "k_norm_weight"), weights))
    freqs = methods.rope(head_dim)
    whole = apply_rope_qk(q, k, freqs, **options)
    for first in range(0, tokens, part):
        positions = torch.arange(first, min(first + part, tokens))
        parts = (x[:, first : first + part] for x in (q, k))
        rotated = apply_rope_qk(*parts, freqs, positions=positions, **options)
        for x, y in zip(whole, rotated):
            assert torch.equal(x[:, first : first + part], y)


# -------------------------------------------------------------------------------------------------
# Rounding to bf16: AVX512_BF16's conversions would make denormals 0


# Every denormal, and normal numbers beside them in the same vector: sign and magnitude.
CODES = torch.arange(-160, 160, dtype=torch.int16)
CODES = torch.where(CODES < 0, -CODES - 2**15, CODES).to(torch.int16)


def rows(head_dim):
    """(1, 1, 5, head_dim): at position 0, where a rotation changes nothing."""
    count = 5 * head_dim
    return CODES.repeat(-(-count // CODES.numel()))[:count].view(torch.bfloat16).view(1, 1, 5, -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [32, 34, 64, 96, 128])
def test_denormals_stay(head_dim, interleaved):
    q = rows(head_dim)
    freqs = methods.rope(head_dim)
    for out in apply_rope_qk(q, q[:, :, :1], freqs, interleaved=interleaved, backend="cpu"):
        assert torch.equal(out.view(torch.int16), q[:, :, : out.shape[2]].view(torch.int16))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [32, 34, 64, 96, 128])
def test_denormals_stay_after_a_norm(head_dim, interleaved):
    weights = rows(head_dim)[0, 0]
    ones = torch.ones(1, 1, 1, head_dim, dtype=torch.bfloat16)
    for weight in weights:
        options = {"q_norm_weight": weight, "norm_eps": 1e-12, "interleaved": interleaved}
        out, _ = apply_rope_qk(ones, ones, methods.rope(head_dim), backend="cpu", **options)
        assert torch.equal(out.view(torch.int16).flatten(), weight.view(torch.int16))
