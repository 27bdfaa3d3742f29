"""What follows the lengths of requests, worked out once a forward without a look at the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...scores.query_scale import qwen_1m
from .engine import Engine


class Lengths:
    """Tensors that layers hand to the op, in buffers for good: a graph reads them at every replay.

    past: (requests,) int32, how many tokens of each were there before.
    cu_seqlens: (requests + 1,) int32, the boundaries of each request's new tokens.
    query_scale: (tokens,) float32, factors of each query's logits; None where nothing asks for one.
    """

    def __init__(self, engine: Engine | None, requests: int, tokens: int, device: object) -> None:
        self.engine = engine
        self.past = torch.zeros(requests, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self.query_scale: Tensor | None = None
        if engine is not None and engine.settings.scale_from is not None:
            self.query_scale = torch.ones(tokens, device=device)

    def update(self, starts: Tensor, seq_lens: Tensor, tokens: int) -> None:
        """Read the batch of a forward: boundaries, lengths with the new tokens, how many tokens."""
        requests = len(seq_lens)
        if requests > len(self.past):
            self.past = self.past.new_zeros(requests)
            self.cu_seqlens = self.cu_seqlens.new_zeros(requests + 1)
        torch.sub(seq_lens, starts.diff(), out=self.past[:requests])
        if self.query_scale is None:
            return
        if tokens > len(self.query_scale):
            self.query_scale = self.query_scale.new_ones(tokens)
        token = torch.arange(len(self.query_scale), dtype=starts.dtype, device=starts.device)
        # Tokens behind the last request's are padding, whoever they are taken for.
        request = torch.searchsorted(starts[1:], token, right=True).clamp_(max=requests - 1)
        positions = token + (self.past[:requests] - starts[:-1])[request]
        self.query_scale.copy_(qwen_1m(positions, self.engine.settings.scale_from))
