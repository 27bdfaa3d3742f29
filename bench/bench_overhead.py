"""Microseconds per call of every public function and op: python bench/bench_overhead.py

On one token, so that little but the call itself is left: q (1, 1, 32, 128) and k with 8 heads for
the rotation, (1, 1, 8, 64) and 2 heads for attention, a cache of 16 tokens, bfloat16. "recorded" is
the forward of inputs that require grad; "compiled" is torch.compile(fullgraph=True). Frequencies
and positions are made once a request or a batch, not once a layer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import NAN, Report, arguments, device, host_microseconds, verdict
from torch import Tensor

import extrope_kernels as ek
from extrope_kernels import methods, positions

ops = torch.ops.extrope
BARS = {"op rope_inplace, q": 5.0, "apply_rope_qk": 12.0}  # eager, nothing recorded


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
    "bar": ("bar", 4, ".0f"),
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
    by = freqs.inv_freq
    return {
        "apply_rope": Case(lambda q: ek.apply_rope(q, freqs), (q,)),
        "apply_rope_qk": Case(lambda q, k: ek.apply_rope_qk(q, k, freqs, positions=4096), (q, k)),
        "apply_rope_qk in place": Case(
            lambda q, k: ek.apply_rope_qk(q, k, freqs, positions=4096, inplace=True), (q, k), False
        ),
        "op rope_fwd": Case(lambda q, k: ops.rope_fwd(q, k, by), (q, k)),
        "op rope_bwd": Case(lambda q, k: ops.rope_bwd(q, k, None, None, by), (q, k)),
        "op rope_inplace, q": Case(lambda q: ops.rope_inplace(q, None, by), (q,), False),
        "op rope_inplace, q and k": Case(lambda q, k: ops.rope_inplace(q, k, by), (q, k), False),
    }


def attentions() -> dict[str, Case]:
    q, k, v, freqs = random(1, 1, 8, 64), random(1, 1, 2, 64), random(1, 1, 2, 64), methods.rope(64)
    freqs = freqs.to(device())
    scores = {
        "rerope": {"window": 4},
        "dual_chunk": {"chunk_size": 6, "local_window": 2},
        "blockwise_causal": {"block_size": 4},
    }
    cases = {}
    for name, own in scores.items():
        attend = getattr(ek, f"{name}_attention")
        forward, backward = (getattr(ops, f"{name}_attn_{way}") for way in ("fwd", "bwd"))
        out, lse = forward(q, k, v, freqs.inv_freq, **own)
        cases[f"{name}_attention"] = Case(
            lambda *qkv, f=attend, own=own: f(*qkv, freqs, **own), (q, k, v)
        )
        cases[f"op {name}_attn_fwd"] = Case(
            lambda *qkv, f=forward, own=own: f(*qkv, freqs.inv_freq, **own), (q, k, v)
        )
        cases[f"op {name}_attn_bwd"] = Case(
            lambda *x, f=backward, own=own: f(x[0], None, *x[1:], freqs.inv_freq, **own),
            (out, q, k, v, out, lse),
            False,
        )
    return {**cases, **cached(q, k, v, freqs), **merged()}


def permutes() -> dict[str, Case]:
    q, k, lanes = random(1, 1, 32, 128), random(1, 1, 8, 128), ek.head_permutations(8, 128)
    lanes = lanes.to(device())
    heads = [random(1, 1, 8, 64) for _ in range(3)]
    by = {"permutations": ek.head_permutations(8, 64).to(device())}
    _, state = ek.permuteformer_step(*heads, **by)
    return {
        "head_permutations": Case(lambda: ek.head_permutations(8, 128), (), False),
        "permute": Case(lambda q: ek.permute(q, lanes), (q,)),
        "permute_qk": Case(lambda q, k: ek.permute_qk(q, k, lanes, positions=4096), (q, k)),
        "op permute_fwd": Case(lambda q, k: ops.permute_fwd(q, k, lanes), (q, k)),
        "permuteformer_attention": Case(
            lambda *qkv: ek.permuteformer_attention(*qkv, **by), tuple(heads)
        ),
        "permuteformer_step": Case(
            lambda *qkv: ek.permuteformer_step(*qkv, state, positions=1, **by), tuple(heads), False
        ),
    }


def cached(q: Tensor, k: Tensor, v: Tensor, freqs: ek.RopeFreqs) -> dict[str, Case]:
    caches, used = (random(1, 16, 2, 64), random(1, 16, 2, 64)), {"window": 4}
    filled = torch.tensor([8], dtype=torch.int32, device=device())
    step = {"cache_seqlens": filled, **used}
    by = freqs.inv_freq
    return {
        "rerope_attention_with_kvcache": Case(
            lambda q, k, v, *kv: ek.rerope_attention_with_kvcache(q, *kv, freqs, k=k, v=v, **step),
            (q, k, v, *caches),
            False,
        ),
        "op rerope_attn_append": Case(
            lambda k, v, *kv: ops.rerope_attn_append(*kv, k, v, by, filled, **used),
            (k, v, *caches),
            False,
        ),
        "op rerope_attn_decode": Case(
            lambda q, *kv: ops.rerope_attn_decode(q, *kv, by, filled, **used), (q, *caches), False
        ),
    }


def merged() -> dict[str, Case]:
    outs, lses = (random(1, 1, 8, 64), random(1, 1, 8, 64)), torch.zeros(2, 1, 8, 1).to(device())
    return {"merge_attention": Case(lambda a, b: ek.merge_attention((a, b), lses), outs)}


def frequencies() -> dict[str, Case]:
    """Every method, with the parameters that have no default."""
    known = {
        "factor": 4, "seq_len": 16384, "max_position_embeddings": 8192, "power": 0.1,
        "original_max_position_embeddings": 8192, "truncate_pos": 8192,
        "short_factor": [1.0] * 64, "long_factor": [4.0] * 64, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    cases = {}
    for name, function in methods.METHODS.items():
        parameters = inspect.signature(function).parameters.values()
        own = {p.name: known[p.name] for p in parameters if p.name in known
               and p.default in (inspect.Parameter.empty, None)}  # fmt: skip
        cases[f"methods.{name}"] = Case(functools.partial(function, 128, **own), (), False)
    return cases


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
    row = Overhead(name, NAN, bar=BARS.get(name, NAN))
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
        **rotations(),
        **permutes(),
        **attentions(),
        **frequencies(),
        **position_strategies(),
    }
    for name, case in cases.items():
        if report.wants(name):
            report.add(measure(case, name, args.quick))
    report.save()


if __name__ == "__main__":
    main()
