"""How far attention may be off when every operand is rounded once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from support.rope_oracle import INTERPRETED
from torch import Tensor


def is_counted(backend: str) -> bool:
    """Whether a backend rounds more than the references do.

    Compiled by Triton, q is scaled before it is rounded (the interpreter's operands are float32);
    without fused multiply-adds, a product is rounded before it is added.
    """
    if backend == "triton":
        return not INTERPRETED
    return backend == "cpu" and os.environ.get("EXTROPE_CPU_CAPABILITY") == "baseline"


def norm(x: Tensor) -> float:
    return x.double().norm(dim=-1).max().item() if x.numel() else 0.0


@dataclass(frozen=True)
class Rounding:
    """How far logits and weights may be off when every operand is rounded once.

    A rounding of q and of k moves a logit by eps / 2 of |q| |k| each, a sum in float32 by half an
    eps of that for every term; a weight's relative error is twice that of the logits.
    """

    q: Tensor
    k: Tensor
    logit_scale: float

    @property
    def logit(self) -> float:
        eps, inside = torch.finfo(self.q.dtype).eps, torch.finfo(torch.float32).eps
        largest = norm(self.q) * norm(self.k) * self.logit_scale
        return (eps + (1 + self.q.shape[-1] / 2) * inside) * largest

    def weight(self, keys: int) -> float:
        eps, inside = torch.finfo(self.q.dtype).eps, torch.finfo(torch.float32).eps
        return 2 * self.logit + eps + keys / 2 * inside


def noise_of_lse(rows: list[Tensor], out: Tensor, lse: Tensor, dout: Tensor) -> list[float]:
    """How far the gradients of rows are off where a backward in float32 has weights by lse.

    They are exp2(logit - lse). Of lse, the saved number, log2(e) and their product are rounded, by
    half an eps of lse each, alike for all weights of a query. So is the query's share in a
    gradient, and these add up. The reference keeps the weights themselves.

    out, lse: of the reference, in float64, with the graph that leads to rows.
    """
    relative = 1.5 * torch.finfo(torch.float32).eps * lse.abs().max()
    each = torch.eye(lse.numel(), dtype=out.dtype, device=out.device)
    each = each.view(-1, *out.shape[:-1], 1) * dout
    shares = torch.autograd.grad(out, rows, each, is_grads_batched=True, retain_graph=True)
    return [(relative * x.abs().sum(0).max()).item() for x in shares]


def of_cache(case, inputs, k: Tensor, v: Tensor) -> tuple[float, float]:
    """Of out and lse of a case of decode_oracle; k, v: the cache in float64."""
    gain = max(1.0, math.log(max(case.lengths) + 1) / math.log(case.log_n)) if case.log_n else 1.0
    if case.query_scale and inputs.q.numel():
        gain *= inputs.call["query_scale"].max().item()
    if case.xpos:  # within a block and its predecessor
        decay = inputs.freqs.log_decay.abs().max()
        gain *= torch.exp(2 * case.example.parameters["block_size"] * decay).item()
    scale = (case.softmax_scale or case.head_dim**-0.5) * gain * max(case.attention_factor, 1) ** 2
    error = Rounding(inputs.q, k.nan_to_num(), scale)
    return error.weight(max(case.lengths)) * norm(v.nan_to_num()), error.logit
