"""What attention over a cache refuses: argument, expected and got; and nothing is written."""

from __future__ import annotations

import pytest
import torch
from decode_oracle import Case, make
from rope_oracle import INTERPRETED
from score_examples import EXAMPLES, PLAIN

from extrope_kernels import methods, rope_attention_with_kvcache, scores
from extrope_kernels.ops.attention import make_call
from extrope_kernels.testing import device

DIM = 32


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device())


def randn(*shape, **options):
    return torch.randn(*shape, device=device(), **options)


NEW = randn(2, 2, 2, DIM)
LARGER = {"k_cache": randn(3, 12, 2, DIM), "v_cache": randn(3, 12, 2, DIM)}
ONE = randn(2, 12, 2, DIM)
EXPANDED = randn(2, 1, 2, DIM).expand(2, 12, 2, DIM)
BAD = [
    (dict(q=[1.0]), TypeError, "q must be a Tensor, got list"),
    (dict(q=randn(2, 4, DIM)), ValueError, "q must have 4 dimensions, got shape"),
    (dict(q=torch.ones(2, 2, 4, DIM).int()), ValueError, "q must be float32, bfloat16"),
    (dict(q=randn(2, 2, DIM, 4).mT), ValueError, "q must be contiguous in its last dimension"),
    (dict(q=randn(2, 2, 4, DIM).requires_grad_()), ValueError, "q must not require grad"),
    (dict(v_cache=ONE.clone().requires_grad_()), ValueError, "v_cache must not require grad"),
    (dict(k_cache=ONE.half()), ValueError, "k_cache must be torch"),
    (LARGER, ValueError, "k_cache must be (2, max_len, heads_k, 32), got (3, 12, 2, 32)"),
    (dict(k_cache=ONE[..., :16], v_cache=ONE[..., :16]), ValueError, "k_cache must be (2, max_len"),
    (dict(v_cache=randn(2, 13, 2, DIM)), ValueError, "v_cache must have k_cache's shape"),
    (dict(q=randn(2, 2, 3, DIM)), ValueError, "heads must divide q's 3 heads, got 2"),
    (dict(cache_seqlens=2.0), TypeError, "cache_seqlens must be an int or"),
    (dict(cache_seqlens=True), TypeError, "cache_seqlens must be an int or"),
    (dict(cache_seqlens=ints(3, 3).long()), ValueError, "cache_seqlens must be int32 (2,)"),
    (dict(cache_seqlens=ints(3)), ValueError, "cache_seqlens must be int32 (2,)"),
    (dict(cache_leftpad=ints(3)), ValueError, "cache_leftpad must be int32 (2,)"),
    (dict(cache_leftpad=[0, 0]), TypeError, "cache_leftpad must be a Tensor"),
    (dict(block_table=ints(0, 1)), ValueError, "block_table must be int32 (2, max"),
    (dict(block_table=ints(0, 1)[:, None], k_cache=randn(3, 0, 2, DIM),
          v_cache=randn(3, 0, 2, DIM)), ValueError, "must have a block_size >= 1"),
    (dict(k=NEW), ValueError, "k and v must be given together, got k alone"),
    (dict(v=NEW), ValueError, "k and v must be given together, got v alone"),
    (dict(k=NEW[:, :1], v=NEW[:, :1]), ValueError, "k must have q's batch and seqlen"),
    (dict(k=NEW[:, :, :1], v=NEW[:, :, :1]), ValueError, "k must have k_cache's heads and head"),
    (dict(k=NEW, v=NEW[:, :, :1]), ValueError, "v must have v_cache's heads and head_dim (2, 32)"),
    (dict(k=NEW, v=NEW[:, :1]), ValueError, "v must have k's tokens"),
    (dict(k=NEW.half(), v=NEW.half()), ValueError, "k must be torch.float32 on"),
    (dict(k=NEW, v=NEW, cache_seqlens=1, v_cache=EXPANDED), ValueError, "v_cache must not be exp"),
    (dict(k=NEW, v=NEW, k_cache=ONE, v_cache=ONE), ValueError,
     "k_cache and v_cache must be two tensors to be written to, got two that share memory"),
    (dict(k=NEW, v=NEW, k_cache=ONE, v_cache=ONE[:]), ValueError, "got two that share memory"),
    (dict(k_cache=ONE.to(torch.float8_e5m2)), ValueError,
     "k_cache must be float32, bfloat16, float16 or float64 (or float8_e4m3fn with k_scale and"),
    (dict(freqs=methods.xpos(DIM).to(device())), ValueError, "no log_decay (XPOS)"),
    (dict(freqs=methods.rope(64).to(device())), ValueError, "inv_freq must hold 1 to"),
    (dict(score="rerope"), TypeError, "score must be None or a Score"),
    (dict(log_n=1.0), ValueError, "log_n must be None or a length > 1, got 1.0"),
    (dict(softmax_scale=0.0), ValueError, "softmax_scale must be None or a number > 0"),
    (dict(backend="fast"), ValueError, "backend must be None or one of"),
    # Values, which on a GPU nobody looks at.
    (dict(cache_seqlens=ints(37, 1000)), ValueError, "cache_seqlens must be between 0 and"),
    (dict(cache_seqlens=ints(1, 11), k=NEW, v=NEW), ValueError, "2 new tokens included, got"),
    (dict(cache_leftpad=ints(0, -1)), ValueError, "cache_leftpad must be >= 0, got"),
    (dict(block_table=ints(0, 2)[:, None]), ValueError, "block_table must name pages between 0 an"),
]  # fmt: skip
VALUES = len(BAD) - 4


