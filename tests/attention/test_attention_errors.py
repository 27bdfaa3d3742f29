"""What attention refuses beside single wrong arguments (see tests/all_ops)."""

import math
import warnings

import pytest
import torch
from support.attention_oracle import frequencies, make_qkv

from extrope_kernels import rope_attention, rope_attention_with_kvcache, scores
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.ops.attention import make_call
from extrope_kernels.ops.attention import op as attention_op
from extrope_kernels.ops.decode import op as decode_op
from extrope_kernels.scores.base import MapKind
from extrope_kernels.testing import attention_backends, device

Q, K, V = make_qkv(2, 6, None, 4, 2)
FREQS = frequencies(32)
THETA = FREQS.inv_freq


@pytest.mark.parametrize("named", [None, "reference"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": K[:, :, :0], "v": V[:, :, :0]}, "k's heads must divide q's 4 heads, got 0"),
        (
            {"k": K[:1], "v": V[:1]},
            r"k must be \(batch 2, seqlen_k, .* to go with q, got \(1, 6, 2, 32\)",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 6]), "q": Q[0], "k": K[0, :5], "v": V[0, :5]},
            r"k must be \(total 6, heads_k, head_dim 32\) to go with q, got \(5, 2, 32\)",
        ),
    ],
)
def test_keys_and_values_that_do_not_go_with_queries(changes, message, named):
    given = {"q": Q, "k": K, "v": V, **changes, "backend": named}
    given = {name: x.to(device()) if hasattr(x, "to") else x for name, x in given.items()}
    with pytest.raises(ValueError, match=f"^rope_attention: {message}"):
        rope_attention(freqs=FREQS, **given)


def test_only_a_score_is_a_score():
    for wrong in ("rerope", scores.rerope):
        with pytest.raises(TypeError, match=r"^rope_attention: score must be None or a Sco"):
            rope_attention(Q, K, V, FREQS, wrong)


@pytest.mark.parametrize("head_dim", [8, 512])
def test_the_least_and_the_largest_head_dim(head_dim):
    inputs = (*make_qkv(1, 3, head_dim=head_dim), frequencies(head_dim))
    torch.testing.assert_close(
        rope_attention(*inputs), rope_attention(*inputs, backend="reference")
    )


@pytest.mark.parametrize("head_dim", [4, 12, 520])
def test_head_dims_of_the_fused_kernels(head_dim):
    q, k, v = make_qkv(1, 3, head_dim=head_dim)
    with pytest.raises(ValueError, match=r"^rope_attention: head_dim must"):
        rope_attention(q, k, v, frequencies(head_dim))
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
    from extrope_kernels.ops._torch import library

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("EXTROPE_TRITON_CHIP", raising=False)
    words = "^op: backend 'triton' cannot run here: Triton needs a GPU, or TRITON_INTERPRET=1"
    with pytest.raises(NotImplementedError, match=words):
        library.require("op", "triton", ("reference", "triton"), "cpu")


@pytest.mark.parametrize(
    "message, changes",
    [
        ("region_starts must be of 1 to 3 regions, got 4", {"region_starts": [0] * 4}),
        ("attention_factor must be .*at most 1e\\+?15, got", {"attention_factor": 1e300}),
        ("softmax_scale must be .*at most 1e\\+?30", {"softmax_scale": 1e39}),
        ("sliding_window must be < 2", {"sliding_window": 2**62}),
    ],
)
def test_the_raw_op_checks_too(message, changes):
    options = make_call(FREQS, None).options | changes
    with pytest.raises((RuntimeError, ValueError), match=f"^attention: {message}"):
        torch.ops.extrope.attention_fwd(Q, K, V, THETA, *[None] * 7, **options)


@pytest.mark.parametrize("named", [None, "reference"])
def test_a_cap_may_be_past_64_bits(named):
    assert rope_attention(Q, K, V, FREQS, softcap=2**70, backend=named).isfinite().all()


def test_what_was_made_in_inference_mode_trains():
    with torch.inference_mode():
        freqs = RopeFreqs(FREQS.inv_freq * 1)
        score = scores.dpe(2, torch.full(freqs.inv_freq.shape, 2.0, device=device()))
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


