"""The step of `make gpu` for two GPUs, as far as two processes on a CPU can tell."""

from __future__ import annotations

import pytest
import torch
from gpu import two

from extrope_kernels import distributed

SHAPE = {"seqlen": 64, "heads_q": 4, "heads_k": 2, "head_dim": 16}


def finds_nothing_wrong(mesh, strategy):
    for dtype in (torch.float32, torch.bfloat16):
        assert two.problems(mesh, strategy, dtype, "cpu", **SHAPE) == ""


@pytest.mark.parametrize("strategy", two.STRATEGIES)
def test_nothing_is_wrong_with_the_cpu(ranks, strategy):
    ranks.run(finds_nothing_wrong, 2, strategy=strategy)


def finds_what_is_wrong(mesh):
    right = distributed.rope_attention
    distributed.rope_attention = lambda *args, **options: right(*args, **options) * 1.01
    try:
        line = two.problems(mesh, "ring", torch.float32, "cpu", **SHAPE)
    finally:
        distributed.rope_attention = right
    assert line.startswith("ring torch.float32: out")


def test_what_is_wrong_is_told(ranks):
    ranks.run(finds_what_is_wrong, 2)
