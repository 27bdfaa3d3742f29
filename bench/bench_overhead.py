"""Microseconds per call of every public function and op: python bench/bench_overhead.py

On one token, so that little but the call itself is left: q (1, 1, 32, 128) and k with 8 heads for
the rotation, (1, 1, 8, 64) and 2 heads for attention, a cache of 16 tokens, bfloat16. "recorded" is
the forward of inputs that require grad; "compiled" is torch.compile(fullgraph=True). Frequencies
and positions are made once a request or a batch, not once a layer.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import NAN, Report, arguments, device, host_microseconds, verdict
from torch import Tensor

import extrope_kernels as ek
from extrope_kernels import methods, positions, scores

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))  # for the examples
ops = torch.ops.extrope
# Eager, nothing recorded: how many times a row above, as processors differ.
BARS = {
    "apply_rope_qk": (12.0, "torch.add"),
    "rope_append_kvcache": (12.0, "torch.add"),
    "rerope_attention of 16 tokens": (26.4, "torch.add"),
    "rerope_attention_with_kvcache": (21.6, "torch.add"),
}


@dataclass
class Overhead:
    """Microseconds; NaN where a function does not work that way."""

    name: str
    eager: float
    recorded: float = NAN
    compiled: float = NAN
    compiled_recorded: float = NAN
    bar: float = NAN

    @property
    def verdict(self) -> str:
        return verdict(self.eager, self.bar)


COLUMNS = {
    "name": ("microseconds a call", 36, ""),
    "eager": ("eager", 8, ".1f"),
    "recorded": ("recorded", 8, ".1f"),
    "compiled": ("compiled", 8, ".1f"),
    "compiled_recorded": ("compiled, recorded", 18, ".1f"),
    "bar": ("bar", 6, ".1f"),
    "verdict": ("", 6, ""),
}


@dataclass
class Case:
    """function(*tensors): which may require grad, if `differentiable`."""

    function: Callable
    tensors: tuple[Tensor, ...]
    differentiable: bool = True


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=device(), dtype=torch.bfloat16)


def rotations() -> dict[str, Case]:
    q, k, freqs = random(1, 1, 32, 128), random(1, 1, 8, 128), methods.rope(128).to(device())
    by, w = freqs.inv_freq, torch.ones(128, device=device())
    filled = torch.tensor([8], dtype=torch.int32, device=device())
    return {
        "apply_rope": Case(lambda q: ek.apply_rope(q, freqs), (q,)),
        "apply_rope_qk": Case(lambda q, k: ek.apply_rope_qk(q, k, freqs, positions=4096), (q, k)),
        "apply_rope_qk in place": Case(
            lambda q, k: ek.apply_rope_qk(q, k, freqs, positions=4096, inplace=True), (q, k), False
        ),
        "rope_append_kvcache": Case(
            lambda q, k, *caches: ek.rope_append_kvcache(
                q, k, k, *caches, freqs, cache_seqlens=filled, q_norm_weight=w, k_norm_weight=w
            ),
            (q, k, random(1, 16, 8, 128), random(1, 16, 8, 128)),
            False,
        ),
        "op rope_fwd": Case(lambda q, k: ops.rope_fwd(q, k, by), (q, k)),
        "op rope_bwd": Case(lambda q, k: ops.rope_bwd(q, k, None, None, by), (q, k)),
        "op rope_inplace, q": Case(lambda q: ops.rope_inplace(q, None, by), (q,), False),
        "op rope_inplace, q and k": Case(lambda q, k: ops.rope_inplace(q, k, by), (q, k), False),
    }


def attentions() -> dict[str, Case]:
    """Every score method, as the tests call it, with and without a cache; the ops by ReRoPE's."""
    from score_examples import EXAMPLES

    q, k, v, freqs = random(1, 1, 8, 64), random(1, 1, 2, 64), random(1, 1, 2, 64), methods.rope(64)
    freqs, score = freqs.to(device()), scores.rerope(4)
    caches = (random(1, 16, 2, 64), random(1, 16, 2, 64))
    filled = torch.tensor([8], dtype=torch.int32, device=device())
    cases = {}
    for example in EXAMPLES.values():
        cases[example.attention.__name__] = Case(
            lambda *qkv, x=example: x.attention(*qkv, freqs, **x.parameters), (q, k, v)
        )
        cases[example.with_kvcache.__name__] = Case(
            lambda q, k, v, *kv, x=example: x.with_kvcache(
                q, *kv, freqs, k=k, v=v, cache_seqlens=filled, **x.parameters
            ),
            (q, k, v, *caches),
            False,
        )
    cases["rerope_attention of 16 tokens"] = Case(
        lambda *qkv: ek.rerope_attention(*qkv, freqs, window=4),
        (random(1, 16, 8, 64), random(1, 16, 2, 64), random(1, 16, 2, 64)),
    )
    own = {"starts": score.starts, "granularity": score.granularity}
    by, maps, stored = freqs.inv_freq, {"maps": score.maps}, {"maps": score.stored_maps}
    out, lse = ops.attention_fwd(q, k, v, by, **own, **maps)
    cases["op attention_fwd"] = Case(
        lambda *qkv: ops.attention_fwd(*qkv, by, **own, **maps), (q, k, v)
    )
    cases["op attention_bwd"] = Case(
        lambda *x: ops.attention_bwd(x[0], None, *x[1:], by, **own, **maps),
        (out, q, k, v, out, lse),
        False,
    )
    cases["op decode"] = Case(
        lambda q, *kv: ops.decode(q, *kv, None, None, by, filled, **own, **stored),
        (q, *caches),
        False,
    )
    cases["op decode with its append"] = Case(
        lambda q, k, v, *kv: ops.decode(q, *kv, k, v, by, filled, **own, **stored),
        (q, k, v, *caches),
        False,
    )
    cases["op append"] = Case(
        lambda k, v, *kv: ops.append(*kv, k, v, by, filled, stored=list(score.stored)),
        (k, v, *caches),
        False,
    )
    return {**cases, **merged()}


