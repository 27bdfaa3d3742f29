"""Triton's attention as functions of a call alone, without the ops and what they keep."""

from __future__ import annotations

from extrope_kernels.ops.attention import triton


def forward(*args):
    return triton.forward(*args, triton.forward_launches(*args))


def backward(*args):
    return triton.backward(*args, triton.backward_launches(*args))


def decode(*args):
    return triton.decode(*args, triton.decode_launches(*args))
