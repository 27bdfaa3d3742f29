"""What attention refuses: the score's name, the argument, what was expected and what came."""

import math

import pytest
import torch
from attention_oracle import frequencies, make_qkv

from extrope_kernels import rope_attention, rope_attention_with_kvcache, scores
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.ops.attention import make_call
from extrope_kernels.testing import attention_backends, device

Q, K, V = make_qkv(2, 6, None, 4, 2)
CU = torch.tensor([0, 2, 6], dtype=torch.int32, device=device())
FREQS = frequencies(32)
THETA = FREQS.inv_freq
INF = math.inf
TENSORS = [
    ({"q": "text"}, TypeError, "q must be a Tensor, got str"),
    ({"q": "text", "q_start": 3}, TypeError, "q must be a Tensor, got str"),
    ({"q": Q[0]}, ValueError, "q must be (batch, seqlen, heads, head_dim), got shape (6, 4"),
    ({"q": Q.int()}, ValueError, "q must be float32, "),
    ({"q": Q.transpose(1, 3)}, ValueError, "q must be contiguous in its last dimension"),
    ({"k": K.double()}, ValueError, "k must be torch.float32 on "),
    ({"v": V.half()}, ValueError, "v must be torch.float32 on "),
    ({"k": K[..., :16]}, ValueError, "k must have q's head_dim of (2, 6, 4, 32), got shape (2, 6,"),
    ({"k": K[:1], "v": V[:1]}, ValueError, "k must have q's batch 2, got 1"),
    ({"v": V[:, :5]}, ValueError, "v must have k's shape (2, 6, 2, 32) but for head_dim, got (2,"),
    ({"q": Q[:, :, :3]}, ValueError, "k's heads must divide q's 3 heads, got 2"),
    ({"k": K[:, :, :0], "v": V[:, :, :0]}, ValueError, "k's heads must divide q's 4 heads, got 0"),
    ({"cu_seqlens": CU}, ValueError, "q must be (total, heads, head_dim) with cu_seqlens, got"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks must be torch.float32 (4,)"),
    ({"sinks": [1.0, 2.0]}, TypeError, "sinks must be a Tensor, got list"),
    ({"query_scale": torch.ones(3)}, ValueError, "query_scale must be float32 (6,) or (2, 6)"),
    ({"k_start": torch.zeros(2)}, ValueError, "k_start must be an int, or int32 (2,)"),
]
FREQUENCIES = [
    (THETA, TypeError, "freqs must be a RopeFreqs, got Tensor"),
    (RopeFreqs(None), TypeError, "inv_freq must be a Tensor, got NoneType"),
    (RopeFreqs(THETA.half()), ValueError, "inv_freq must be float32 or float64 on"),
    (RopeFreqs(THETA.expand(3, -1)), ValueError, "inv_freq must be (rotary_dim/2,), (2, rotary"),
    (RopeFreqs(THETA[:0]), ValueError, "inv_freq must hold 1 to head_dim/2 = 16"),
    (frequencies(64), ValueError, "inv_freq must hold 1 to head_dim/2 = 16 contiguous"),
    (RopeFreqs(THETA, log_decay=THETA[:3]), ValueError, "log_decay must be float32 (16,), contig"),
    (RopeFreqs(THETA, attention_factor=0.0), ValueError, "attention_factor must be > 0, got 0.0"),
    (RopeFreqs(THETA, attention_factor=INF), ValueError, "attention_factor must be > 0, got inf"),
    (
        RopeFreqs(THETA, axes=THETA.int()),
        ValueError,
        "positions must be given with freqs of several axes (mRoPE), got none",
    ),
]
NUMBERS = [
    ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be None or a number > 0, got -1.0"),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be None or a number > 0, got 0.0"),
    ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be None or a number > 0, got na"),
    ({"log_n": 1}, ValueError, "log_n must be None or a length > 1, got 1"),
    ({"log_n": 0}, ValueError, "log_n must be None or a length > 1, got 0"),
    ({"softcap": -1.0}, ValueError, "softcap must be >= 0 (0: none), got -1.0"),
    ({"rotary_offset": 2}, ValueError, "rotary_offset must be from 0 to head_dim - rotary_dim = 0"),
    ({"softcap": INF}, ValueError, "softcap must be >= 0 (0: none), got inf"),
    ({"softcap": 1e-46}, ValueError, "softcap must be 0 (none) or from 1e-30 to 1e30, got 1e-46"),
    ({"softcap": 1e39}, ValueError, "softcap must be 0 (none) or from 1e-30 to 1e30, got 1e+39"),
    ({"softcap": "a"}, TypeError, "softcap must be a number, got str"),
    ({"sliding_window": 0}, ValueError, "sliding_window must be >= 1, got 0"),
    ({"sliding_window": 2**62}, ValueError, f"sliding_window must be < 2**62, got {2**62}"),
    ({"q_start": -1}, ValueError, "q_start must be between 0 and 2**29, got -1"),
    ({"k_start": 2**29}, ValueError, "k_start must be between 0 and 2**29, got 536870912"),
    ({"k_start": 1.5}, TypeError, "k_start must be an int or a Tensor, got float"),
    ({"backend": "cudnn"}, ValueError, "backend must be None or one of "),
    ({"softcup": 1.0}, TypeError, "got an unexpected keyword argument 'softcup'"),
]
PACKED = [
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a Tensor, got list"),
    ({"cu_seqlens": CU.float()}, ValueError, "cu_seqlens must be int32 (sequences + 1,), got"),
    ({"cu_seqlens": CU[:1]}, ValueError, "cu_seqlens must be int32 (sequences + 1,)"),
    ({"cu_seqlens": CU.repeat(2)[::2]}, ValueError, "cu_seqlens must"),
    ({"k": K[0, :5], "v": V[0, :5]}, ValueError, "k must have q's head_dim and total of"),
]


