"""The permutation against copying, torch.gather and indexing: python bench/bench_permute.py

q (1, 8192, 32, 128) and k with 8 heads, 8 permutations. The floor is copy_ of q and k between
existing buffers; clone, like the permutation, writes into fresh memory. The peers are what PyTorch
offers with a table of powers made beforehand, once for q and once for k: 8 KiB of int64 dims a
token, 64 MiB for these 8192; ours needs none.
"""

from __future__ import annotations

import functools

import torch
from bench_rope import backends
from compare import Floor, compare, error_of_tail
from harness import Call, Report, arguments, device
from scaling import scaling
from shapes import HEAD_DIM, HEADS_K, SEQLEN
from shapes import HEADS_Q as HEADS
from torch import Tensor

from extrope_kernels import head_permutations, permute_qk


def make_inputs(dtype: torch.dtype, seqlen: int) -> tuple[Tensor, Tensor]:
    shapes = [(1, seqlen, heads, HEAD_DIM) for heads in (HEADS, HEADS_K)]
    q, k = (torch.randn(shape, device=device()).to(dtype) for shape in shapes)
    return q, k


def permutations() -> Tensor:
    return head_permutations(HEADS_K, HEAD_DIM).to(device())


def power_table(seqlen: int) -> Tensor:
    """(seqlen, heads_k, head_dim): the dims c -> pi^p(c), as the authors' code keeps them."""
    step = permutations()
    powers = [torch.arange(HEAD_DIM, device=device()).expand_as(step)]
    for _ in range(seqlen - 1):
        powers.append(powers[-1].gather(-1, step))
    return torch.stack(powers)


def peers(q: Tensor, k: Tensor) -> dict[str, Call]:
    table = power_table(q.shape[1])[None]
    group = HEADS // HEADS_K  # q heads that share a k head's dims
    wide = table[:, :, :, None].expand(*table.shape[:3], group, HEAD_DIM)
    dims_q = wide.flatten(2, 3).expand(q.shape)
    return {
        "torch.gather": lambda: (q.gather(-1, dims_q), k.gather(-1, table)),
        "advanced indexing": lambda: (indexed(q, dims_q), indexed(k, table)),
    }


def indexed(x: Tensor, dims: Tensor) -> Tensor:
    seq = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    head = torch.arange(x.shape[2], device=x.device)[None, None, :, None]
    return x[0, seq, head, dims]


@torch.no_grad()
def bench(report: Report, dtype: torch.dtype, backend: str) -> None:
    seqlen = 128 if report.args.quick else SEQLEN
    q, k = make_inputs(dtype, seqlen)
    few = make_inputs(dtype, 1)
    into = torch.empty_like(q), torch.empty_like(k)
    anywhere = torch.randint(0, 10**6, (seqlen,), device=device())
    for case, how, others in (
        ("forward", {}, peers(q, k)),
        ("forward, positions below 1e6", {"positions": anywhere}, {}),
        ("backward", {"inverse": True}, {}),
    ):
        if not report.wants(f"{case} {str(dtype)[6:]}"):
            continue
        permute = functools.partial(permute_qk, permutations=permutations(), **how)
        ours = functools.partial(permute, backend=backends()[backend])
        small = functools.partial(ours, *few, **({"positions": 4096} if "positions" in how else {}))
        exact = permute(q.double(), k.double(), backend="reference")
        compare(
            report,
            case,
            {"extrope": functools.partial(ours, q, k), **others},
            yardsticks={"clone": lambda: (q.clone(), k.clone())},
            few={"extrope": small},
            error=error_of_tail([x[:, -64:] for x in exact]),
            dtype=dtype,
            shape=f"{seqlen} x {HEADS}/{HEADS_K} x {HEAD_DIM}",
            backend=backend,
            floor=Floor(lambda: (into[0].copy_(q), into[1].copy_(k))),
        )


def by_length(seqlen: int) -> Call:
    q, k = make_inputs(torch.bfloat16, seqlen)
    return functools.partial(permute_qk, q, k, permutations())


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("permute", args)
    for backend in backends():
        for dtype in (torch.float32, torch.bfloat16):
            bench(report, dtype, backend)
    report.save()
    scaling("permute", by_length, args, about="bfloat16, 32 heads on 8, head_dim 128")


if __name__ == "__main__":
    main()
