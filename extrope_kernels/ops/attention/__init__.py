"""Attention that changes which relative position a query and a key see."""

from .._shared.attention_checks import check_log_n
from . import schema  # noqa: F401  (defines the ops)
from .api import attend, backends
from .blocks import BlockCall, block_backward, block_call, block_forward, check_block, grad_of_sinks
from .blockwise_causal import blockwise_causal_attention
from .choice import choices
from .dual_chunk import dual_chunk_attention
from .merge import merge_attention
from .rerope import rerope_attention
from .string import string_attention

__all__ = [
    "BlockCall",
    "attend",
    "backends",
    "block_backward",
    "block_call",
    "block_forward",
    "blockwise_causal_attention",
    "check_block",
    "check_log_n",
    "choices",
    "dual_chunk_attention",
    "grad_of_sinks",
    "merge_attention",
    "rerope_attention",
    "string_attention",
]
