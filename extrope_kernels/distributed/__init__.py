"""Context parallelism: attention of a sequence whose tokens are spread over the ranks of a mesh."""

from . import dtensor  # noqa: F401  (registers sharding rules)
from .attention import rope_attention
from .layout import local_positions, shard, unshard

__all__ = ["local_positions", "rope_attention", "shard", "unshard"]
