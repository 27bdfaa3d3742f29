"""The rotation against copying, torch.compile and transformers: python bench/bench_rope.py

q (1, 8192, 32, 128) and k with 8 heads, as in Llama-3 8B. Every ratio is of medians measured in
turn in one run. "% copy" is the bandwidth of the rotation (q and k read once and written once) over
that of copy_ between existing buffers. Out of place the yardstick is clone: on a CPU a fresh output
costs page faults, ours fewer because it asks for huge pages.

On a GPU the floor is bytes / bandwidth: 20 KiB a token in bf16 read and written, so 8192 tokens
take 50 us at 3.35 TB/s (H100 SXM) and 82 us at 2.04 TB/s (A100 80GB). The target is 90% of the copy
bandwidth measured on the same card, in one launch, for forward and backward alike.
"""

from __future__ import annotations

import argparse

import torch
from harness import Row, device, host_microseconds, largest_error, machine, paired, save

from extrope_kernels import RopeFreqs, apply_rope_qk, methods

SHAPE = (1, 8192, 32, 128)
HEADS_K = 8
rope_bwd = torch.ops.extrope.rope_bwd


def make_inputs(dtype: torch.dtype, seqlen: int = SHAPE[1]) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = SHAPE
    q = torch.randn(batch, seqlen, heads, dim, device=device()).to(dtype)
    k = torch.randn(batch, seqlen, HEADS_K, dim, device=device()).to(dtype)
    return q, k


