"""Every public error of the attention functions: the function, what was expected, what came."""

import math

import pytest
import torch
from attention_oracle import frequencies, make_qkv

from extrope_kernels import dual_chunk_attention, rerope_attention
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.testing import device

Q, K, V = make_qkv(2, 6, None, 4, 2)
CU = torch.tensor([0, 2, 6], dtype=torch.int32, device=device())
THETA = frequencies(32).inv_freq

CASES = [
    ({"q": "text"}, TypeError, "q must be a Tensor, got str"),
    ({"q": Q[0]}, ValueError, r"q must be \(batch, seqlen, heads, head_dim\), got shape \(6, 4"),
    ({"q": Q.int()}, ValueError, "q must be float32, .*, got torch.int32"),
    ({"q": Q.transpose(1, 3)}, ValueError, "q must be contiguous in its last dimension"),
    ({"k": K.double()}, ValueError, "k must be torch.float32 on .* like q, got torch.float64"),
    ({"v": V.half()}, ValueError, "v must be torch.float32 .*, got torch.float16"),
    ({"k": K[..., :16]}, ValueError, r"k must have q's head_dim of .*, got shape \(2, 6, 2, 16\)"),
    ({"k": K[:1], "v": V[:1]}, ValueError, "k must have q's batch 2, got 1"),
    (
        {"v": V[:, :5]},
        ValueError,
        r"v must have k's shape .* but for head_dim, got \(2, 5, 2, 32\)",
    ),
    ({"q": Q[:, :, :3]}, ValueError, "k's heads must divide q's 3 heads, got 2"),
    ({"k": K[:, :, :0], "v": V[:, :, :0]}, ValueError, "k's heads must divide q's 4 heads, got 0"),
    ({"freqs": THETA}, TypeError, "freqs must be a RopeFreqs, got Tensor"),
    ({"freqs": RopeFreqs(None)}, TypeError, "inv_freq must be a Tensor, got NoneType"),
    ({"freqs": RopeFreqs(THETA.half())}, ValueError, "inv_freq must be float32 or float64 on"),
    (
        {"freqs": RopeFreqs(THETA.expand(3, -1))},
        ValueError,
        r"inv_freq must be \(rotary_dim/2,\) or \(2, rotary_dim/2\), got \(3, 16\)",
    ),
    ({"freqs": RopeFreqs(THETA[:0])}, ValueError, r"inv_freq must hold 1 to head_dim/2 = 16"),
    (
        {"freqs": frequencies(64)},
        ValueError,
        r"inv_freq must hold 1 to .* 16 .*, got shape \(32,\)",
    ),
    (
        {"freqs": RopeFreqs(THETA, log_decay=THETA[:3])},
        ValueError,
        r"log_decay must be float32 \(16,\), contiguous on",
    ),
    (
        {"freqs": RopeFreqs(THETA, attention_factor=0.0)},
        ValueError,
        "attention_factor must be > 0, got 0.0",
    ),
    (
        {"freqs": RopeFreqs(THETA, axes=torch.zeros(16, dtype=torch.int32))},
        ValueError,
        r"freqs must have no axes \(mRoPE\), got some",
    ),
    ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be None or a number > 0, got -1.0"),
    ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be .*, got nan"),
    ({"log_n": 1}, ValueError, "log_n must be None or a length > 1, got 1"),
    ({"cu_seqlens": CU}, ValueError, r"q must be \(total, heads, head_dim\) with cu_seqlens, got"),
    ({"backend": "cudnn"}, ValueError, "backend must be None or one of .*, got 'cudnn'"),
]
PACKED_CASES = [
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a Tensor, got list"),
    ({"cu_seqlens": CU.float()}, ValueError, r"cu_seqlens must be int32 \(sequences \+ 1,\), got"),
    ({"cu_seqlens": CU[:1]}, ValueError, r"cu_seqlens must be int32 .*, got torch.int32 \(1,\)"),
    ({"cu_seqlens": CU.flip(0).expand(2, 3)[0, ::2].repeat(2)[::2]}, ValueError, "cu_seqlens must"),
    ({"k": K[0, :5], "v": V[0, :5]}, ValueError, "k must have q's head_dim and total of"),
]
REROPE_CASES = [
    ({"window": 0}, ValueError, "window must be >= 1, got 0"),
    ({"window": 2.5}, TypeError, "window must be an int, got float"),
    ({"window": True}, TypeError, "window must be an int, got bool"),
    ({"factor": 0.0}, ValueError, "factor must be > 0 .*, got 0.0"),
    ({"factor": math.nan}, ValueError, "factor must be > 0 .*, got nan"),
    ({"grouped": True}, ValueError, "grouped needs an integer factor, got inf"),
    ({"grouped": True, "factor": 1.5}, ValueError, "grouped needs an integer factor, got 1.5"),
    (
        {"grouped": True, "factor": 3},
        ValueError,
        "grouped needs a window that is a multiple of factor 3, got 4",
    ),
]
CHUNK_CASES = [
    ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
    ({"local_window": -1}, ValueError, "local_window must be >= 0, got -1"),
    ({"local_window": 8}, ValueError, "local_window must be less than chunk_size 8, got 8"),
    ({"chunk_size": 8.0}, TypeError, "chunk_size must be an int, got float"),
]


