"""16-bit q, k and v with results in float32, as a sum over blocks of keys takes them."""

import itertools

import pytest
import torch
from support.attention_oracle import frequencies, make_qkv

from extrope_kernels import scores
from extrope_kernels.ops.attention import AttentionCall, reference

OPS = torch.ops.extrope
DTYPES = [torch.bfloat16, torch.float16]
SCORES = {
    "one region": scores.rerope(64),
    "two regions": scores.leaky_rerope(6, 4.0),
    "three regions": scores.dual_chunk(8, 3),
}


def make_call(dtype, score, dims=(32, 32), packed=False, wide=True):
    """q, k and v with a head_dim of v's own, and the call."""
    qkv = make_qkv(2, 19, None, 4, 2, dims[0], dtype, head_dim_v=dims[1])
    cu_seqlens = None
    if packed:
        qkv = [x[0] for x in qkv]
        cu_seqlens = torch.tensor([0, 0, 11, 19], dtype=torch.int32, device=qkv[0].device)
    inv_freq = frequencies(dims[0]).inv_freq
    return qkv, AttentionCall(inv_freq, cu_seqlens, score=SCORES[score], float32_results=wide)


def arguments(call):
    return call.tensors, call.options


BEST = list(itertools.product([""], SCORES, [(32, 32), (32, 48)], [False, True], DTYPES))
# The interpreter takes its time, and does not round to bfloat16.
TRITON = [
    pytest.param("_triton", *case, torch.float16, marks=pytest.mark.thorough)
    for case in (
        ("one region", (16, 16), False),
        ("two regions", (16, 16), True),
        ("three regions", (16, 32), False),
    )
]


@pytest.mark.parametrize(("suffix", "score", "dims", "packed", "dtype"), BEST + TRITON)
def test_rounded_they_are_the_16_bit_results(suffix, score, dims, packed, dtype):
    """The same arithmetic to its last step: so they are as near as float32 is."""
    forward, backward = (getattr(OPS, f"attention_{op}{suffix}") for op in ("fwd", "bwd"))
    qkv, call = make_call(dtype, score, dims, packed)
    tensors, of_wide = arguments(call)
    of_narrow = call._replace(float32_results=False).options
    out, lse = forward(*qkv, *tensors, **of_narrow)
    wide, same_lse = forward(*qkv, *tensors, **of_wide)
    assert wide.dtype == torch.float32 and not torch.equal(wide, out.float())
    assert torch.equal(wide.to(dtype), out) and torch.equal(same_lse, lse)
    given = (torch.randn_like(out), torch.randn_like(lse), *qkv, out, lse, *tensors)
    narrow, grads = backward(*given, **of_narrow), backward(*given, **of_wide)
    for name, found, want in zip("qkv", grads, narrow, strict=True):
        assert found.dtype == torch.float32 and found.shape == want.shape, name
        assert torch.equal(found.to(dtype), want), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_dtypes_keep_theirs(dtype):
    qkv, call = make_call(dtype, "two regions")
    out, lse = reference.forward(*qkv, call)
    grads = reference.backward(torch.ones_like(out), None, *qkv, out, lse, call)
    assert all(x.dtype == dtype for x in (out, *grads))


def test_their_gradients_are_of_q_k_and_v():
    """In the dtypes of these, and those of the op with 16-bit results."""
    qkv, call = make_call(torch.bfloat16, "two regions")
    qkv = [x.requires_grad_() for x in qkv]
    args, tests = (*qkv, *call.tensors), ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.attention_fwd.default, args, arguments(call)[1], test_utils=tests)
    dout = torch.randn_like(qkv[0])
    found = []
    for wide in (False, True):
        options = call._replace(float32_results=wide).options
        out, _ = OPS.attention_fwd(*qkv, *call.tensors, **options)
        found.append(torch.autograd.grad(out, qkv, dout.to(out.dtype)))
    for got, want in zip(*found, strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, want)
