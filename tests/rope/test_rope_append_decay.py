"""Keys that XPOS takes out of their dtype's range are not written into a cache."""

import pytest
import torch

from extrope_kernels import (
    blockwise_causal_attention_with_kvcache,
    rope_append_kvcache,
    scores,
)
from extrope_kernels.methods import xpos
from extrope_kernels.testing import device

REACH = 4532  # of float16
TOKENS = 4


def append(last: int, freqs=None, **options):
    """Of tokens whose last one is at position `last`."""
    x = torch.full((1, TOKENS, 1, 8), 0.5, dtype=torch.float16, device=device())
    cache = torch.zeros(1, last + 3, 1, 8, dtype=x.dtype, device=x.device)
    options.setdefault("cache_seqlens", last + 1 - TOKENS)
    rope_append_kvcache(None, x, x, cache, cache.clone(), freqs or xpos(8).to(device()), **options)
    return cache


def attend(last: int, block_size: int):
    x = torch.full((1, TOKENS, 1, 8), 0.5, dtype=torch.float16, device=device())
    cache = torch.zeros(1, last + 3, 1, 8, dtype=x.dtype, device=x.device)
    return blockwise_causal_attention_with_kvcache(
        x, cache, cache.clone(), xpos(8).to(device()), cache_seqlens=last + 1 - TOKENS, k=x, v=x,
        block_size=block_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    "write",
    [
        append,
        lambda last: append(last, score=scores.blockwise_causal(20_000)),
        lambda last: append(last, positions=torch.arange(last + 1 - TOKENS, last + 1)),
        lambda last: append(
            last + 2, cache_leftpad=torch.tensor([2], dtype=torch.int32), cache_seqlens=last - 1
        ),
        lambda last: attend(last, 20_000),
    ],
)
def test_the_last_position_within_the_range(write):
    if device() == "cuda":
        pytest.skip("lengths on the device are not read back")
    assert write(REACH).isfinite().all()
    with pytest.raises(ValueError, match=rf"XPOS.*float16 {REACH} positions.* to {REACH + 1}$"):
        write(REACH + 1)


def test_an_origin_and_blocks_keep_them_near():
    far = append(2 * REACH, xpos(8, decay_origin=REACH).to(device()))
    assert far.isfinite().all() and far.any()
    assert append(2 * REACH, score=scores.blockwise_causal(64)).isfinite().all()
    assert attend(2 * REACH, 64).isfinite().all()
