"""A causal transformer over bytes in the plainest PyTorch; how it attends is the caller's to say.

`attend` is a function from q, k and v, each (batch, seqlen, heads, head_dim) and not rotated, to
what comes out of the heads, of the same shape. Positions enter nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
VOCABULARY = 256  # bytes


class Attention(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, D) each
        return self.out(attend(q, k, v).flatten(2))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(d_model)
        self.attention = Attention(d_model, heads)
        self.norm_2 = nn.RMSNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model, bias=False),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model, bias=False),
        )

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.norm_1(x), attend)
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    def __init__(self, d_model: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(d_model)
        self.apply(self._initialise)
        for block in self.blocks:  # the residual stream keeps its size however deep the model
            for last in (block.attention.out, block.mlp[-1]):
                nn.init.normal_(last.weight, std=0.02 / (2 * layers) ** 0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        x = self.embed(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x, attend)
        return F.linear(self.norm(x), self.embed.weight)  # (B, T, 256): the embedding is shared


def loss_of(model: Transformer, tokens: Tensor, attend: Attend) -> Tensor:
    """Nats for each byte but the first of tokens (batch, seqlen + 1): (batch, seqlen)."""
    logits = model(tokens[:, :-1], attend)
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def optimizer_of(model: Transformer, lr: float) -> torch.optim.Optimizer:
    """AdamW, whose weight decay spares the gains of the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
