"""Triton's attention as functions of a call alone, without the ops and what they keep."""

from __future__ import annotations

from extrope_kernels.ops.attention import triton
from extrope_kernels.ops.decode import triton as decode_in_triton


def forward(*args):
    return triton.forward(*args, triton.forward_launches(*args))


def backward(*args):
    return triton.backward(*args, triton.backward_launches(*args))


def decode(*args):
    return decode_in_triton.decode(*args, decode_in_triton.decode_launches(*args))
