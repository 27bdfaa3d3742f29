"""XPOS's amplitude at far positions: refused where it overflows, not where it stays within."""

import pytest
import torch

from extrope_kernels import rope_attention, scores
from extrope_kernels.methods import xpos
from extrope_kernels.testing import device

TOKENS = 4
F16, F32 = torch.float16, torch.float32


def attend(score, dtype, **options):
    x = torch.full((1, TOKENS, 1, 8), 0.5, dtype=dtype, device=device())
    if "cu_seqlens" in options:
        x = x[0]
    return rope_attention(x, x, x, xpos(8).to(device()), score, **options)


@pytest.mark.parametrize(
    "dtype, last, score",
    [
        (F16, 4532, None),
        (F16, 4532, scores.rerope(2)),
        (F32, 36_260, scores.leaky_rerope(9, 1.0)),
        (F16, 4532, scores.self_extend(9, 3)),
        # Keys past a window of one are at twice their position, at most 2 * 2266.
        (F16, 2267, scores.leaky_rerope(1, 0.5)),
        (F16, 4532, scores.string(3, 1)),
        (F16, 4532, scores.dual_chunk(9000, 0)),
        (F16, 4532, scores.blockwise_causal(20_000)),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_position_within_the_range(dtype, last, score, packed):
    options = {}
    if packed:
        options = {"cu_seqlens": torch.tensor([0, TOKENS], device=device())}
        if device() == "cuda":
            pytest.skip("boundaries on the device are not read back")
    start = last + 1 - TOKENS
    assert attend(score, dtype, k_start=start, **options).isfinite().all()
    name = "rope_attention" if score is None else score.name
    message = f"^{name}: keys must be .* of 0 for XPOS in {dtype}, got one .*block_size of at m"
    with pytest.raises(ValueError, match=message):
        attend(score, dtype, k_start=start + 1, **options)


@pytest.mark.parametrize("score", [scores.blockwise_causal(8), scores.dual_chunk(5, 2)], ids=str)
def test_positions_that_start_anew_are_never_far(score):
    far = attend(score, F16, k_start=1_200_000)
    torch.testing.assert_close(far, attend(score, F16))


def test_a_region_without_keys_does_not_count():
    """Queries far behind their keys see them unrotated; queries before their keys see none."""
    out = attend(scores.rerope(8), F32, q_start=200_000, k_start=100_000)
    assert out.isfinite().all() and out.any()
    assert not attend(scores.rerope(8), F32, q_start=0, k_start=100_000).any()