def refused(error, message, q=Q, k=K, v=V, freqs=FREQS, score=None, **options):
    with pytest.raises(error) as caught:
        rope_attention(q, k, v, freqs, score, **options)
    # Of a name that is no option, Python tells.
    name = "rope_attention" + ("()" if "unexpected keyword" in message else ":")
    name = name if score is None else getattr(score, "name", "rope_attention") + ":"
    text = str(caught.value)
    assert text.startswith(f"{name} {message}") or f"{name} {message}" in text, text


@pytest.mark.parametrize("named", [None, "reference"])
@pytest.mark.parametrize("changes, error, message", TENSORS + NUMBERS, ids=str)
def test_arguments(changes, error, message, named):
    changes = {n: x.to(device()) if hasattr(x, "to") else x for n, x in changes.items()}
    refused(error, message, **{"backend": named, **changes})


@pytest.mark.parametrize("freqs, error, message", FREQUENCIES, ids=lambda x: str(x)[:40])
def test_frequencies(freqs, error, message):
    refused(error, message, freqs=freqs)


@pytest.mark.parametrize("changes, error, message", PACKED)
def test_packed(changes, error, message):
    refused(error, message, **{"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens": CU, **changes})


def test_a_score_s_name_goes_first():
    refused(
        ValueError, "k must have q's batch 2, got 1", k=K[:1], v=V[:1], score=scores.string(9, 2)
    )
    refused(TypeError, "score must be None or a Score, as scores.rerope", score="rerope")
    refused(TypeError, "score must be None or a Score, as scores.rerope", score=scores.rerope)


@pytest.mark.parametrize("named", [None, "reference"])
@pytest.mark.parametrize(
    "bounds", [[0, 2, 5], [1, 2, 6], [0, 7, 6], [0, -1, 6], [1, 0], [0, -5, 0], [0, 2**30]], ids=str
)
def test_boundaries_that_do_not_fit(bounds, named):
    if device() != "cpu":
        pytest.skip("on a GPU the boundaries would have to be copied to the host first")
    tokens = 6 if bounds[-1] in (5, 6) else 0
    q, k, v = (x[0, :tokens] for x in (Q, K, V))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    message = f"cu_seqlens must rise from 0 to the number of tokens {tokens}, got"
    refused(ValueError, message, q, k, v, cu_seqlens=cu_seqlens, backend=named)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
def test_boundaries_past_int32_do_not_wrap():
    cu_seqlens = torch.tensor([0, 2**32 + 6])
    message = "cu_seqlens must rise from 0 to the number of tokens 6"
    refused(ValueError, message, Q[0], K[0], V[0], cu_seqlens=cu_seqlens)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
@pytest.mark.parametrize("name", ["q_start", "k_start"])
@pytest.mark.parametrize("named", [x for x in attention_backends() if x != "flash_attn"])
def test_starts_before_the_first_position(named, name):
    start = {name: torch.tensor([3, -1], dtype=torch.int32)}
    refused(ValueError, f"{name} must be between 0 and 2**31, got", backend=named, **start)


