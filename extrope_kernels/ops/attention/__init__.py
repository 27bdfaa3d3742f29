"""Attention with rotation by an optional score method."""

from . import op  # noqa: F401  (defines the ops)
from .api import BACKENDS, backends, missing, rope_attention
from .call import (
    AttentionCall,
    Rotated,
    check_attention,
    check_given,
    check_log_n,
    check_numbers,
    check_rotated,
    make_call,
)
from .decay import check_decay
from .log_n import scaled_by_log_n
from .merge import merge_attention
from .op import backward, forward, grad_of_sinks, selection

__all__ = [
    "BACKENDS",
    "AttentionCall",
    "Rotated",
    "backends",
    "backward",
    "check_attention",
    "check_decay",
    "check_given",
    "check_log_n",
    "check_numbers",
    "check_rotated",
    "forward",
    "grad_of_sinks",
    "make_call",
    "merge_attention",
    "missing",
    "rope_attention",
    "scaled_by_log_n",
    "selection",
]
