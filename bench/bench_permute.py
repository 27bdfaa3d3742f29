"""The permutation against copying, torch.gather and indexing: python bench/bench_permute.py

q (1, 8192, 32, 128) and k with 8 heads, 8 permutations. Every ratio is of medians measured in turn
in one run. "% copy" is the bandwidth of the permutation (q and k read once and written once) over
that of copy_ between existing buffers; the yardstick is clone, which like the permutation writes
into fresh memory. The peers are what PyTorch offers with a table of powers made beforehand:
torch.gather along the lanes and advanced indexing, once for q and once for k. Their table of int64
lanes takes 8 KiB a token, 64 MiB for these 8192; ours needs none.
"""

from __future__ import annotations

import argparse

import torch
from harness import Row, device, host_microseconds, machine, paired, save

from extrope_kernels import head_permutations, permute_qk

SHAPE = (1, 8192, 32, 128)
HEADS_K = 8
NAN = float("nan")


def make_inputs(dtype: torch.dtype, seqlen: int = SHAPE[1]) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = SHAPE
    q = torch.randn(batch, seqlen, heads, dim, device=device()).to(dtype)
    k = torch.randn(batch, seqlen, HEADS_K, dim, device=device()).to(dtype)
    return q, k


def power_table(permutations: torch.Tensor, seqlen: int) -> torch.Tensor:
    """(seqlen, heads_k, head_dim): the lanes c -> pi^p(c), as the authors' code keeps them."""
    lanes = torch.arange(SHAPE[-1], device=device()).expand_as(permutations)
    powers = []
    for _ in range(seqlen):
        powers.append(lanes)
        lanes = lanes.gather(-1, permutations)
    return torch.stack(powers)


def peers(q: torch.Tensor, k: torch.Tensor, permutations: torch.Tensor) -> dict:
    """Calls that give (q', k') from a table; group is how many q heads share a k head's lanes."""
    table = power_table(permutations, q.shape[1])[None]
    group = q.shape[2] // HEADS_K
    wide = table[:, :, :, None].expand(*table.shape[:3], group, SHAPE[-1])
    lanes_q = wide.flatten(2, 3).expand(q.shape)
    return {
        "torch.gather": lambda: (q.gather(-1, lanes_q), k.gather(-1, table)),
        "advanced indexing": lambda: (indexed(q, lanes_q), indexed(k, table)),
    }


def indexed(x: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
    seq = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    head = torch.arange(x.shape[2], device=x.device)[None, None, :, None]
    return x[0, seq, head, lanes]


class Report:
    """Prints each row when it is measured, and keeps it."""

    columns = "{:20} {:9} {:16} {:>9} {:18} {:>7} {:>7} {:>8}"

    def __init__(self) -> None:
        self.rows: list[Row] = []
        titles = ("", "dtype", "positions", "ms", "against", "ratio", "% copy", "host us")
        print(self.columns.format(*titles))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        numbers = (f"{row.milliseconds:.2f}", row.against, f"{row.ratio:.2f}")
        ends = (f"{row.percent_of_copy:.0f}", f"{row.host_microseconds:.1f}")
        print(self.columns.format(row.case, row.dtype, row.layout, *numbers, *ends), flush=True)


def bench_large(report: Report, dtype: torch.dtype, repeats: int) -> None:
    q, k = make_inputs(dtype)
    permutations = head_permutations(HEADS_K, SHAPE[-1]).to(device())
    anywhere = torch.randint(0, 10**6, (SHAPE[1],), device=device())
    into = torch.empty_like(q), torch.empty_like(k)
    clone = lambda: (q.clone(), k.clone())  # noqa: E731
    copy = lambda: (into[0].copy_(q), into[1].copy_(k))  # noqa: E731
    for case, positions, inverse in (
        ("forward", None, False),
        ("forward", anywhere, False),
        ("backward", None, True),
    ):
        ours = lambda: permute_qk(q, k, permutations, positions=positions, inverse=inverse)  # noqa
        mine, other, floor = paired(ours, clone, copy, repeats=repeats)
        layout = "0, 1, 2, ..." if positions is None else "anywhere < 1e6"
        numbers = (mine, "clone", mine / other, 100 * floor / mine, 0.0, NAN)
        report.add(Row(case, str(dtype)[6:], layout, *numbers))


def bench_peers(report: Report, dtype: torch.dtype, repeats: int) -> None:
    q, k = make_inputs(dtype)
    permutations = head_permutations(HEADS_K, SHAPE[-1]).to(device())
    ours = lambda: permute_qk(q, k, permutations)  # noqa: E731
    for name, theirs in peers(q, k, permutations).items():
        for mine, other in zip(ours(), theirs(), strict=True):
            assert torch.equal(mine, other), name
        mine, other = paired(ours, theirs, repeats=max(repeats // 3, 3))
        numbers = (other, "our forward", other / mine, NAN, 0.0, NAN)
        report.add(Row(name, str(dtype)[6:], "0, 1, 2, ...", *numbers))


def bench_decode(report: Report) -> None:
    """One token: what the host pays for a call. q (1, 1, 32, 128) and k with 8 heads."""
    q, k = make_inputs(torch.bfloat16, 1)
    permutations = head_permutations(HEADS_K, SHAPE[-1]).to(device())
    leaf = q.detach().clone().requires_grad_()
    op = torch.ops.extrope.permute_fwd
    calls = {
        "op permute_fwd": lambda: op(q, k, permutations),
        "permute_qk": lambda: permute_qk(q, k, permutations, positions=4096),
    }
    with torch.no_grad():
        times = {name: host_microseconds(call) for name, call in calls.items()}
    times["permute_qk, recorded"] = host_microseconds(lambda: permute_qk(leaf, k, permutations))
    for name, microseconds in times.items():
        report.add(Row(name, "bfloat16", "1 token", NAN, "", NAN, NAN, 0.0, microseconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(machine())
    report = Report()
    bench_decode(report)
    for dtype in (torch.float32, torch.bfloat16):
        bench_large(report, dtype, repeats)
        bench_peers(report, dtype, repeats)
    print(f"written: {save('permute', report.rows, shape=SHAPE, heads_k=HEADS_K)}")


if __name__ == "__main__":
    main()
