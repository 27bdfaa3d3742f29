"""A dozen timings, each beside the audit's bound for the same shape and beside installed peers.

They replay CUDA graphs with a cold L2 cache, as all of bench/ on a GPU, in bfloat16 at the shapes
of bench/shapes.py. Peers of attention get rotated inputs and compute plain causal attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial as part

import torch
from bench_attention import exact_tail, frequencies, make_inputs, plain_peers
from bench_decode import caches, decode_paged, sdpa_calls
from bench_rope import Calls
from compare import error_of_tail, trained, why_not
from harness import Call, cell, column, columns, paired
from peers import decode_peers
from shapes import (
    BATCH,
    BLOCK,
    CHUNK,
    HEAD_DIM,
    HEADS_K,
    HEADS_Q,
    KEYS,
    KEYS_WINDOW,
    LOCAL,
    SEQLEN,
    WINDOW,
)

from extrope_kernels import merge_attention, rope_attention, scores
from extrope_kernels.ops.rope import backends as rope_backends

from .bounds import bound, card_of
from .step import Deadline, Verdict

DTYPE = torch.bfloat16
SECONDS = 3.0  # of one pairing
SIZES = f"{SEQLEN} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}"
CACHED = f"{BATCH} on {KEYS} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}"


@dataclass
class Timed:
    """Timed calls: ours, or why it cannot run; peers by name."""

    ours: Call
    peers: dict[str, Call | str] = field(default_factory=dict)
    error: Callable[[object], float] | None = None


@dataclass(frozen=True)
class Timing:
    """One row: its launches by kernel and variant of the audit, and a maker of its calls."""

    name: str
    shape: str
    launches: tuple[tuple[str, str], ...]
    make: Callable[[], Timed | str]


@dataclass
class Result:
    name: str = column()
    shape: str = column("shape")
    milliseconds: float | None = column("ms", ".3f", None)
    bound: float | None = column("bound, ms", ".3f", None)
    bound_by: str = column("by", default="")
    of_bound: float | None = column("bound/ours", ".0%", None)
    error: float | None = column("error", ".1e", None)
    peers: dict[str, dict[str, float] | str] = field(default_factory=dict)  # or why not
    absent: str = ""

    def cells(self) -> list[str]:
        found = {name: cell(getattr(self, name), form) for name, (_, form) in HEAD.items()}
        found["milliseconds"] = found["milliseconds"] or self.absent
        measured = {name: x for name, x in self.peers.items() if not isinstance(x, str)}
        others = (f"{name} {x['ours_over_it']:.2f}" for name, x in measured.items())
        return [*found.values(), "; ".join(others)]


HEAD = columns(Result)


# -------------------------------------------------------------------------------------------------
# Timed calls


def rotation(backend: str, backward: bool = False) -> Timed | str:
    if (state := rope_backends()[backend]) != "available":
        return state
    calls = Calls(DTYPE, SEQLEN, backend=backend)
    copy = {"copy_": calls.copy}
    if backward:
        return Timed(calls.backward, copy, error_of_tail(calls.exact_tail(inverse=True)))
    return Timed(calls.forward, {**calls.peers, **copy}, error_of_tail(calls.exact_tail()))


def causal(score: scores.Score | None, training: bool = False) -> Timed:
    qkv, freqs = make_inputs(SEQLEN, HEADS_K, HEAD_DIM, DTYPE, HEADS_Q), frequencies(HEAD_DIM)

    # Without a name Triton runs (select_backend.py): is the second faster, and from which length?
    own = {name: part(rope_attention, *qkv, freqs, score, backend=name)
           for name in ("triton", "flash_attn")}  # fmt: skip
    for call in own.values():
        call.leaves = qkv
    calls = {**own, **plain_peers(*qkv, freqs)}
    if training:
        calls = trained(calls)
        return Timed(calls.pop("triton"), calls)
    return Timed(calls.pop("triton"), calls, error_of_tail([exact_tail(score, *qkv, freqs)]))


def decode(score: scores.Score | None) -> Timed:
    raw, rotated = caches(KEYS, DTYPE)
    exact = exact_tail(score, raw.q, *raw.contiguous(), frequencies(HEAD_DIM))
    cache = raw if score else replace(rotated, q=raw.q)  # plain RoPE stores rotated keys
    peers = {**sdpa_calls(rotated.q, *rotated.contiguous()), **decode_peers(rotated)}
    return Timed(decode_paged(cache, score, "triton"), peers, error_of_tail([exact]))


def merge() -> Timed:
    shape = 1, SEQLEN, HEADS_Q, HEAD_DIM
    outs = [torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2)]
    lses = [torch.randn(1, HEADS_Q, SEQLEN, device="cuda") for _ in range(2)]
    exact, _ = merge_attention([x[:, -64:].double() for x in outs], [x[..., -64:] for x in lses])
    error = error_of_tail([exact])
    return Timed(lambda: merge_attention(outs, lses), error=lambda result: error(result[0]))


def attention(words: str, training: bool = False) -> tuple[tuple[str, str], ...]:
    """List attention's launches: rotations, kernels, and with gradients the inverse rotations."""
    forward = ("attention's rotation", f"{words} keys"), ("attention", words)
    if not training:
        return forward
    back = ("attention, dQ", words), ("attention, dK and dV", words)
    both = ("attention's rotation", words), ("attention's rotation", f"{words} inverse")
    return (*forward, *back, *both)


