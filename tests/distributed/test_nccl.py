"""Attention over two GPUs under NCCL against one; test_distributed_attention has it over gloo."""

from __future__ import annotations

import pytest
import torch
from support.ranks import Ranks
from test_distributed_attention import STRATEGIES, within_the_budget


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_gpus_agree_with_one(dtype):
    gpus, cases = Ranks(gpus=2), [(strategy, None, "zigzag") for strategy in STRATEGIES]
    try:
        gpus.run(within_the_budget, 2, dtype=dtype, cases=cases, seqlen=2048, device="cuda")
    finally:
        gpus.stop()
