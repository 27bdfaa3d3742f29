"""What the benchmarks of attention share: inputs, the floor, PyTorch's attention beside ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from compare import compare, error_of_tail, matmul_floor, with_backward
from harness import Call, Report, device
from peers import flash_attention, sdpa
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope_qk, methods
from extrope_kernels.testing import attention_backends

HEADS = 8
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
    return {**sdpa(*rotated), **flash_attention(*rotated)}


def trained(calls: dict[str, Call | str]) -> dict[str, Call | str]:
    """Each call with the gradients of what it names as its `leaves`."""
    return {
        name: call if isinstance(call, str) else with_backward(call, call.leaves)
        for name, call in calls.items()
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
    others: Callable[..., dict[str, Call | str]] | None = None,
    yardsticks: Callable[..., dict[str, Call | str]] | None = None,
) -> None:
    """Forward, and forward with backward, of one attention beside plain causal attention.

    attend(q, k, v, freqs, backend=...): ours, whose time includes the rotation.
    pairs: how many (query, key) pairs a head has to compute; the floor is 4 * head_dim floating
        point operations each at the rate of a matrix product, 3.5 times that with the backward.
    others(q, k, v, freqs): who computes the same; yardsticks: something else. Forward only.
    training_bars: None leaves the backward out.
    """
    name, shape = str(dtype)[6:], f"{seqlen} x {HEADS}/{heads_k} x {head_dim}"
    cases = [f"{case} {HEADS}/{heads_k} x {head_dim}" for case in ("forward", "training")]
    wanted = [report.wants(f"{case} {name}") for case in cases]
    if not any(wanted):
        return
    q, k, v = make_inputs(seqlen, heads_k, head_dim, dtype)
    one, freqs = [x[:, :1] for x in (q, k, v)], frequencies(head_dim)
    exact = attend(q[:, -16:].double(), k.double(), v.double(), freqs, backend="reference")
    floors = [matmul_floor(4 * HEADS * pairs * head_dim * work, dtype, device())
              for work in (1, 3.5)]  # fmt: skip
    for backend, argument in backends().items():

        def ours(inputs=(q, k, v), argument=argument):
            return attend(*inputs, freqs, backend=argument)

        about = {"dtype": dtype, "shape": shape, "backend": backend}
        plain = plain_peers(q, k, v, freqs)
        if wanted[0]:
            more = others(q, k, v, freqs) if others else {}
            beside = yardsticks(q, k, v, freqs) if yardsticks else {}
            with torch.no_grad():
                compare(report, cases[0], {"extrope": ours, **more}, yardsticks={**beside, **plain},
                        floor=floors[0], error=error_of_tail([exact]), bars=forward_bars,
                        few={"extrope": lambda: ours(one)}, **about)  # fmt: skip
        if wanted[1] and training_bars is not None:
            ours.leaves = [q, k, v]
            compare(report, cases[1], trained({"extrope": ours}), yardsticks=trained(plain),
                    floor=floors[1], bars=training_bars, **about)  # fmt: skip


def by_length(attend: Attend, dtype: torch.dtype = torch.float32) -> Callable[[int], Call]:
    """For `scaling`: 2 heads on 1, head_dim 64."""

    def call_of_length(seqlen: int) -> Call:
        inputs, freqs = make_inputs(seqlen, 1, 64, dtype, heads=2), frequencies(64)
        return lambda: attend(*inputs, freqs)

    return call_of_length


SCALED = "float32, 2 heads on 1, head_dim 64"
