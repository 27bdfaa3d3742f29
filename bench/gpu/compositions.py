"""Attention composed from calls of flash-attn beside Triton's kernels, where the choice between
them is an estimate: at half and twice the length of each such row of attention's select_backend.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from bench_attention import exact_tail, frequencies, make_inputs
from compare import error_of_tail, trained
from shapes import HEADS_K, HEADS_Q, WINDOW

from extrope_kernels import rope_attention, scores
from extrope_kernels.ops.attention.flash_attn.engine_check import unusable
from extrope_kernels.ops.attention.flash_attn.engines import ENGINES
from extrope_kernels.ops.attention.select_backend import TABLE

from .rows import DTYPE, Timed, Timing, run_all
from .step import Deadline, Verdict

HEAD_DIMS = (64, 128, 256)  # of models; a row may go up to what is between them
Missing = Callable[[str, int], str | None]  # of an engine and a head_dim


def run(deadline: Deadline) -> Verdict:
    major = torch.cuda.get_device_capability()[0]
    every = list(timings(major, missing))
    if not every:
        line = f"nothing was run: no choice on compute capability {major}.x is an estimate"
        return Verdict(True, line)
    verdict = run_all(every, deadline)
    absent = dict.fromkeys(row["absent"] for row in verdict.content["rows"])
    reasons = [why for why in absent if why and not why.startswith("FAILED")]
    verdict.line += f"; left out: {'; '.join(reasons)}" if reasons else ""
    return verdict


def missing(engine: str, head_dim: int) -> str | None:
    """Why an engine cannot run here, None where it can."""
    device = torch.device("cuda", torch.cuda.current_device())
    (found,) = (one for one in ENGINES if one.name == engine)
    return unusable(found, device, DTYPE, head_dim)


def timings(major: int, missing: Missing) -> Iterator[Timing]:
    for row in TABLE:
        if row.major != major or not row.estimate:
            continue
        dim = max(dim for dim in HEAD_DIMS if dim <= row.head_dim)
        reasons = {engine: missing(engine, dim) for engine in row.engines}
        engine = next((engine for engine, why in reasons.items() if why is None), None)
        for seqlen, training in product((row.seqlen // 2, 2 * row.seqlen), (False, True)):
            name = f"{engine or ' or '.join(reasons)}{' with backward' * training}"
            shape = f"{seqlen} x {HEADS_Q}/{HEADS_K} x {dim}"
            make = partial(composed, dim, seqlen, training)
            why = "; ".join(filter(None, reasons.values()))
            yield Timing(f"over {name}", shape, (), make if engine else partial(str, why))


def composed(dim: int, seqlen: int, training: bool) -> Timed:
    """ReRoPE, two regions, over the best engine that is here; the peer is what Triton takes."""
    qkv, freqs = make_inputs(seqlen, HEADS_K, dim, DTYPE, HEADS_Q), frequencies(dim)
    score, calls = scores.rerope(WINDOW), {}
    for backend in ("flash_attn", "triton"):
        calls[backend] = partial(rope_attention, *qkv, freqs, score, backend=backend)
        calls[backend].leaves = qkv
    if training:
        calls = trained(calls)
        return Timed(calls.pop("flash_attn"), calls)
    error = error_of_tail([exact_tail(score, *qkv, freqs)])
    return Timed(calls.pop("flash_attn"), calls, error)