def permutes() -> dict[str, Case]:
    q, k, dims = random(1, 1, 32, 128), random(1, 1, 8, 128), ek.head_permutations(8, 128)
    dims = dims.to(device())
    heads = [random(1, 1, 8, 64) for _ in range(3)]
    by = {"permutations": ek.head_permutations(8, 64).to(device())}
    _, state = ek.permuteformer_step(*heads, **by)
    return {
        "head_permutations": Case(lambda: ek.head_permutations(8, 128), (), False),
        "permute": Case(lambda q: ek.permute(q, dims), (q,)),
        "permute_qk": Case(lambda q, k: ek.permute_qk(q, k, dims, positions=4096), (q, k)),
        "op permute_fwd": Case(lambda q, k: ops.permute_fwd(q, k, dims), (q, k)),
        "permuteformer_attention": Case(
            lambda *qkv: ek.permuteformer_attention(*qkv, **by), tuple(heads)
        ),
        "permuteformer_step": Case(
            lambda *qkv: ek.permuteformer_step(*qkv, state, positions=1, **by), tuple(heads), False
        ),
    }


def merged() -> dict[str, Case]:
    outs, lses = (random(1, 1, 8, 64), random(1, 1, 8, 64)), torch.zeros(2, 1, 8, 1).to(device())
    return {"merge_attention": Case(lambda a, b: ek.merge_attention((a, b), lses), outs)}


def frequencies() -> dict[str, Case]:
    """Every method, as the tests call it."""
    from method_examples import example

    return {
        f"methods.{name}": Case(functools.partial(function, 128, **example(name, 128)), (), False)
        for name, function in methods.METHODS.items()
    }


def position_strategies() -> dict[str, Case]:
    sizes = {
        "shape": (4, 1024, 4096), "random_padding": (4, 1000, 1024), "randomized": (1024, 8192),
        "pose": (4, 9000, 1024, 8192), "giraffe_randomized": (4, 1024),
    }  # fmt: skip
    return {
        f"positions.{name}": Case(functools.partial(getattr(positions, name), *size), (), False)
        for name, size in sizes.items()
    }


def measure(case: Case, name: str, quick: bool) -> Overhead:
    """Eager and compiled, nothing recorded and recorded; host-side functions eager only."""
    often = {"calls": 2, "rounds": 1} if quick else {"calls": 200, "rounds": 60}

    def microseconds(function: Callable, tensors: tuple[Tensor, ...]) -> float:
        for _ in range(3):
            function(*tensors)
        return host_microseconds(lambda: function(*tensors), **often)

    # A fresh code object for each: dynamo would count one function's variants as recompilations.
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=not quick, dynamic=False)
    row = Overhead(name, NAN)
    with torch.no_grad():
        row.eager = microseconds(case.function, case.tensors)
        if case.tensors:
            row.compiled = microseconds(compiled, case.tensors)
    if case.differentiable:
        leaves = tuple(x.clone().requires_grad_() for x in case.tensors)
        row.recorded = microseconds(case.function, leaves)
        row.compiled_recorded = microseconds(compiled, leaves)
    return row


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    torch.manual_seed(0)
    report = Report("overhead", args, COLUMNS)
    cases = {
        "torch.add": Case(torch.add, (random(1), random(1))),
        **rotations(),
        **permutes(),
        **attentions(),
        **frequencies(),
        **position_strategies(),
    }
    eager = {}
    for name, case in cases.items():
        if report.wants(name):
            row = measure(case, name, args.quick)
            times, yardstick = BARS.get(name, (NAN, name))
            eager[name] = row.eager
            row.bar = times * eager.get(yardstick, NAN)
            report.add(row)
    report.save()


if __name__ == "__main__":
    main()
