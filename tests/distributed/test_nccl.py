"""Attention over two GPUs under NCCL against one; the comparison itself is tried over gloo."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks

from extrope_kernels import distributed, methods, rope_attention, scores
from extrope_kernels.testing import assert_within_budget

STRATEGIES = ("gather", "ring", "ulysses")
SMALL = {"seqlen": 64, "heads_q": 4, "heads_k": 2, "head_dim": 16, "device": "cpu"}
LARGE = {"seqlen": 2048, "heads_q": 8, "heads_k": 2, "head_dim": 64, "device": "cuda"}


def outcome(attention, leaves, dout, *args, **options) -> tuple[torch.Tensor, ...]:
    """Return out, and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = attention(*leaves, *args, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def agrees(mesh, strategy, seqlen, heads_q, heads_k, head_dim, device):
    """Raise if a strategy's error exceeds the budget; q, k, v and dout are the same everywhere."""
    generator, heads = torch.Generator().manual_seed(0), (heads_q, heads_k, heads_k, heads_q)
    made = [torch.randn(1, seqlen, n, head_dim, generator=generator) for n in heads]
    call = methods.rope(head_dim).to(device), scores.rerope(seqlen // 4)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(device, dtype) for x in made]
        exactly = [x.double() for x in inputs]
        exact = outcome(rope_attention, exactly[:3], exactly[3], *call, backend="reference")
        same = outcome(rope_attention, inputs[:3], inputs[3], *call)
        mine = [distributed.shard(x, mesh) for x in inputs]
        options = {"mesh": mesh, "strategy": strategy}
        found = outcome(distributed.rope_attention, mine[:3], mine[3], *call, **options)
        for name, *values in zip(("out", "dq", "dk", "dv"), found, same, exact, strict=True):
            assert_within_budget(name, distributed.unshard(values[0], mesh), *values[1:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_gpus_agree_with_one(strategy):
    gpus = Ranks(gpus=2)
    try:
        gpus.run(agrees, 2, strategy=strategy, **LARGE)
    finally:
        gpus.stop()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_agree_with_one(ranks, strategy):
    ranks.run(agrees, 2, strategy=strategy, **SMALL)


def finds_what_is_wrong(mesh):
    right = distributed.rope_attention
    distributed.rope_attention = lambda *args, **options: right(*args, **options) * 1.01
    try:
        with pytest.raises(AssertionError, match=r"^out: error"):
            agrees(mesh, "ring", **SMALL)
    finally:
        distributed.rope_attention = right


def test_what_is_wrong_is_told(ranks):
    ranks.run(finds_what_is_wrong, 2)