@pytest.mark.parametrize("named", [None, "reference"])
@pytest.mark.parametrize("number", range(len(BAD)), ids=lambda n: BAD[n][2][:40])
def test_refused_before_anything_is_written(number, named):
    if not INTERPRETED and number >= VALUES:
        pytest.skip("values on a GPU are not looked at")
    changes, error, words = BAD[number]
    inputs = make(Case((9, 9), 2, head_dim=DIM, rotary_dim=DIM, example=PLAIN))
    changes = dict(changes)
    given = {"freqs": inputs.freqs, "score": changes.pop("score", None), "backend": named}
    given |= {n: getattr(inputs, n) for n in ("q", "k_cache", "v_cache")} | inputs.call | changes
    before = {n: given[n].detach().clone() for n in ("k_cache", "v_cache")}
    with pytest.raises(error) as caught:
        rope_attention_with_kvcache(**given)
    message = str(caught.value)
    assert message.startswith("rope_attention_with_kvcache: ") and words in message, message
    for name, x in before.items():
        torch.testing.assert_close(given[name].detach(), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ("k", "v"))
def test_new_rows_are_not_slots_that_are_written(name):
    """A thread would read what another has written; other slots of the cache are fine."""
    k_cache, v_cache = torch.randn(2, 2, 12, 2, DIM)
    rest = {"freqs": methods.rope(DIM), "cache_seqlens": 3, "backend": "cpu"}
    rest |= {"q": torch.randn(2, 2, 4, DIM), "v_cache": v_cache, "k": NEW.cpu(), "v": NEW.cpu()}
    cache = {"k": k_cache, "v": v_cache}[name]
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(ValueError, match=f"kvcache: {name} must not share memory with {name}_ca"):
        rope_attention_with_kvcache(k_cache=k_cache, **{**rest, name: cache[:, 2:4]})
    for x, y in zip((k_cache, v_cache), before):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    new = cache[:, 5:7].clone()
    rope_attention_with_kvcache(k_cache=k_cache, **{**rest, name: cache[:, 5:7]})
    actual = k_cache.clone(), v_cache.clone()
    rope_attention_with_kvcache(k_cache=k_cache, **{**rest, name: new})
    for x, y in zip(actual, (k_cache, v_cache)):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_score_s_name_goes_first(name):
    inputs = make(Case((9, 9), example=EXAMPLES[name]))
    with pytest.raises(TypeError, match=f"^{name}: q must be a Tensor"):
        inputs.run(q=[1.0])
    with pytest.raises(ValueError, match=f"^{name}: k_cache must be torch"):
        inputs.run(k_cache=inputs.k_cache.half())


def test_head_dims_of_the_fused_kernels():
    inputs = make(Case((9, 9), head_dim=12, rotary_dim=12))
    with pytest.raises(ValueError, match=r"^rerope: head_dim must"):
        inputs.run()
    inputs.run("reference")


# -------------------------------------------------------------------------------------------------
# The op itself: what a call of torch.ops may get wrong, too

WRONG = {
    "no regions": (dict(region_starts=[]), "region_starts must be of 1 to 3 regions, got 0"),
    "a map alone": (dict(map_kinds=[0]), "map_kinds must be of 5 maps"),
    "no kind": (dict(map_kinds=[9] * 5), "MapKind"),
    "k seqlen": (dict(k=NEW[:, :1], v=NEW[:, :1]), "k must have q's batch and seqlen"),
    "k alone": (dict(v=None), "k and v must be given together, got k alone"),
    "inv_freq": (dict(inv_freq=randn(DIM)), "inv_freq must"),
    "log_decay": (dict(log_decay=randn(3)), "log_decay "),
    "no room": (dict(cache_seqlens=ints(1, 11)), "2 new tokens included, got"),
}


def op_call(score=scores.rerope(4), **changes):  # noqa: B008
    call = make_call(methods.rope(DIM).to(device()), score, keys_stored=True)
    given = {
        "q": randn(2, 2, 4, DIM), "k_cache": randn(2, 12, 2, DIM),
        "v_cache": randn(2, 12, 2, DIM), "k": NEW, "v": NEW, "inv_freq": call.inv_freq,
        "cu_seqlens_q": None, "log_decay": None, "sinks": None, "query_scale": None,
        "pair_maps": None, "cache_seqlens": ints(3, 5), "block_table": None,
        "cache_leftpad": None, "k_scale": None, "v_scale": None, **call.options,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.parametrize("name", WRONG)
def test_the_op_refuses_before_it_writes(name, fast_backend):
    if not INTERPRETED and name == "no room":
        pytest.skip("values on a GPU are not looked at")
    changes, words = WRONG[name]
    given = op_call(**changes)
    before = {argument: given[argument].clone() for argument in ("k_cache", "v_cache")}
    op = torch.ops.extrope.decode_triton if fast_backend == "triton" else torch.ops.extrope.decode
    with pytest.raises((RuntimeError, ValueError)) as caught:
        op(**given)
    text = str(caught.value)
    assert text.startswith(("decode: ", "attention: ")) and words in text, text
    assert all(torch.equal(given[argument], x) for argument, x in before.items())


@pytest.mark.skipif(device() == "cuda", reason="of the CPU kernel")
def test_cpu_kernel_rotates_no_decayed_keys_on():
    """Their amplitudes would have to change with the query."""
    with pytest.raises(RuntimeError, match=r"decode: log_decay .* needs keys that are stored"):
        torch.ops.extrope.decode(**op_call(log_decay=randn(16), k=None, v=None))
