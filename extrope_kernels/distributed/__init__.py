"""Context parallelism: attention of a sequence whose tokens are spread over the ranks of a mesh."""

from . import dtensor  # noqa: F401  (registers sharding rules)
from .attend import attend
from .attention import (
    blockwise_causal_attention,
    dual_chunk_attention,
    rerope_attention,
    string_attention,
)
from .layout import local_positions, shard, unshard
from .linear import permuteformer_attention

__all__ = [
    "attend",
    "blockwise_causal_attention",
    "dual_chunk_attention",
    "local_positions",
    "permuteformer_attention",
    "rerope_attention",
    "shard",
    "string_attention",
    "unshard",
]