def transformers_rotary(q, k, freqs: RopeFreqs):
    """transformers' own apply function, eager and compiled, with its tables made beforehand."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angle = torch.arange(q.shape[1], device=q.device)[:, None].float() * freqs.inv_freq
    angle = torch.cat((angle, angle), dim=-1)[None]
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
    heads_first = q.transpose(1, 2), k.transpose(1, 2)
    compiled = torch.compile(apply_rotary_pos_emb, dynamic=False)
    return (
        lambda: apply_rotary_pos_emb(*heads_first, cos, sin),
        lambda: compiled(*heads_first, cos, sin),
    )


class Report:
    """Prints each row when it is measured, and keeps it."""

    columns = "{:26} {:9} {:12} {:>9} {:26} {:>7} {:>7} {:>9} {:>8}"

    def __init__(self) -> None:
        self.rows: list[Row] = []
        print(
            self.columns.format(
                "", "dtype", "layout", "ms", "against", "ratio", "% copy", "error", "host us"
            )
        )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(
            self.columns.format(
                row.case,
                row.dtype,
                row.layout,
                f"{row.milliseconds:.2f}",
                row.against,
                f"{row.ratio:.2f}",
                f"{row.percent_of_copy:.0f}",
                f"{row.error:.1e}",
                f"{row.host_microseconds:.1f}",
            ),
            flush=True,
        )


def bench_large(report: Report, dtype: torch.dtype, interleaved: bool, repeats: int) -> None:
    q, k = make_inputs(dtype)
    freqs = methods.rope(SHAPE[-1]).to(device())
    into = torch.empty_like(q), torch.empty_like(k)
    layout, name = "interleaved" if interleaved else "half-split", str(dtype)[6:]
    options = dict(interleaved=interleaved)
    copy = lambda: (into[0].copy_(q), into[1].copy_(k))  # noqa: E731
    clone = lambda: (q.clone(), k.clone())  # noqa: E731
    forward = lambda: apply_rope_qk(q, k, freqs, **options)  # noqa: E731
    backward = lambda: rope_bwd(q, k, None, None, freqs.inv_freq, **options)  # noqa: E731
    inplace = lambda: apply_rope_qk(into[0], into[1], freqs, inplace=True, **options)  # noqa: E731
    exact = apply_rope_qk(
        q[:, -64:].double(),
        k[:, -64:].double(),
        freqs,
        positions=SHAPE[1] - 64,
        backend="reference",
        **options,
    )
    error = max(largest_error(x[:, -64:], y) for x, y in zip(forward(), exact))
    few = make_inputs(dtype, 1)
    for case, ours, against, theirs, small in (
        ("forward", forward, "clone", clone, lambda: apply_rope_qk(*few, freqs, **options)),
        (
            "backward",
            backward,
            "clone",
            clone,
            lambda: rope_bwd(*few, None, None, freqs.inv_freq, **options),
        ),
        (
            "in place",
            inplace,
            "copy_",
            copy,
            lambda: apply_rope_qk(*few, freqs, inplace=True, **options),
        ),
    ):
        mine, other, floor = paired(ours, theirs, copy, repeats=repeats)
        report.add(
            Row(
                case,
                name,
                layout,
                mine,
                against,
                mine / other,
                100 * floor / mine,
                error,
                host_microseconds(small),
            )
        )


def bench_peers(report: Report, dtype: torch.dtype, repeats: int) -> None:
    q, k = make_inputs(dtype)
    freqs = methods.rope(SHAPE[-1]).to(device())
    eager, compiled = transformers_rotary(q, k, freqs)
    into = torch.empty_like(q), torch.empty_like(k)
    forward = lambda: apply_rope_qk(q, k, freqs)  # noqa: E731
    inplace = lambda: apply_rope_qk(into[0], into[1], freqs, inplace=True)  # noqa: E731
    into[0].copy_(q), into[1].copy_(k)
    exact = apply_rope_qk(
        q[:, -64:].double(),
        k[:, -64:].double(),
        freqs,
        positions=SHAPE[1] - 64,
        backend="reference",
    )
    theirs = compiled()
    peer_error = max(largest_error(x.transpose(1, 2)[:, -64:], y) for x, y in zip(theirs, exact))
    mine, in_place, peer, slow = paired(
        forward, inplace, compiled, eager, repeats=max(repeats // 3, 3)
    )
    name = str(dtype)[6:]
    for case, against, ratio in (
        ("transformers eager", "our forward", slow / mine),
        ("transformers torch.compile", "our forward", peer / mine),
        ("transformers torch.compile", "our in place", peer / in_place),
    ):
        milliseconds = slow if "eager" in case else peer
        report.add(
            Row(
                case,
                name,
                "half-split",
                milliseconds,
                against,
                ratio,
                float("nan"),
                peer_error,
                float("nan"),
            )
        )


def bench_decode(report: Report) -> None:
    """One token: what the host pays for a call. q (1, 1, 32, 128) and k with 8 heads."""
    q, k = make_inputs(torch.bfloat16, 1)
    freqs = methods.rope(SHAPE[-1]).to(device())
    inv_freq, op = freqs.inv_freq, torch.ops.extrope
    leaf = q.detach().clone().requires_grad_()
    with torch.no_grad():
        calls = {
            "op rope_inplace, q": lambda: op.rope_inplace(q, None, inv_freq),
            "op rope_inplace, q and k": lambda: op.rope_inplace(q, k, inv_freq),
            "op rope_fwd": lambda: op.rope_fwd(q, k, inv_freq),
            "apply_rope_qk": lambda: apply_rope_qk(q, k, freqs, positions=4096),
            "apply_rope_qk in place": lambda: apply_rope_qk(
                q, k, freqs, positions=4096, inplace=True
            ),
        }
        times = {name: host_microseconds(call) for name, call in calls.items()}
    times["apply_rope_qk, recorded"] = host_microseconds(lambda: apply_rope_qk(leaf, k, freqs))
    nan = float("nan")
    for name, microseconds in times.items():
        report.add(Row(name, "bfloat16", "1 token", nan, "", nan, nan, nan, microseconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(machine())
    report = Report()
    bench_decode(report)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for interleaved in (False, True):
            bench_large(report, dtype, interleaved, repeats)
    for dtype in (torch.float32, torch.bfloat16):
        bench_peers(report, dtype, repeats)
    print(f"written: {save('rope', report.rows, shape=SHAPE, heads_k=HEADS_K)}")


if __name__ == "__main__":
    main()
