"""The rotation against copying and against its peers: python bench/bench_rope.py

q (1, 8192, 32, 128) and k with 8 heads, as in Llama-3 8B. The floor is copy_ of q and k between
existing buffers: the same bytes read and written. Peers get their tables beforehand, except "with
tables".

On a GPU the target is 90% of the copy bandwidth measured on the same card, in one launch, for
forward and backward alike; docs/gpu_audit.md has the bytes.
"""

from __future__ import annotations

from functools import partial

import torch
from compare import Floor, by_name, compare, error_of_tail, trained
from harness import Call, Calls, Report, arguments, device
from peers import rotary_peers
from scaling import scaling
from shapes import HEAD_DIM, HEADS_K, SEQLEN
from shapes import HEADS_Q as HEADS
from torch import Tensor

from extrope_kernels import apply_rope_qk, methods
from extrope_kernels.testing import available_backends

COMPILED = {torch.bfloat16: 1 / 3, torch.float32: 1 / 2}  # our time over torch.compile's, at most
BACKWARD = {"triton": torch.ops.extrope.rope_bwd_triton}  # the op without a suffix: the best one
backends = partial(by_name, available_backends)


class Timed:
    """All timed calls, for one dtype and pairing of dims at one length."""

    def __init__(self, dtype: torch.dtype, seqlen: int, interleaved: bool = False, backend=None):
        shapes = [(1, seqlen, heads, HEAD_DIM) for heads in (HEADS, HEADS_K)]
        q, k = (torch.randn(shape, device=device()).to(dtype) for shape in shapes)
        self.inputs = q.requires_grad_(), k.requires_grad_()
        self.freqs = methods.rope(HEAD_DIM).to(device())
        self.into = torch.empty_like(q), torch.empty_like(k)
        self.options = {"interleaved": interleaved}
        self.backend = {**self.options, "backend": backend}
        self.rope_bwd = BACKWARD.get(backend, torch.ops.extrope.rope_bwd)
        self.peers = rotary_peers(q, k, self.freqs, interleaved)
        self.copy()

    def forward(self):
        return apply_rope_qk(*self.inputs, self.freqs, **self.backend)

    def backward(self):
        return self.rope_bwd(*self.inputs, None, None, self.freqs.inv_freq, **self.options)[:2]

    def inplace(self):
        return apply_rope_qk(*self.into, self.freqs, inplace=True, **self.backend)

    @torch.no_grad()
    def copy(self):
        return [into.copy_(x) for into, x in zip(self.into, self.inputs)]

    @torch.no_grad()
    def exact_tail(self, inverse: bool = False) -> list[Tensor]:
        """Compute the last 64 tokens in float64."""
        tails = [x[:, -64:].double() for x in self.inputs]
        first = max(self.inputs[0].shape[1] - 64, 0)
        options = {**self.options, "inverse": inverse, "backend": "reference"}
        return list(apply_rope_qk(*tails, self.freqs, positions=first, **options))


def bench(report: Report, dtype: torch.dtype, interleaved: bool, backend: str) -> None:
    layout = "interleaved" if interleaved else "half-split"
    seqlen = 64 if report.args.quick else SEQLEN
    large, one = (Timed(dtype, n, interleaved, backends()[backend]) for n in (seqlen, 1))
    bar = COMPILED.get(dtype)
    fast = {peer: bar for peer in large.peers if bar is not None and "compiled" in peer}

    def timed(case: str, calls: Calls, few: Calls, **more) -> None:
        case = f"{case}, {layout}"
        if report.wants(case, dtype):
            compare(report, case, calls, few=few, dtype=dtype, backend=backend, **more,
                    shape=f"{seqlen} x {HEADS}/{HEADS_K} x {HEAD_DIM}", floor=Floor(large.copy),
                    )  # fmt: skip

    forward, first = ({"extrope": x.forward, **x.peers} for x in (large, one))
    exact = error_of_tail(large.exact_tail())
    with torch.no_grad():
        clone = {"clone": lambda: [x.clone() for x in large.inputs]}
        timed("forward", forward, first, yardsticks=clone,
              bars={"clone": 1.2, **fast}, error=exact)  # fmt: skip
        inplace = partial(large.inplace)
        inplace.checked = lambda: (large.copy(), large.inplace())[1]
        timed("in place", {**forward, "extrope": inplace}, {**first, "extrope": one.inplace},
              yardsticks={"copy_": large.copy}, bars={"copy_": 1.3, **fast},
              error=exact)  # fmt: skip
        timed("backward", {"extrope": large.backward}, {"extrope": one.backward},
              yardsticks=clone, bars={"clone": 1.2},
              error=error_of_tail(large.exact_tail(inverse=True)))  # fmt: skip
    timed("forward + backward", *(trained(calls, x.inputs)
          for calls, x in ((forward, large), (first, one))))  # fmt: skip


@torch.no_grad()
def by_length(seqlen: int) -> dict[str, Call]:
    calls = Timed(torch.bfloat16, seqlen)
    return {"forward": calls.forward, "in place": calls.inplace, "copy_": calls.copy}


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    report = Report("rope", args)
    for backend in backends():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for interleaved in (False, True):
                bench(report, dtype, interleaved, backend)
    report.save()
    scaling("rope", by_length, args, about="bfloat16, 32 heads on 8, head_dim 128")


if __name__ == "__main__":
    main()
