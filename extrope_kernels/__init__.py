"""Fused kernels that let a transformer with rotary positions read past its training length."""

from . import methods, positions, scores
from .methods import RopeFreqs
from .ops.attention import merge_attention, rope_attention, rope_attention_with_kvcache
from .ops.linear_attention import (
    PermuteFormerState,
    permuteformer_attention,
    permuteformer_step,
)
from .ops.permute import head_permutations, permute, permute_qk
from .ops.rope import apply_rope, apply_rope_qk, rope_append_kvcache

__version__ = "0.3.0"
__all__ = [
    "PermuteFormerState",
    "RopeFreqs",
    "apply_rope",
    "apply_rope_qk",
    "head_permutations",
    "merge_attention",
    "methods",
    "permute",
    "permute_qk",
    "permuteformer_attention",
    "permuteformer_step",
    "positions",
    "rope_append_kvcache",
    "rope_attention",
    "rope_attention_with_kvcache",
    "scores",
]
