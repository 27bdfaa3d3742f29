"""The tuner's problems: a short one to check, a long one to time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from bench_attention import frequencies, make_inputs
from bench_decode import caches, decode_paged
from compare import trained
from harness import Call, paired
from shapes import HEADS_K, HEADS_Q, KEYS, KEYS_WINDOW, SEQLEN, WINDOW

from extrope_kernels import rope_attention, scores

from . import checks

DTYPE = torch.bfloat16
SHORT = {"seqlen_q": 256, "heads_q": 16, "heads_k": 4}  # small enough for float64
SECONDS = 2.0  # of timing


def problems(op: str, kernel: str, dim: int) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return a kernel's problems: one to check, one to time.

    A gradient's kernel is timed within forward and backward together: the other kernels are not
    forced.
    """
    if kernel == "one_token":
        sizes = {"heads_q": HEADS_Q, "heads_k": HEADS_K}
        check = partial(checks.check_decode, "rerope", "triton", DTYPE, 1, dim, **sizes)
        return check, partial(time, decode(dim), training=False)
    training = kernel != "forward"
    check = partial(checks.attention, "rerope", "triton", DTYPE, **SHORT, head_dim=dim)
    return check, partial(time, attention(dim, training), training=training)


def attention(dim: int, training: bool) -> Call:
    qkv, freqs = make_inputs(SEQLEN, HEADS_K, dim, DTYPE, HEADS_Q), frequencies(dim)

    def call():
        return rope_attention(*qkv, freqs, scores.rerope(WINDOW), backend="triton")

    call.leaves = qkv
    return trained({"call": call})["call"] if training else call


def decode(dim: int) -> Call:
    raw, _ = caches(KEYS, DTYPE, dim)
    return decode_paged(raw, scores.rerope(KEYS_WINDOW), "triton")


def time(call: Call, training: bool) -> float:
    with torch.set_grad_enabled(training):
        return paired(call, seconds=SECONDS)[0]
