"""q and k that come rotated to their own positions, as models have them, are moved on.

Against raw ones in float64, and kernels against the reference. tests/decode has caches of every
kind with keys at their own positions.
"""

from dataclasses import dataclass

import pytest
import torch
from support.rounding import noise_of_lse

from extrope_kernels import apply_rope_qk, methods, rope_attention, rope_attention_with_kvcache
from extrope_kernels import scores as s
from extrope_kernels.scores import Score
from extrope_kernels.testing import assert_within_budget, device

FREQS = methods.yarn(32, factor=4.0, original_max_position_embeddings=64)
LEAKY = s.leaky_rerope(7, 3.0)
SCORES = {
    "plain": None,
    "rerope": s.rerope(7),
    "leaky_rerope": LEAKY,
    "self_extend": s.self_extend(8, 4),
    "dual_chunk": s.dual_chunk(9, 2),
    "string": s.string(5, 3),
}


@dataclass(frozen=True)
class Kind:
    """A call, and the layout of its rows."""

    score: Score | None = LEAKY
    dtype: torch.dtype = torch.float32
    packed: bool = False  # sequences of 13, 0 and 29 tokens; else two of 21
    interleaved: bool = False
    rotary_offset: int = 0

    def options(self) -> dict:
        """Those that rotations and attention share."""
        options = {"interleaved": self.interleaved, "rotary_offset": self.rotary_offset}
        if self.packed:
            options["cu_seqlens"] = torch.tensor([0, 13, 13, 42], dtype=torch.int32).to(device())
        return options


KINDS = {
    **{name: Kind(score) for name, score in SCORES.items()},
    "varlen": Kind(packed=True),
    "varlen of chunks": Kind(SCORES["dual_chunk"], packed=True, interleaved=True),
    "float16": Kind(dtype=torch.float16),
    "bfloat16": Kind(dtype=torch.bfloat16),
    "interleaved": Kind(interleaved=True),
    "offset": Kind(rotary_offset=6),
    "interleaved, offset": Kind(interleaved=True, rotary_offset=6),
    "pairs": Kind(s.dpe(7, [1, 2, 3, 4] * 4)),
    "pairs, varlen": Kind(s.dpe(7, [4, 3, 2, 1] * 4), packed=True, rotary_offset=8),
}


def inputs(dtype, kind=KINDS["plain"], q_start=0):
    """Raw q, k and v in float64 and the same, with q and k rotated, in a dtype."""
    lead = (42,) if kind.packed else (2, 21)
    shapes = (*lead, 4, 40), (*lead, 2, 40), (*lead, 2, 24)
    raw = [torch.randn(shape).double().to(device()) for shape in shapes]
    freqs, by = FREQS.to(device()), kind.options()
    if not kind.packed:
        by["positions"] = torch.arange(21, device=device()) + q_start
    rotated = apply_rope_qk(raw[0], raw[1], freqs, backend="reference", **by)
    return freqs, raw, [x.to(dtype) for x in (*rotated, raw[2])]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_reference_sees_what_it_sees_of_raw_ones(kind):
    freqs, raw, rotated = inputs(torch.float64, kind, q_start=1000)
    given = {"backend": "reference", **kind.options()}
    given |= {} if kind.packed else {"q_start": 1000, "k_start": 1000}
    want = rope_attention(*raw, freqs, kind.score, **given)
    out = rope_attention(*rotated, freqs, kind.score, rotated="qk", **given)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=name, marks=[pytest.mark.always] * (name == "pairs, varlen"))
     for name, kind in KINDS.items()],
)  # fmt: skip
def test_outputs_and_gradients(fast_backend, kind):
    """Gradients are those of q and k as they are given."""
    if kind.dtype == torch.bfloat16 and fast_backend == "triton" and device() == "cpu":
        pytest.skip("interpreted bfloat16 is cut where it should be rounded")

    def attend(rows, backend):
        rows = [x.clone().requires_grad_() for x in rows]
        options = {"rotated": "qk", "return_lse": True, "backend": backend, **kind.options()}
        return rows, *rope_attention(*rows, freqs, kind.score, **options)

    def results(rows, out, lse):
        return out.detach(), *torch.autograd.grad(out, rows, torch.ones_like(out))

    freqs, _, rotated = inputs(kind.dtype, kind)
    got = results(*attend(rotated, fast_backend))
    same_dtype = results(*attend(rotated, "reference"))
    exactly = attend([x.double() for x in rotated], "reference")
    noise = 0.0, *noise_of_lse(*exactly, torch.ones_like(exactly[1]))
    exact = results(*exactly)
    for name, more, *each in zip(("out", "dq", "dk", "dv"), noise, got, same_dtype, exact):
        assert_within_budget(name, *each, noise=more)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_a_models_own_cache(fast_backend, score):
    """It holds keys at their own positions, and new ones are written as they come."""
    freqs, _, (q, k, v) = inputs(torch.float32)
    exact = [x.double() for x in (q, k, v)]
    want = rope_attention(*exact, freqs, score, rotated="qk", backend="reference")[:, -3:]
    same_dtype = rope_attention(q, k, v, freqs, score, rotated="qk", backend="reference")[:, -3:]
    k_cache, v_cache = (x.new_zeros(2, 32, *x.shape[2:]) for x in (k, v))
    k_cache[:, :18], v_cache[:, :18] = k[:, :18], v[:, :18]
    out = rope_attention_with_kvcache(
        q[:, -3:], k_cache, v_cache, freqs, score, cache_seqlens=18, k=k[:, -3:], v=v[:, -3:],
        rotated="qk", backend=fast_backend,
    )  # fmt: skip
    assert_within_budget("out", out, same_dtype, want)
    assert torch.equal(k_cache[:, :21], k)


def test_what_it_does_not_go_with():
    freqs, _, (q, k, v) = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"^rope_attention: rotated must be .*, got 'q'"):
        rope_attention(q, k, v, freqs, rotated="q")
    with pytest.raises(ValueError, match="stored must be None with rotated='qk', got 'raw'"):
        rope_attention_with_kvcache(q, k, v, freqs, cache_seqlens=21, rotated="qk", stored="raw")