def test_queries_that_see_no_key_and_more_heads_than_any_model_has_are_warned_of():
    shapes = r": shapes are \(batch, seqlen, heads, head_dim\)$"
    q, k = torch.zeros(1, 8, 2, 32), torch.zeros(1, 5, 1, 32)
    with pytest.warns(UserWarning, match=f"the first 3 of q's 8 tokens see no key{shapes}"):
        assert not rope_attention(q, k, k + 1, FREQS)[:, :3].any()
    q = torch.zeros(1, 4, 300, 32)  # 4 heads, 300 tokens
    with pytest.warns(UserWarning, match=f"q has 300 heads of 4 tokens{shapes}"):
        rope_attention(q, q, q, FREQS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rope_attention(*(q.transpose(1, 2),) * 3, FREQS)
        rope_attention(*(torch.zeros(1, 4, 128, 32),) * 3, FREQS)


def test_heads_before_tokens_are_warned_of_where_the_call_stands():
    q, k = torch.zeros(1, 8, 5, 32), torch.zeros(1, 2, 5, 32)
    with pytest.warns(UserWarning, match="the first 6 of q's 8 tokens see no key") as told:
        rope_attention(q, k, k, FREQS)
    assert told[0].filename == __file__


# -------------------------------------------------------------------------------------------------
# Ops called bare: every backend gives the same answer

BARE = ("", "_reference", "_triton")
REFERENCES = {"decode": decode_op.KERNELS["reference"]} | {
    name: kernels["reference"] for name, kernels in attention_op.KERNELS.items()
}


def bare(name, suffix, *tensors, **options):
    if suffix == "_reference":
        return REFERENCES[name](*tensors, **options)
    if suffix == "_triton" and "triton" not in attention_backends():
        pytest.skip("needs Triton")
    return getattr(torch.ops.extrope, name + suffix)(*tensors, **options)


@pytest.mark.parametrize("suffix", BARE)
@pytest.mark.parametrize("name", ("q_start", "k_start"))
def test_the_last_start_is_the_same_everywhere(name, suffix):
    if device() != "cpu":
        pytest.skip("a GPU's values are not read")
    call = make_call(FREQS, None)
    for wrong in (-1, 2**29, 2**31 - 1):
        start = torch.tensor([0, wrong], dtype=torch.int32)
        tensors = call._replace(**{name: start}).tensors
        words = f"^attention: {name} must be between 0 and 2\\*\\*29, got"
        with pytest.raises((ValueError, RuntimeError), match=words):
            bare("attention_fwd", suffix, Q, K, V, *tensors, **call.options)
    last = call._replace(**{name: torch.tensor([2**29 - 1], dtype=torch.int32)})
    _, lse = bare("attention_fwd", suffix, Q, K, V, *last.tensors, **last.options)
    assert lse.isfinite().all()


@pytest.mark.parametrize("suffix", BARE)
@pytest.mark.parametrize("row", (-(2**20), -1, 2))
def test_a_map_of_pairs_names_a_row_that_exists(row, suffix):
    at = {"device": device()}
    q, k, v = (x.to(device()) for x in (Q, K, V))
    call = make_call(FREQS.to(device()), scores.dpe(2, [2] * 16), rotated="k")
    options = call.options
    options["map_rows"] = [row if x == "PER_PAIR" else 0 for x in named_kinds(options)]
    words = f"maps name row {row} of 2 in pair_maps"
    with pytest.raises((ValueError, RuntimeError), match=f"^attention: {words}"):
        bare("attention_fwd", suffix, q, k, v, *call.tensors, **options)
    cached = torch.tensor([6, 6], dtype=torch.int32, **at)
    tensors = (q, k, v, None, None, *call.tensors[:6], cached, *[None] * 4)
    with pytest.raises((ValueError, RuntimeError), match=f"^decode: {words}"):
        bare("decode", suffix, *tensors, **options)


@pytest.mark.skipif(device() == "cuda", reason="values on a GPU are not looked at")
@pytest.mark.parametrize("suffix", BARE)
@pytest.mark.parametrize(
    "row, wrong",
    [(0, 0.0), (0, 1e-20), (0, math.nan), (1, math.nan), (1, math.inf), (1, 1e30), (1, -1e30)],
)
def test_the_raw_ops_check_maps_of_pairs(row, wrong, suffix):
    """Small divisors and large offsets made NaN."""
    call = make_call(FREQS, scores.dpe(2, [2] * len(THETA)), rotated="k")
    pair_maps = call.pair_maps.clone()
    pair_maps[-1, row] = wrong
    call, words = call._replace(pair_maps=pair_maps), r".* divisor >= 2\*\*-22 and an offset within"
    with pytest.raises((ValueError, RuntimeError), match=f"^attention: {words}"):
        bare("attention_fwd", suffix, Q, K, V, *call.tensors, **call.options)
    cached = torch.tensor([6, 6], dtype=torch.int32)
    tensors = (Q, K, V, None, None, *call.tensors[:6], cached, *[None] * 4)
    with pytest.raises((ValueError, RuntimeError), match=f"^decode: {words}"):
        bare("decode", suffix, *tensors, **call.options)


def named_kinds(options):
    return [MapKind(kind).name for kind in options["map_kinds"]]
