"""A dozen timings: each beside the audit's bound for the same shape, and beside installed peers.

Replays of CUDA graphs with a cold L2 cache, as all of bench/ on a GPU, in bfloat16 at the shapes of
bench/shapes.py. Peers of attention get rotated inputs and compute plain causal attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
from attention import exact_tail, frequencies, make_inputs, plain_peers, trained
from bench_decode import caches, decode_paged, sdpa_calls
from bench_merge_attention import error_of, formula, parts
from bench_permute import make_inputs as permute_inputs
from bench_permute import permutations
from bench_rope import Calls
from compare import error_of_tail, why_not
from flash_peers import decode_peers
from harness import Call, paired
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

from extrope_kernels import (
    blockwise_causal_attention,
    dual_chunk_attention,
    merge_attention,
    permute_qk,
    permuteformer_attention,
    rerope_attention,
)
from extrope_kernels.ops.rope import backends as rope_backends

from .bounds import bound, card_of
from .step import Deadline, Verdict

DTYPE = torch.bfloat16
SECONDS = 3.0  # of one pairing
SIZES = f"{SEQLEN} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}"
CACHED = f"{BATCH} on {KEYS} x {HEADS_Q}/{HEADS_K} x {HEAD_DIM}"
FORWARD, BACKWARD = ("forward",), ("forward", "dq", "dkv")


@dataclass
class Timed:
    """What is timed: ours, and a reason where it cannot be; peers by name."""

    ours: Call
    peers: dict[str, Call | str] = field(default_factory=dict)
    error: Callable[[object], float] | None = None


@dataclass(frozen=True)
class Timing:
    """One row: its launches by kernel and variant of the audit, and how to make what is timed."""

    name: str
    shape: str
    launches: tuple[tuple[str, str], ...]
    make: Callable[[], Timed | str]


@dataclass
class Result:
    name: str
    shape: str
    milliseconds: float | None = None
    bound: float | None = None  # milliseconds
    bound_by: str = ""
    error: float | None = None
    peers: dict[str, dict[str, float] | str] = field(default_factory=dict)  # or why not
    absent: str = ""

    def cells(self) -> list[str]:
        measured = {name: x for name, x in self.peers.items() if not isinstance(x, str)}
        others = (f"{name} {x['ours_over_it']:.2f}" for name, x in measured.items())
        share = self.bound / self.milliseconds if self.bound and self.milliseconds else None
        return [
            self.name,
            self.shape,
            _number(self.milliseconds, ".3f") or self.absent,
            _number(self.bound, ".3f"),
            self.bound_by,
            _number(share, ".0%"),
            _number(self.error, ".1e"),
            "; ".join(others),
        ]


HEAD = ["", "shape", "ms", "bound, ms", "by", "bound/ours", "error", "our time over theirs"]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# -------------------------------------------------------------------------------------------------
# What is timed


def rotation(backend: str, backward: bool = False) -> Timed | str:
    if (state := rope_backends()[backend]) != "available":
        return state
    calls = Calls(DTYPE, SEQLEN, backend=backend)
    copy = {"copy_": calls.copy}
    if backward:
        return Timed(calls.backward, copy, error_of_tail(calls.exact_tail(inverse=True)))
    return Timed(calls.forward, {**calls.peers, **copy}, error_of_tail(calls.exact_tail()))


def permutation(backend: str) -> Timed | str:
    if (state := rope_backends()[backend]) != "available":
        return state
    qk, table = permute_inputs(DTYPE, SEQLEN), permutations()
    exact = permute_qk(*(x.double() for x in qk), table, backend="reference")
    error = error_of_tail([x[:, -64:] for x in exact])
    return Timed(functools.partial(permute_qk, *qk, table, backend=backend), error=error)


def causal(function: Callable, training: bool = False, **own) -> Timed:
    qkv = make_inputs(SEQLEN, HEADS_K, HEAD_DIM, DTYPE, HEADS_Q)
    freqs, attend = frequencies(HEAD_DIM), functools.partial(function, **own)

    def ours():
        return attend(*qkv, freqs, backend="triton")

    peers = plain_peers(*qkv, freqs)
    if not training:
        return Timed(ours, peers, error_of_tail([exact_tail(attend, *qkv, freqs)]))
    ours.leaves = qkv
    return Timed(trained({"ours": ours})["ours"], trained(peers))


def decode(factor: float) -> Timed:
    freqs = frequencies(HEAD_DIM)
    raw, rotated = caches(KEYS, DTYPE)
    options = {"freqs": freqs, "window": KEYS_WINDOW, "factor": factor, "backend": "triton"}
    attend = functools.partial(rerope_attention, window=KEYS_WINDOW, factor=factor)
    error = error_of_tail([exact_tail(attend, raw.q, *raw.contiguous(), freqs)])
    # Without a window a cache has its keys rotated.
    cache = replace(rotated, q=raw.q) if factor == 1.0 else raw
    peers = {**sdpa_calls(rotated.q, *rotated.contiguous()), **decode_peers(rotated)}
    return Timed(decode_paged(cache, **options), peers, error)


def merge() -> Timed:
    outs, lses = parts(SEQLEN, DTYPE)
    compiled = torch.compile(formula, dynamic=False)
    peers = {"compiled": functools.partial(compiled, outs, lses)}
    return Timed(functools.partial(merge_attention, outs, lses), peers, error_of(outs, lses))


def linear() -> Timed:
    qkv = make_inputs(SEQLEN, HEADS_K, HEAD_DIM, DTYPE, HEADS_Q)
    table = permutations()
    given = {"permutations": table, "backend": "triton"}
    return Timed(functools.partial(permuteformer_attention, *qkv, **given))


def attention(names: tuple[str, ...], variant: str, rotated: str = "") -> tuple:
    """Launches: into the frames, each kernel, and with gradients back out of them."""
    launches = [(f"attention {name}", variant) for name in names]
    into = [("attention rotate", rotated)] if rotated else []
    out = [("attention rotate", f"{rotated} inverse")] if rotated and "dq" in names else []
    return *into, *launches, *out


def timings() -> Iterator[Timing]:
    part, rotate = functools.partial, "halves forward"
    yield Timing("rotation, Triton", SIZES, (("rope triton", rotate),), part(rotation, "triton"))
    yield Timing("rotation, CUDA C++", SIZES, (("rope cuda", rotate),), part(rotation, "cuda"))
    yield Timing(
        "rotation backward, Triton",
        SIZES,
        (("rope triton", rotate),),
        part(rotation, "triton", backward=True),
    )
    plain, window = {"window": SEQLEN}, {"window": WINDOW}
    chunks = {"chunk_size": CHUNK, "local_window": LOCAL}
    for name, launches, function, own in (
        ("no window", attention(FORWARD, "R1"), rerope_attention, plain),
        ("ReRoPE", attention(FORWARD, "R2", "R2"), rerope_attention, window),
        ("dual chunk", attention(FORWARD, "R3", "R3"), dual_chunk_attention, chunks),
        ("LEX", attention(FORWARD, "R2 blocks"), blockwise_causal_attention, {"block_size": BLOCK}),
    ):
        yield Timing(f"attention, {name}", SIZES, launches, part(causal, function, **own))
    for name, launches, own in (
        ("no window", attention(BACKWARD, "R1"), plain),
        ("ReRoPE", attention(BACKWARD, "R2", "R2"), window),
    ):
        make = part(causal, rerope_attention, training=True, **own)
        yield Timing(f"attention with backward, {name}", SIZES, launches, make)
    for name, word, factor in (("RoPE", "plain", 1.0), ("ReRoPE", "raw", float("inf"))):
        launches = (("cache decode", f"{word} paged one-token"),)
        yield Timing(f"decode, {name}", CACHED, launches, part(decode, factor))
    two = f"2 of {SEQLEN} x {HEADS_Q} x {HEAD_DIM}"
    yield Timing("merge", two, (("merge triton", "two"),), merge)
    yield Timing("linear attention", SIZES, (), linear)
    for word, backend, launch in (
        ("Triton", "triton", ("permute rows triton", "")),
        ("CUDA C++", "cuda", ("permute cuda", "vectors")),
    ):
        yield Timing(f"permutation, {word}", SIZES, (launch,), part(permutation, backend))


# -------------------------------------------------------------------------------------------------
# The step


def run(deadline: Deadline) -> Verdict:
    return run_all(list(timings()), deadline)


def run_all(every: list[Timing], deadline: Deadline) -> Verdict:
    """Each kept as soon as it is measured: the next may be what the time is short for."""
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
    """Ours alone and with each peer in turn. What ours raises is kept, and fails the step."""
    result = Result(timing.name, timing.shape)
    found = bound(timing.launches, card_of(card), dtype_of(timing.launches))
    result.bound, result.bound_by = found or (None, "")
    try:
        made = timing.make()
        if isinstance(made, str):
            result.absent = made
            return result
        with torch.set_grad_enabled("backward" in timing.name):
            (result.milliseconds,) = paired(made.ours, repeats=15, seconds=SECONDS)
            result.error = made.error(made.ours()) if made.error else None
            for peer, call in made.peers.items():
                result.peers[peer] = beside(made.ours, call)
    except Exception as error:
        result.absent = f"FAILED {type(error).__name__}: {str(error).strip()[:200]}"
    return result


def beside(ours: Call, call: Call | str) -> dict[str, float] | str:
    """The peer's milliseconds, and our time over it, taken in turn; or why there are none."""
    if reason := call if isinstance(call, str) else why_not(call):
        return reason
    its, own = paired(call, ours, repeats=15, seconds=SECONDS)
    return {"milliseconds": its, "ours_over_it": own / its}


def dtype_of(launches: tuple[tuple[str, str], ...]) -> str:
    """The audit's permutations are of elements of 16 bits."""
    return "int16" if any(kernel.startswith("permute") for kernel, _ in launches) else "bfloat16"


def verdict(results: list[Result], asked: int, card: str) -> Verdict:
    measured = [one for one in results if one.milliseconds is not None]
    failed = [one for one in results if one.absent.startswith("FAILED")]
    line = f"{len(measured)} of {asked} rows measured, {len(failed)} failed"
    if card_of(card) is None:
        line += f"; the audit has no bounds for {card}"
    absent = {name: why for one in results for name, why in one.peers.items()
              if isinstance(why, str)}  # fmt: skip
    line += f"; not there: {', '.join(absent)}" if absent else ""
    table = {"head": HEAD, "rows": [one.cells() for one in results]}
    content = {"table": table, "rows": [asdict(one) for one in results], "absent": absent}
    return Verdict(len(results) == asked and not failed, line, content)
