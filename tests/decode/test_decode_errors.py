"""Every refusal: which argument, what was expected, what came, and nothing written."""

from __future__ import annotations

import pytest
import torch
from decode_oracle import Case, make

from extrope_kernels import methods
from extrope_kernels.ops.attention.kvcache import rerope_attention_with_kvcache
from extrope_kernels.testing import device

BATCH, LENGTH, DIM = 2, 9, 32


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device())


def randn(*shape, **options):
    return torch.randn(*shape, device=device(), **options)


def call(**changes):
    inputs = make(Case((LENGTH, LENGTH), 2, head_dim=DIM, rotary_dim=DIM))
    given = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache}
    given |= {"freqs": inputs.freqs, **inputs.call, **changes}
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
                    ValueError, "head_dim must be a multiple of 8 up to 256"),
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
    "k heads": (dict(k=NEW[:, :, :1], v=NEW[:, :, :1]), ValueError, "k must have k_cache's 2"),
    "v shape": (dict(k=NEW, v=NEW[:, :, :1]), ValueError, "v must have k's shape"),
    "k dtype": (dict(k=NEW.half(), v=NEW.half()), ValueError, "must be torch.float16 on"),
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
    "grouped window": (dict(grouped=True, factor=3.0), ValueError, "grouped needs a window"),
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