def timings() -> Iterator[Timing]:
    triton = (("rotation", "half-split"),)
    yield Timing("rotation, Triton", SIZES, triton, part(rotation, "triton"))
    cuda = (("rotation", "half-split, CUDA C++"),)
    yield Timing("rotation, CUDA C++", SIZES, cuda, part(rotation, "cuda"))
    yield Timing("rotation backward, Triton", SIZES, triton, part(rotation, "triton", True))
    by_name = {"no window": None, "ReRoPE": scores.rerope(WINDOW),
               "dual chunk": scores.dual_chunk(CHUNK, LOCAL),
               "LEX": scores.blockwise_causal(BLOCK)}  # fmt: skip
    for name, score in by_name.items():
        yield Timing(f"attention, {name}", SIZES, attention(name), part(causal, score))
    for name in ("no window", "ReRoPE"):
        make = part(causal, by_name[name], training=True)
        yield Timing(f"attention with backward, {name}", SIZES, attention(name, True), make)
    for name, score in (("RoPE", None), ("ReRoPE", scores.rerope(KEYS_WINDOW))):
        yield Timing(f"decode, {name}", CACHED, (("decode", name),), part(decode, score))
    two = f"2 of {SEQLEN} x {HEADS_Q} x {HEAD_DIM}"
    yield Timing("merge", two, (("merge", "two sets"),), merge)


# -------------------------------------------------------------------------------------------------
# The step


def run(deadline: Deadline) -> Verdict:
    return run_all(list(timings()), deadline)


def run_all(every: list[Timing], deadline: Deadline) -> Verdict:
    """Measure all rows, and keep each at once: the time may be too short for the next."""
    torch.manual_seed(0)
    results: list[Result] = []
    name = torch.cuda.get_device_name()
    for timing in every:
        if not deadline:
            break
        torch.cuda.empty_cache()
        results.append(measure(timing, name))
        print(" | ".join(results[-1].cells()), flush=True)
        deadline.keep(verdict(results, len(every), name))
    return verdict(results, len(every), name)


def measure(timing: Timing, card: str) -> Result:
    """Time ours alone and with each peer in turn. An error of ours is kept and fails the step."""
    result = Result(timing.name, timing.shape)
    found = bound(timing.launches, card_of(card))
    result.bound, result.bound_by = found or (None, "")
    try:
        made = timing.make()
        if isinstance(made, str):
            result.absent = made
            return result
        with torch.set_grad_enabled("backward" in timing.name):
            (result.milliseconds,) = paired(made.ours, repeats=15, seconds=SECONDS)
            result.of_bound = result.bound / result.milliseconds if result.bound else None
            result.error = made.error(made.ours()) if made.error else None
            for peer, call in made.peers.items():
                result.peers[peer] = beside(made.ours, call)
    except Exception as error:
        result.absent = f"FAILED {type(error).__name__}: {str(error).strip()[:200]}"
    return result


def beside(ours: Call, call: Call | str) -> dict[str, float] | str:
    """Return the peer's milliseconds and our time over it, taken in turn; or why there are none."""
    if reason := call if isinstance(call, str) else why_not(call):
        return reason
    its, own = paired(call, ours, repeats=15, seconds=SECONDS)
    return {"milliseconds": its, "ours_over_it": own / its}


def verdict(results: list[Result], asked: int, card: str) -> Verdict:
    measured = [one for one in results if one.milliseconds is not None]
    failed = [one for one in results if one.absent.startswith("FAILED")]
    line = f"{len(measured)} of {asked} rows measured, {len(failed)} failed"
    if card_of(card) is None:
        line += f"; the audit has no bounds for {card}"
    absent = {name: why for one in results for name, why in one.peers.items()
              if isinstance(why, str)}  # fmt: skip
    line += f"; not there: {', '.join(absent)}" if absent else ""
    head = [*(heading for heading, _ in HEAD.values()), "our time over theirs"]
    table = {"head": head, "rows": [one.cells() for one in results]}
    content = {"table": table, "rows": [asdict(one) for one in results], "absent": absent}
    return Verdict(len(results) == asked and not failed, line, content)
