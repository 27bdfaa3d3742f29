"""PermuteFormer's linear attention: O(seqlen), with a decay for each head."""

from . import fused, schema  # noqa: F401  (defines the ops)
from .api import PermuteFormerState, backends, permuteformer_attention, permuteformer_step

__all__ = ["PermuteFormerState", "backends", "permuteformer_attention", "permuteformer_step"]
