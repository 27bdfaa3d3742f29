"""Layers that `kernels.kernelize` puts in place of a model's own."""

from __future__ import annotations

from torch import Tensor, nn

from ...ops.rope import apply_cos_sin


class RotaryPosEmb(nn.Module):
    """The layer `rotary_pos_emb` of Llama and its family in transformers: q and k in one pass.

    It computes in float32 and rounds once; the models' own function rounds every product.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rotate by the halves of every head.

        q, k: (batch, heads, seqlen, head_dim), or with unsqueeze_dim=2 heads after seqlen.
        cos, sin: (batch or 1, seqlen, rotary_dim), both halves alike.

        Returns: q and k, rotated; with gradients of q and k.
        """
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        if unsqueeze_dim == 2:
            return apply_cos_sin(q, k, cos, sin)
        q, k = apply_cos_sin(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)