def call(function, changes, **own):
    arguments = {"q": Q, "k": K, "v": V, "freqs": frequencies(32), **own, **changes}
    return function(*(arguments.pop(name) for name in "qkv"), arguments.pop("freqs"), **arguments)


@pytest.mark.parametrize("changes, error, message", CASES + REROPE_CASES)
def test_rerope(changes, error, message):
    with pytest.raises(error, match=f"^rerope_attention: {message}"):
        call(rerope_attention, changes, window=4)


@pytest.mark.parametrize("changes, error, message", CASES + CHUNK_CASES)
def test_dual_chunk(changes, error, message):
    with pytest.raises(error, match=f"^dual_chunk_attention: {message}"):
        call(dual_chunk_attention, changes, chunk_size=8, local_window=2)


@pytest.mark.parametrize("changes, error, message", PACKED_CASES)
def test_packed(changes, error, message):
    with pytest.raises(error, match=f"^rerope_attention: {message}"):
        call(rerope_attention, {"cu_seqlens": CU, **changes}, q=Q[0], k=K[0], v=V[0], window=4)


@pytest.mark.parametrize("bounds", [[0, 2, 5], [1, 2, 6], [0, 7, 6], [0, -1, 6]])
def test_the_cpu_refuses_boundaries_that_do_not_fit(bounds):
    if device() != "cpu":
        pytest.skip("on a GPU the boundaries would have to be copied to the host first")
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=r"cu_seqlens must rise from 0 to"):
        call(rerope_attention, {"cu_seqlens": cu_seqlens}, q=Q[0], k=K[0], v=V[0], window=4)


@pytest.mark.parametrize("head_dim", [12, 520])
def test_head_dims_of_the_fused_kernels(head_dim):
    q, k, v = make_qkv(1, 3, head_dim=head_dim)
    with pytest.raises(ValueError, match=f"^rerope_attention: head_dim must .*, got {head_dim}"):
        rerope_attention(q, k, v, frequencies(head_dim), window=2)
    rerope_attention(q, k, v, frequencies(head_dim), window=2, backend="reference")


@pytest.mark.parametrize("named", ["triton", "flash_attn"])
def test_a_backend_that_is_not_here_says_why(named, monkeypatch):
    from extrope_kernels.ops.attention import api

    monkeypatch.setattr(api, "missing", lambda *_: "it is broken")
    with pytest.raises(NotImplementedError, match=f"{named!r} cannot run here: it is broken"):
        call(rerope_attention, {"backend": named}, window=4)


def test_triton_says_what_it_needs_on_a_cpu(monkeypatch):
    from extrope_kernels.ops._shared import backends

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("EXTROPE_TRITON_CHIP", raising=False)
    words = "^op: backend 'triton' cannot run here: Triton needs a GPU, or TRITON_INTERPRET=1"
    with pytest.raises(NotImplementedError, match=words):
        backends.require("op", "triton", ("reference", "triton"), "cpu")


def test_the_raw_op_checks_too():
    with pytest.raises(RuntimeError, match=r"^attention: starts must be 1 to 3 rising numbers"):
        torch.ops.extrope.attention_fwd(Q, K, V, THETA, starts=[], granularity=1, maps=[])
