"""The rotation by given cosines and sines: against float64 and transformers' own function."""

from __future__ import annotations

import pytest
import torch
from truncation import truncation

from extrope_kernels import apply_rope_qk, methods
from extrope_kernels.ops.rope.cos_sin import reference
from extrope_kernels.testing import DTYPES, assert_within_budget, device, make_qk

OPS = {
    "reference": reference,
    "cpu": torch.ops.extrope.rope_cos_sin,
    "cuda": torch.ops.extrope.rope_cos_sin,
    "triton": torch.ops.extrope.rope_cos_sin_triton,
}


def given(batch, seqlen, half, dtype=torch.float32):
    angles = torch.randn(batch, seqlen, half, dtype=torch.float64, device=device())
    return angles.cos().to(dtype), angles.sin().to(dtype)


def gradients(op, tensors, douts, cos, sin, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outs = op(*leaves, cos, sin, **options)
    douts = [x.to(leaf.dtype) for x, leaf in zip(douts, leaves)]
    return *(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)


@pytest.mark.parametrize("interleaved, conjugate", ((False, True), (True, False)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, half", ((9, 4), (34, 3), (72, 36), (80, 10), (128, 64)))
def test_against_float64(backend, head_dim, half, dtype, interleaved, conjugate):
    tensors, (cos, sin) = make_qk(2, 7, 3, 2, head_dim, dtype), given(2, 7, half)
    douts = [torch.randn_like(x) for x in tensors]
    how = {"interleaved": interleaved, "conjugate": conjugate}
    got = gradients(OPS[backend], tensors, douts, cos, sin, **how)
    same = gradients(reference, tensors, douts, cos, sin, **how)
    wide = [x.double() for x in tensors]
    exact = gradients(reference, wide, douts, cos.double(), sin.double(), **how)
    for name, *values in zip(("q", "k", "dq", "dk"), got, same, exact):
        assert_within_budget(name, *values, truncation(backend, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
def test_cos_and_sin_have_their_own_dtype(backend, dtype, of):
    tensors, (cos, sin) = make_qk(1, 5, 2, 1, 64, dtype), given(1, 5, 32, of)
    got = OPS[backend](*tensors, cos, sin)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = OPS[backend](*tensors, cos.to(wide), sin.to(wide))
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_whatever_its_bits(backend, dtype):
    """Rounding to bfloat16 carries from the lower bits of a NaN: it could become 0."""
    q, _ = make_qk(1, 2, 1, 1, 72, dtype)
    cos = torch.tensor([-1, 2**31 - 1], dtype=torch.int32, device=device()).view(torch.float32)
    cos = cos[None, :, None].repeat(1, 1, 36)
    for interleaved in (False, True):
        out, _ = OPS[backend](q, None, cos, torch.zeros_like(cos), interleaved=interleaved)
        assert out.isnan().all()


@pytest.mark.parametrize("batch, seqlen", ((1, 1), (3, 1), (1, 131), (2, 0), (0, 5)))
@pytest.mark.parametrize("heads", ((1, 1), (17, 1), (4, 4)))
def test_shapes_and_strides(backend, heads, batch, seqlen):
    """Heads before tokens, the same angles for all sequences, halves of wider tables, no k."""
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qk(batch, seqlen, *heads))
    cos, sin = (torch.cat((x, x), -1)[..., :32] for x in given(1, seqlen, 32))
    want = reference(q, k, cos, sin)
    for got in (OPS[backend](q, k, cos, sin), OPS[backend](q, None, cos, sin)):
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(OPS[backend](q, k, cos, sin)[1], want[1], rtol=0, atol=1e-6)


def test_is_the_rotation_of_its_angles(backend):
    q, k = make_qk(1, 300, 3, 2, 64)
    freqs = methods.yarn(64, factor=4.0, original_max_position_embeddings=64).to(device())
    angle = torch.arange(300, device=device())[:, None] * freqs.inv_freq.double()
    cos, sin = ((x * freqs.attention_factor).float()[None] for x in (angle.cos(), angle.sin()))
    for got, want in zip(OPS[backend](q, k, cos, sin), apply_rope_qk(q, k, freqs)):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_is_what_transformers_computes(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = make_qk(2, 9, 3, 2, 32, torch.float64)
    cos, sin = (torch.cat((x, x), -1) for x in given(2, 9, 16, torch.float64))
    want = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for x, y in zip(OPS[backend](q, k, cos[..., :16], sin[..., :16]), want):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-15)


def test_derivatives(backend):
    q, k = (x.requires_grad_() for x in make_qk(1, 2, 1, 1, 6, torch.float64))
    cos, sin = given(1, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k: OPS[backend](q, k, cos, sin), (q, k), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        lambda q, k: OPS[backend](q, k, cos, sin), (q, k), fast_mode=True
    )
    (dq,) = torch.autograd.grad(OPS[backend](q, k, cos, sin)[0].sum(), q)
    want = reference(torch.ones_like(q), None, cos, sin, conjugate=True)[0]
    torch.testing.assert_close(dq, want)
    if backend != "reference":
        with pytest.raises(
            NotImplementedError, match="rope_cos_sin: cos and sin must not require grad"
        ):
            OPS[backend](q, k, cos.requires_grad_(), sin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 3, 16)}, r"q must be \(batch, seqlen, heads, head_dim\)"),
        ({"k": torch.zeros(2, 4, 1, 16)}, "k must have q's shape"),
        ({"cos": torch.zeros(2, 4, 8)}, r"cos must be \(2 or 1, 5, rotary_dim/2\).* got .*2, 4, 8"),
        ({"cos": torch.zeros(2, 5, 9)}, r"cos must be \(2 or 1, 5, rotary_dim/2\)"),
        ({"sin": torch.zeros(1, 5, 8)}, "sin must have cos's dtype and shape"),
        ({"sin": torch.zeros(2, 5, 8, dtype=torch.float64)}, "sin must have cos's dtype and shape"),
        ({x: torch.zeros(2, 5, 16)[..., ::2] for x in ("cos", "sin")}, "contiguous in .* last dim"),
    ],
)
def test_refuses(backend, change, message):
    q, k = make_qk(2, 5, 3, 1, 16)
    cos, sin = given(2, 5, 8)
    arguments = {"q": q, "k": k, "cos": cos, "sin": sin}
    arguments |= {name: x.to(device()) for name, x in change.items()}
    with pytest.raises((ValueError, RuntimeError), match=f"rope: .*{message}"):
        OPS[backend](**arguments)
