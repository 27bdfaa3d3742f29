"""Fused kernels that let a transformer with rotary positions read past its training length."""

from . import methods, positions, scores
from .methods import RopeFreqs
from .ops.attention import (
    blockwise_causal_attention,
    dual_chunk_attention,
    merge_attention,
    rerope_attention,
    string_attention,
)
from .ops.decode import (
    blockwise_causal_attention_with_kvcache,
    dual_chunk_attention_with_kvcache,
    rerope_attention_with_kvcache,
    string_attention_with_kvcache,
)
from .ops.permuteformer import (
    PermuteFormerState,
    head_permutations,
    permute,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
)
from .ops.rope import apply_rope, apply_rope_qk, rope_append_kvcache

__version__ = "0.2.0"
__all__ = [
    "PermuteFormerState",
    "RopeFreqs",
    "apply_rope",
    "apply_rope_qk",
    "blockwise_causal_attention",
    "blockwise_causal_attention_with_kvcache",
    "dual_chunk_attention",
    "dual_chunk_attention_with_kvcache",
    "head_permutations",
    "merge_attention",
    "methods",
    "permute",
    "permute_qk",
    "permuteformer_attention",
    "permuteformer_step",
    "positions",
    "rerope_attention",
    "rerope_attention_with_kvcache",
    "rope_append_kvcache",
    "scores",
    "string_attention",
    "string_attention_with_kvcache",
]
