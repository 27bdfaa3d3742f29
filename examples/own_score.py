"""A score method of your own in thirty lines: distances that grow slower in two steps.

A score method is data: regions of keys, with a position map for queries and one for keys. The fused
kernels run it, forward and backward; plain PyTorch gives the same.

    python examples/own_score.py
"""

import torch
from torch import Tensor

from extrope_kernels import methods, rope_attention
from extrope_kernels.scores import FIRST_KEY, UNROTATED, PositionMap, Region, Score


def two_slopes(near: int, far: int, factor: float) -> Score:
    """Return a score: x = i - j below `near`, then `factor` times slower, constant past `far`."""
    same = PositionMap()
    offset = near - near / factor
    regions = (
        Region(FIRST_KEY, PositionMap(divisor=torch.inf, offset=offset + far / factor), UNROTATED),
        Region(1 - far, PositionMap(divisor=factor, offset=offset), PositionMap(divisor=factor)),
        Region(1 - near, same, same),
    )
    return Score("two_slopes", regions)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, freqs: methods.RopeFreqs, x: Tensor) -> Tensor:
    """Attend by relative positions x (seqlen, seqlen), rotating every pair of tokens."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    angle = x[..., None].double() * freqs.inv_freq.double()
    cos, sin = angle.cos().float(), angle.sin().float()  # (seqlen, seqlen, head_dim/2)
    (qa, qb), (ka, kb) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    together = torch.einsum("bihd,bjhd,ijd->bhij", qa, ka, cos)
    together += torch.einsum("bihd,bjhd,ijd->bhij", qb, kb, cos)
    across = torch.einsum("bihd,bjhd,ijd->bhij", qa, kb, sin)
    across -= torch.einsum("bihd,bjhd,ijd->bhij", qb, ka, sin)
    logits = (together + across) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.ones_like(x, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 96, 4, 32, requires_grad=True)
    k, v = torch.randn(1, 96, 2, 32), torch.randn(1, 96, 2, 32)
    freqs = methods.rope(32)
    near, far, factor = 16, 48, 4.0

    out = rope_attention(q, k, v, freqs, two_slopes(near, far, factor))
    (grad,) = torch.autograd.grad(out.square().sum(), q)

    i = torch.arange(96.0)
    x = i[:, None] - i
    slower = near + (x.clamp(max=far) - near) / factor
    expected = plain_attention(q, k, v, freqs, torch.where(x < near, x, slower))
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), q)
    print(f"largest difference of the outputs   {(out - expected).abs().max():.1e}")
    print(f"largest difference of q's gradients {(grad - expected_grad).abs().max():.1e}")


if __name__ == "__main__":
    main()