@pytest.mark.parametrize("head_dim", [12, 520])
def test_head_dims_of_the_fused_kernels(head_dim):
    q, k, v = make_qkv(1, 3, head_dim=head_dim)
    refused(ValueError, "head_dim must", q, k, v, frequencies(head_dim))
    rope_attention(q, k, v, frequencies(head_dim), backend="reference")


@pytest.mark.parametrize("named", ["triton", "flash_attn"])
def test_a_backend_that_is_not_here_says_why(named, monkeypatch):
    from extrope_kernels.ops.attention import api

    monkeypatch.setattr(api, "missing", lambda *_: "it is broken")
    with pytest.raises(NotImplementedError, match=f"{named!r} cannot run here: it is broken"):
        rope_attention(Q, K, V, FREQS, backend=named)


@pytest.mark.skipif("triton" not in attention_backends(), reason="needs Triton")
def test_triton_takes_no_float64():
    q, k, v = (x.double() for x in (Q, K, V))
    with pytest.raises(NotImplementedError, match=r"^attention: .* take float64"):
        rope_attention(q, k, v, FREQS, backend="triton")
    with pytest.raises(NotImplementedError, match=r"^decode: .* take float64"):
        rope_attention_with_kvcache(q, k, v, FREQS, cache_seqlens=6, backend="triton")


def test_triton_says_what_it_needs_on_a_cpu(monkeypatch):
    from extrope_kernels.ops._shared import backends

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("EXTROPE_TRITON_CHIP", raising=False)
    words = "^op: backend 'triton' cannot run here: Triton needs a GPU, or TRITON_INTERPRET=1"
    with pytest.raises(NotImplementedError, match=words):
        backends.require("op", "triton", ("reference", "triton"), "cpu")


def test_the_raw_op_checks_too():
    message = "^attention: region_starts must be of 1 to 3 regions, got 4"
    options = make_call(FREQS, None).options | {"region_starts": [0] * 4}
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.extrope.attention_fwd(Q, K, V, THETA, *[None] * 7, **options)


@pytest.mark.parametrize("named", [None, "reference"])
def test_numbers_past_float32(named):
    refused(ValueError, "softmax_scale must be at most 1e30, got 1e+39", softmax_scale=1e39)
    for factor in (1e20, 1e300):
        freqs = RopeFreqs(FREQS.inv_freq, attention_factor=factor)
        refused(ValueError, "attention_factor must be at most 1e15", freqs=freqs, backend=named)
    assert rope_attention(Q, K, V, FREQS, softcap=2**70, backend=named).isfinite().all()


def test_optional_tensors_are_dense():
    sinks = torch.zeros(Q.shape[2]).to_sparse()
    refused(ValueError, "sinks must be a dense tensor, got torch.sparse_coo", sinks=sinks)


@pytest.mark.skipif(device() != "cpu", reason="device tensors are not read")
def test_starts_that_kernels_cannot_add_to():
    for start in (2**29, torch.tensor([0, 2**29], dtype=torch.int32)):
        refused(ValueError, "q_start must be between 0 and 2**29, got", q_start=start)


def test_what_was_made_in_inference_mode_trains():
    with torch.inference_mode():
        freqs = RopeFreqs(FREQS.inv_freq * 1)
        divisors = torch.full(freqs.inv_freq.shape, 2.0, device=device())
        score = scores.far_frequencies(2, divisors)
    q = Q.clone().requires_grad_()
    rope_attention(q, K, V, freqs, score).sum().backward()
    assert q.grad.isfinite().all()


def test_an_odd_rotary_offset_is_the_reference_s(any_backend):
    call = {"freqs": frequencies(16), "rotary_offset": 3, "backend": any_backend}
    if any_backend == "reference":
        assert rope_attention(Q, K, V, **call).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"rope_attention: rotary_offset must be even.*, got 3"):
        rope_attention(Q, K, V, **call)


def test_heads_before_tokens_are_warned_of():
    q, k = torch.randn(1, 8, 16, 32), torch.randn(1, 2, 16, 32)  # 8 and 2 heads, 16 tokens
    with pytest.warns(UserWarning, match="first 6 of q.s 8 tokens .* seqlen, heads, head_dim"):
        rope_attention(q, k, k, FREQS)
