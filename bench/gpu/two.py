"""Attention over two GPUs under NCCL, compared with one of them: results and times.

Two processes have a GPU each. A machine with one GPU has nothing to run here.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from extrope_kernels import RopeFreqs, distributed, methods, rope_attention, scores
from extrope_kernels.testing import assert_within_budget

from .step import Deadline, Verdict

STRATEGIES = ("gather", "ring", "ulysses")
GPUS = 2
NAMES = ("out", "dq", "dk", "dv")
CHECKED = {"seqlen": 2048, "heads_q": 8, "heads_k": 2, "head_dim": 64}
TIMED = {"seqlen": 65536, "heads_q": 32, "heads_k": 8, "head_dim": 128}


def inputs(
    seqlen: int, heads_q: int, heads_k: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor, RopeFreqs]:
    """Make q, k, v and the gradient of out, the same on every rank, and frequencies."""
    generator = torch.Generator().manual_seed(0)
    heads = (heads_q, heads_k, heads_k, heads_q)
    made = [torch.randn(1, seqlen, h, head_dim, generator=generator) for h in heads]
    *leaves, dout = (x.to(dtype).to(device) for x in made)
    return leaves, dout, methods.rope(head_dim).to(device)


def outcome(attention: Any, leaves: list[Tensor], dout: Tensor, *args: Any, **options: Any):
    """Return out, and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = attention(*leaves, *args, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def problems(mesh: DeviceMesh, strategy: str, dtype: torch.dtype, device: str, **shape: int) -> str:
    """Return a line if a strategy's error exceeds one device's; else ""."""
    leaves, dout, freqs = inputs(**shape, dtype=dtype, device=device)
    score = scores.rerope(shape["seqlen"] // 4)
    same = outcome(rope_attention, leaves, dout, freqs, score)
    exactly = [x.double() for x in (*leaves, dout)]
    exact = outcome(rope_attention, exactly[:3], exactly[3], freqs, score, backend="reference")
    mine = [distributed.shard(x, mesh) for x in (*leaves, dout)]
    options = {"mesh": mesh, "strategy": strategy}
    found = outcome(distributed.rope_attention, mine[:3], mine[3], freqs, score, **options)
    for name, *values in zip(NAMES, found, same, exact):
        try:
            assert_within_budget(name, distributed.unshard(values[0], mesh), *values[1:])
        except AssertionError as error:
            return f"{strategy} {dtype}: {error}".splitlines()[0]
    return ""


def seconds(
    attention: Any, leaves: list[Tensor], dout: Tensor, *args: Any, **options: Any
) -> float:
    """Time forward with backward, the best of three."""
    best = float("inf")
    for _ in range(4):  # the first compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        outcome(attention, leaves, dout, *args, **options)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def timings(mesh: DeviceMesh) -> dict[str, float]:
    """Time forward with backward in ms: on one GPU, and by each strategy on all."""
    leaves, dout, freqs = inputs(**TIMED, dtype=torch.bfloat16, device="cuda")
    score = scores.rerope(TIMED["seqlen"] // 4)
    found = {"one GPU": seconds(rope_attention, leaves, dout, freqs, score)}
    *mine, dout = (distributed.shard(x, mesh) for x in (*leaves, dout))
    for strategy in STRATEGIES:
        options = {"mesh": mesh, "strategy": strategy}
        found[strategy] = seconds(distributed.rope_attention, mine, dout, freqs, score, **options)
    return {name: 1e3 * value for name, value in found.items()}


def on_each(mesh: DeviceMesh) -> tuple[list[str], dict[str, float]]:
    """Return what is wrong on this rank, and the times."""
    found = [
        problems(mesh, strategy, dtype, "cuda", **CHECKED)
        for strategy in STRATEGIES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return [line for line in found if line], timings(mesh)


def run(deadline: Deadline) -> Verdict:
    count = torch.cuda.device_count()
    if count < GPUS:
        return Verdict(True, f"nothing was run: it takes {GPUS} GPUs, here is {count}")
    ranks = Ranks(seconds=deadline.left, gpus=GPUS)
    try:
        found = ranks.run(on_each, GPUS)
    except Exception as error:  # a first run under NCCL may raise anything
        said = str(error).strip() or "a rank ended without an answer"
        print(said, flush=True)
        return Verdict(False, said.splitlines()[-1])
    finally:
        ranks.stop()
    wrong = [f"GPU {number}: {line}" for number, (lines, _) in enumerate(found) for line in lines]
    rows = [[name, f"{value:.1f}"] for name, value in found[0][1].items()]
    table = {"head": ["65,536 tokens, 32 heads and 8 of 128", "ms"], "rows": rows}
    line = "; ".join(wrong) or f"{len(STRATEGIES)} strategies agree with one GPU"
    return Verdict(not wrong, line, {"table": table})
