"""XPOS's amplitude at far positions: refused where it overflows, not where it stays within."""

import pytest
import torch

from extrope_kernels import (
    blockwise_causal_attention,
    dual_chunk_attention,
    rerope_attention,
    string_attention,
)
from extrope_kernels.methods import xpos
from extrope_kernels.testing import device

TOKENS = 4
F16, F32 = torch.float16, torch.float32


def attend(attention, dtype, **options):
    x = torch.full((1, TOKENS, 1, 8), 0.5, dtype=dtype, device=device())
    if "cu_seqlens" in options:
        x = x[0]
    return attention(x, x, x, xpos(8).to(device()), **options)


@pytest.mark.parametrize(
    "dtype, last, attention, parameters",
    [
        (F16, 4532, rerope_attention, {"window": 2}),
        (F32, 36_260, rerope_attention, {"window": 9, "factor": 1.0}),
        (F16, 4532, rerope_attention, {"window": 9, "factor": 3.0, "grouped": True}),
        # Keys past a window of one are at twice their position, at most 2 * 2266.
        (F16, 2267, rerope_attention, {"window": 1, "factor": 0.5}),
        (F16, 4532, string_attention, {"shift": 3, "window": 1}),
        (F16, 4532, dual_chunk_attention, {"chunk_size": 9000, "local_window": 0}),
        (F16, 4532, blockwise_causal_attention, {"block_size": 20_000}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_position_within_the_range(dtype, last, attention, parameters, packed):
    if packed:
        parameters = {**parameters, "cu_seqlens": torch.tensor([0, TOKENS], device=device())}
        if device() == "cuda":
            pytest.skip("boundaries on the device are not read back")
    start = last + 1 - TOKENS
    assert attend(attention, dtype, k_start=start, **parameters).isfinite().all()
    message = f"^{attention.__name__}: XPOS.* {dtype} .* 0, got keys at up to .*block_size of at m"
    with pytest.raises(ValueError, match=message):
        attend(attention, dtype, k_start=start + 1, **parameters)


def test_positions_that_start_anew_are_never_far():
    for attention, parameters in (
        (blockwise_causal_attention, {"block_size": 8}),
        (dual_chunk_attention, {"chunk_size": 5, "local_window": 2}),
    ):
        far = attend(attention, F16, k_start=1_200_000, **parameters)
        torch.testing.assert_close(far, attend(attention, F16, **parameters))


def test_a_region_without_keys_does_not_count():
    """Queries far behind their keys see them unrotated; queries before their keys see none."""
    starts = {"q_start": 200_000, "k_start": 100_000}
    out = attend(rerope_attention, F32, window=8, **starts)
    assert out.isfinite().all() and out.any()
    out = attend(rerope_attention, F32, window=8, q_start=0, k_start=100_000)
    assert not out.any()
