"""Every refusal: which argument, what was expected, what came, and nothing written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_oracle import SCORES, Case, make
from rope_oracle import INTERPRETED

from extrope_kernels import methods, rerope_attention_with_kvcache, scores
from extrope_kernels.testing import device

BATCH, LENGTH, DIM = 2, 9, 32


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device())


def randn(*shape, **options):
    return torch.randn(*shape, device=device(), **options)


def call(**changes):
    inputs = make(Case((LENGTH, LENGTH), 2, head_dim=DIM, rotary_dim=DIM))
    given = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache}
    given |= {"freqs": inputs.freqs, **inputs.parameters, **inputs.call, **changes}
    positional = [given.pop(name) for name in ("q", "k_cache", "v_cache", "freqs")]
    return rerope_attention_with_kvcache(*positional, **given)


NEW = randn(BATCH, 2, 2, DIM)
BAD = {
    "q list": (dict(q=[1.0]), TypeError, "q must be a Tensor, got list"),
    "q dims": (dict(q=randn(2, 4, DIM)), ValueError, "q must have 4 dimensions, got shape"),
    "q dtype": (dict(q=torch.ones(2, 2, 4, DIM).int()), ValueError, "q must be float32, bfloat16"),
    "q stride": (
        dict(q=randn(2, 2, DIM, 4).transpose(2, 3)),
        ValueError,
        "q must be contiguous in its last dimension",
    ),
    "q grad": (
        dict(q=randn(2, 2, 4, DIM).requires_grad_()),
        ValueError,
        "is for inference, got q that requires grad",
    ),
    "cache grad": (
        dict(v_cache=randn(2, 12, 2, DIM).requires_grad_()),
        ValueError,
        "got v_cache that requires grad",
    ),
    "cache dtype": (dict(k_cache=randn(2, 12, 2, DIM).half()), ValueError, "k_cache must be torch"),
    "cache batch": (dict(k_cache=randn(3, 12, 2, DIM), v_cache=randn(3, 12, 2, DIM)), ValueError,
                    "k_cache must be (2, max_len, heads_k, 32), got (3, 12, 2, 32)"),
    "cache head_dim": (dict(k_cache=randn(2, 12, 2, 16), v_cache=randn(2, 12, 2, 16)), ValueError,
                       "k_cache must be (2, max_len, heads_k, 32)"),
    "v_cache shape": (dict(v_cache=randn(2, 13, 2, DIM)), ValueError, "v_cache must have k_ca"),
    "heads": (dict(q=randn(2, 2, 3, DIM)), ValueError, "heads must divide q's 3 heads, got 2"),
    "head_dim 12": (dict(q=randn(2, 1, 4, 12), k_cache=randn(2, 12, 2, 12),
                         v_cache=randn(2, 12, 2, 12), freqs=methods.rope(12).to(device())),
                    ValueError, "head_dim must be a multiple of 8 up to"),
    "seqlens float": (dict(cache_seqlens=2.0), TypeError, "cache_seqlens must be an int or"),
    "seqlens bool": (dict(cache_seqlens=True), TypeError, "cache_seqlens must be an int or"),
    "seqlens int64": (dict(cache_seqlens=ints(3, 3, dtype=torch.int64)), ValueError,
                      "cache_seqlens must be int32 (2,)"),
    "seqlens shape": (dict(cache_seqlens=ints(3)), ValueError, "cache_seqlens must be int32 (2,)"),
    "leftpad shape": (dict(cache_leftpad=ints(3)), ValueError, "cache_leftpad must be int32 (2,)"),
    "leftpad list": (dict(cache_leftpad=[0, 0]), TypeError, "cache_leftpad must be a Tensor"),
    "table dims": (dict(block_table=ints(0, 1)), ValueError, "block_table must be int32 (2, max"),
    "page size": (dict(block_table=ints(0, 1)[:, None], k_cache=randn(3, 0, 2, DIM),
                       v_cache=randn(3, 0, 2, DIM)), ValueError, "must have a block_size >= 1"),
    "k alone": (dict(k=NEW), ValueError, "k and v must be given together, got k alone"),
    "v alone": (dict(v=NEW), ValueError, "k and v must be given together, got v alone"),
    "k seqlen": (dict(k=NEW[:, :1], v=NEW[:, :1]), ValueError, "k must have q's batch and seqlen"),
    "k heads": (dict(k=NEW[:, :, :1], v=NEW[:, :, :1]), ValueError,
                "k must have k_cache's heads and head_dim (2, 32)"),
    "v heads": (dict(k=NEW, v=NEW[:, :, :1]), ValueError,
                "v must have v_cache's heads and head_dim (2, 32)"),
    "v tokens": (dict(k=NEW, v=NEW[:, :1]), ValueError, "v must have k's tokens"),
    "k dtype": (dict(k=NEW.half(), v=NEW.half()), ValueError, "k must be torch.float32 on"),
    "expanded cache": (dict(k=NEW, v=NEW, cache_seqlens=1,
                            v_cache=randn(2, 1, 2, DIM).expand(2, 12, 2, DIM)), ValueError,
                       "v_cache must not be expanded to be written to"),
    "freqs": (dict(freqs=randn(16)), TypeError, "freqs must be a RopeFreqs, got Tensor"),
    "xpos": (dict(freqs=methods.xpos(DIM).to(device())), ValueError, "no log_decay (XPOS)"),
    "inv_freq": (dict(freqs=methods.rope(64).to(device())), ValueError, "inv_freq must hold 1 to"),
    "window 0": (dict(window=0), ValueError, "window must be >= 1, got 0"),
    "window float": (dict(window=4.0), TypeError, "window must be an int, got float"),
    "factor 0": (dict(factor=0.0), ValueError, "factor must be > 0 (inf for ReRoPE), got 0.0"),
    "grouped inf": (dict(grouped=True), ValueError, "grouped needs an integer factor, got inf"),
    "grouped window": (dict(grouped=True, factor=3.0), ValueError,
                       "grouped needs a window that is a multiple of factor 3, got 8"),
    "log_n": (dict(log_n=1.0), ValueError, "log_n must be None or a length > 1, got 1.0"),
    "scale": (dict(softmax_scale=0.0), ValueError, "softmax_scale must be None or a number > 0"),
    "backend": (dict(backend="fast"), ValueError, "backend must be None or one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    changes, error, words = BAD[name]
    with pytest.raises(error) as caught:
        call(**changes)
    message = str(caught.value)
    assert message.startswith("rerope_attention_with_kvcache") and words in message, message


# On a GPU nobody looks at the values of the integer tensors.
VALUES = {
    "too long": (
        dict(cache_seqlens=ints(9, 13)),
        "between 0 and the cache's 12 slots, got [9, 13]",
    ),
    "negative": (dict(cache_seqlens=ints(9, -1)), "between 0 and the cache's 12 slots"),
    "no room": (dict(cache_seqlens=11, k=NEW, v=NEW), "2 new tokens included, got [11, 11]"),
    "leftpad": (dict(cache_leftpad=ints(0, -2)), "cache_leftpad must be >= 0, got [0, -2]"),
    "page": (dict(block_table=ints(0, 2)[:, None]), "block_table must name pages between 0 and 1"),
}


@pytest.mark.skipif(device() == "cuda", reason="values on a GPU are not looked at")
@pytest.mark.parametrize("which", (None, "reference"))
@pytest.mark.parametrize("name", VALUES)
def test_values(name, which):
    changes, words = VALUES[name]
    with pytest.raises(ValueError) as caught:
        call(**changes, backend=which)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    (dict(window=0), dict(softmax_scale=-1.0), dict(q=randn(2, 2, 3, DIM)), dict(log_n=0.5)),
)
def test_nothing_is_written_when_something_is_wrong(changes):
    caches = {name: randn(2, 12, 2, DIM) for name in ("k_cache", "v_cache")}
    before = {name: x.clone() for name, x in caches.items()}
    with pytest.raises(ValueError):
        call(**caches, k=NEW, v=NEW, cache_seqlens=3, **changes)
    assert all(torch.equal(x, before[name]) for name, x in caches.items())


@pytest.mark.parametrize("score", SCORES)
def test_every_function_refuses_in_its_own_name(score):
    inputs = make(Case(**SCORES[score]))
    name = f"{inputs.attention}_with_kvcache"
    wrong = {"cache_seqlens": ints(37, 1000)}
    with pytest.raises(ValueError, match=f"^{name}: cache_seqlens must be between 0 and"):
        replace(inputs, call={**inputs.call, **wrong}).run()
    with pytest.raises(TypeError, match=f"^{name}: q must be a Tensor"):
        replace(inputs, q=[1.0]).run()
    some = next(iter(inputs.parameters))
    with pytest.raises(TypeError, match=f"^{name}: {some} must be an int"):
        replace(inputs, parameters={**inputs.parameters, some: 2.5}).run()


# The ops themselves, with two new tokens: what came wrong, and a part of the answer.
OPS = {
    "starts": (dict(starts=[3, 1]), "starts must be 1 to 3 rising numbers"),
    "no starts": (dict(starts=[], maps=[0.0] * 5), "starts must be 1 to 3 rising numbers"),
    "granularity": (dict(granularity=0), "granularity must be >= 1, got 0"),
    "maps": (dict(maps=[1.0] * 24), "maps must be 25 numbers for 2 regions, got 24"),
    "softmax_scale": (dict(softmax_scale=float("inf")), "softmax_scale must be None or a number"),
    "log_n": (dict(log_n=1.0), "log_n must be None or a length > 1, got 1"),
    "attention_factor": (dict(attention_factor=0.0), "attention_factor must be > 0, got 0"),
    "q": (dict(q=randn(2, 4, DIM)), "q must have 4 dimensions, got shape"),
    "head_dim": (dict(q=randn(2, 2, 4, 12), k_cache=randn(2, 12, 2, 12),
                      v_cache=randn(2, 12, 2, 12), k=NEW[..., :12], v=NEW[..., :12],
                      inv_freq=randn(6)), "head_dim must be a multiple of 8 up to"),
    "k_cache": (dict(k_cache=randn(2, 12, 2, 16)), "k_cache"),
    "v_cache": (dict(v_cache=randn(2, 12, 1, DIM)), "v_cache must have k_cache's shape"),
    "expanded": (dict(v_cache=randn(2, 1, 2, DIM).expand(2, 12, 2, DIM)), "must not be expanded"),
    "k dtype": (dict(k=NEW.half()), "k must be"),
    "k seqlen": (dict(k=NEW[:, :1], v=NEW[:, :1]), "k must have q's batch and seqlen"),
    "k alone": (dict(v=None), "k and v must be given together, got k alone"),
    "heads": (dict(q=randn(2, 2, 3, DIM)), "k_cache's heads must divide q's 3 heads, got 2"),
    "inv_freq": (dict(inv_freq=randn(DIM)), "inv_freq must"),
    "log_decay": (dict(log_decay=randn(3)), "log_decay must be"),
    "seqlens": (dict(cache_seqlens=ints(1)), "cache_seqlens must be int32 (2"),
    "no room": (dict(cache_seqlens=ints(1, 11)), "2 new tokens included, got"),
    "leftpad": (dict(cache_leftpad=ints(0, -1)), "cache_leftpad must be >= 0, got"),
    "table": (dict(block_table=ints(0, 1)), "block_table must be int32 (2, max_blocks)"),
    "page": (dict(block_table=ints(0, 2)[:, None]), "block_table must name pages between 0 and 1"),
}  # fmt: skip
VALUES_ALONE = ("no room", "leftpad", "page")


@pytest.mark.parametrize("name", OPS)
def test_the_op_refuses_before_it_writes(name, backend):
    if not INTERPRETED and name in VALUES_ALONE:
        pytest.skip("values on a GPU are not looked at")
    changes, words = OPS[name]
    score = scores.rerope(4)
    tensors = {
        "q": randn(2, 2, 4, DIM), "k_cache": randn(2, 12, 2, DIM),
        "v_cache": randn(2, 12, 2, DIM), "k": NEW, "v": NEW, "inv_freq": randn(DIM // 2),
        "cache_seqlens": ints(3, 5), "block_table": None, "cache_leftpad": None, "log_decay": None,
    }  # fmt: skip
    options = {"starts": score.starts, "granularity": 1, "maps": score.stored_maps}
    for argument, value in changes.items():
        (tensors if argument in tensors else options)[argument] = value
    before = {argument: tensors[argument].clone() for argument in ("k_cache", "v_cache")}
    op = torch.ops.extrope.decode_triton if backend == "triton" else torch.ops.extrope.decode
    with pytest.raises((RuntimeError, ValueError)) as caught:
        op(*tensors.values(), **options)
    assert str(caught.value).startswith("decode: ") and words in str(caught.value)
    assert all(torch.equal(tensors[argument], x) for argument, x in before.items())


def test_append_takes_the_numbers_of_a_map():
    caches = randn(2, 12, 2, DIM), randn(2, 12, 2, DIM)
    with pytest.raises((RuntimeError, ValueError), match="append: stored must be 5 numbers, got 4"):
        torch.ops.extrope.append(*caches, NEW, NEW, randn(16), ints(3, 5), stored=[0.0] * 4)


@pytest.mark.skipif(device() == "cuda", reason="of the CPU kernel")
def test_cpu_kernel_rotates_no_decayed_keys_on():
    """Their amplitudes would have to change with the query."""
    score, caches = scores.rerope(4), (randn(2, 12, 2, DIM), randn(2, 12, 2, DIM))
    tensors = (randn(2, 2, 4, DIM), *caches, None, None, randn(16), ints(3, 5), None, None)
    with pytest.raises(RuntimeError, match=r"decode: log_decay .* needs keys that are stored"):
        torch.ops.extrope.decode(
            *tensors, randn(16), starts=score.starts, granularity=1, maps=score.stored_maps
        )
