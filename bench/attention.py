"""What the benchmarks of attention share: inputs, the floor, PyTorch's attention beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from compare import compare, error_of_tail, matmul_floor, with_backward
from flash_peers import attention_peers
from harness import Call, Report, device
from peers import sdpa
from shapes import HEAD_DIM, HEADS_K, HEADS_Q
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope_qk, methods
from extrope_kernels.testing import attention_backends

HEADS = 8  # on a CPU; on a GPU those of shapes.py
TAIL = 16  # queries whose error is measured
OWN = ("no window",)  # a yardstick that is our own kernel
Attend = Callable[..., Tensor]


def make_inputs(seqlen: int, heads_k: int, head_dim: int, dtype: torch.dtype, heads: int = HEADS):
    """q, k and v (1, seqlen, heads, head_dim), not rotated."""
    shapes = [(1, seqlen, count, head_dim) for count in (heads, heads_k, heads_k)]
    return [torch.randn(shape, device=device()).to(dtype) for shape in shapes]


def frequencies(head_dim: int) -> RopeFreqs:
    return methods.rope(head_dim).to(device())


def backends() -> dict[str, str | None]:
    """What `backend` is given for each implementation; None is the default, without a look-up."""
    if device() == "cpu":
        return {"cpu": None}
    return {name: name for name in attention_backends() if name != "reference"}


def plain_peers(q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs) -> dict[str, Call | str]:
    """Plain causal attention by others, over inputs that are rotated beforehand."""
    rotated = [*apply_rope_qk(q, k, freqs), v]
    return {**sdpa(*rotated), **attention_peers(*rotated)}


def exact_tail(attend: Attend, q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs) -> Tensor:
    """The last queries in float64; a key head at a time, for long sequences."""
    group = q.shape[2] // k.shape[2]
    parts = [
        attend(*(x.double() for x in heads), freqs, backend="reference")
        for heads in zip(q[:, -TAIL:].split(group, 2), k.split(1, 2), v.split(1, 2))
    ]
    return torch.cat(parts, dim=2)


def trained(calls: dict[str, Call | str]) -> dict[str, Call | str]:
    """Each call with the gradients of what it names as its `leaves`; not those that name none."""
    return {
        name: call if isinstance(call, str) else with_backward(call, call.leaves)
        for name, call in calls.items()
        if isinstance(call, str) or hasattr(call, "leaves")
    }


def compare_causal(
    report: Report,
    attend: Attend,
    *,
    seqlen: int,
    heads_k: int,
    head_dim: int,
    dtype: torch.dtype,
    pairs: float,
    forward_bars: dict[str, float] | None = None,
    training_bars: dict[str, float] | None = None,
    heads: int = HEADS,
    about: str = "",
    others: Callable[..., dict[str, Call | str]] | None = None,
    yardsticks: Callable[..., dict[str, Call | str]] | None = None,
) -> None:
    """Forward, and forward with backward, of one attention beside plain causal attention.

    attend(q, k, v, freqs, backend=...): ours, whose time includes the rotation.
    pairs: how many (query, key) pairs a head has to compute; the floor is 4 * head_dim floating
        point operations each at the rate of a matrix product, 3.5 times that with the backward.
    others(q, k, v, freqs): who computes the same, forward only; yardsticks: something else.
    training_bars: None leaves the backward out.
    about: what else names the case.
    """
    name, sizes = str(dtype)[6:], f"{heads}/{heads_k} x {head_dim}"
    cases = [f"{case} {sizes}{about}" for case in ("forward", "training")]
    wanted = [report.wants(f"{case} {name}") for case in cases]
    if not any(wanted):
        return
    q, k, v = make_inputs(seqlen, heads_k, head_dim, dtype, heads)
    one, freqs = [x[:, :1] for x in (q, k, v)], frequencies(head_dim)
    error = error_of_tail([exact_tail(attend, q, k, v, freqs)])
    floors = [matmul_floor(4 * heads * pairs * head_dim * work, dtype, device())
              for work in (1, 3.5)]  # fmt: skip
    for backend, argument in backends().items():

        def ours(inputs=(q, k, v), argument=argument):
            return attend(*inputs, freqs, backend=argument)

        row = {"dtype": dtype, "shape": f"{seqlen} x {sizes}", "backend": backend}
        plain = plain_peers(q, k, v, freqs)
        beside = yardsticks(q, k, v, freqs) if yardsticks else {}
        if wanted[0]:
            more = others(q, k, v, freqs) if others else {}
            with torch.no_grad():
                compare(report, cases[0], {"extrope": ours, **more}, yardsticks={**beside, **plain},
                        floor=floors[0], error=error, bars=forward_bars,
                        few={"extrope": lambda: ours(one)}, own=OWN, **row)  # fmt: skip
        if wanted[1] and training_bars is not None:
            ours.leaves = [q, k, v]
            compare(
                report,
                cases[1],
                trained({"extrope": ours}),
                yardsticks=trained({**beside, **plain}),
                floor=floors[1],
                bars=training_bars,
                own=OWN,
                **row,
            )


def causal_sizes(quick: bool) -> Iterator[dict]:
    """Heads and dtypes that the other attentions are measured with."""
    if device() == "cuda" and not quick:
        heads = {"heads": HEADS_Q, "heads_k": HEADS_K, "head_dim": HEAD_DIM}
        yield {**heads, "dtype": torch.bfloat16, "training_bars": {}}
        return
    for head_dim, dtype in ((64, torch.float32), (128, torch.float32), (128, torch.bfloat16)):
        training = {} if dtype is torch.float32 else None
        yield {"heads_k": 2, "head_dim": head_dim, "dtype": dtype, "training_bars": training}


def by_length(attend: Attend) -> Callable[[int], Call]:
    """For `scaling`, as SCALED says."""

    def call_of_length(seqlen: int) -> Call:
        inputs, freqs = make_inputs(seqlen, 1, 64, torch.float32, heads=2), frequencies(64)
        return lambda: attend(*inputs, freqs)

    return call_of_length


SCALED = "float32, 2 heads on 1, head_dim 64"
