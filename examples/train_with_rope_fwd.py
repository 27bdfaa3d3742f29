"""A training loop around `torch.ops.extrope.rope_fwd`, the rotation as an op.

One attention layer learns to repeat the token five places back, which only relative positions show.
The op has its gradient, and `torch.compile` takes the graph whole (pass --compile, which needs a
C++ compiler).

    python examples/train_with_rope_fwd.py [--compile]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extrope_kernels import methods

VOCABULARY, BACK, SEQLEN, STEPS = 16, 5, 64, 100
HEADS, HEAD_DIM = 4, 32


class Attention(nn.Module):
    """Causal attention over rotated queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM, bias=False)
        self.register_buffer("inv_freq", methods.rope(HEAD_DIM).inv_freq)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        q, k = torch.ops.extrope.rope_fwd(q, k, self.inv_freq)  # (batch, seqlen, heads, head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HEADS * HEAD_DIM)
        self.attention = Attention()
        self.head = nn.Linear(HEADS * HEAD_DIM, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.attention(x))


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    step = torch.compile(model, fullgraph=True) if "--compile" in sys.argv[1:] else model
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for n in range(STEPS + 1):
        ids = torch.randint(VOCABULARY, (16, SEQLEN))
        logits = step(ids)[:, BACK:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if n % 20 == 0:
            print(f"step {n:3}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
