"""Fused kernels that let a transformer with rotary positions read past its training length.

    from extrope_kernels import apply_rope_qk, extend, methods, rope_attention, scores

    handle = extend(model, "rerope", window=2048)  # a model of transformers; handle.restore()
    freqs = methods.yarn(128, factor=4.0, original_max_position_embeddings=4096)
    q, k = apply_rope_qk(q, k, freqs)  # (batch, seqlen, heads, head_dim)
    out = rope_attention(q, k, v, freqs, scores.rerope(window=2048))  # unrotated q and k

`methods` changes frequencies, `positions` the positions of tokens, `scores` the distances that
pairs of tokens see. The ops are `torch.ops.extrope.*`. On a command line: `extrope --help`.
"""

import importlib
from typing import Any

from . import methods, positions, scores
from ._names import no_attribute
from .methods import RopeFreqs
from .ops.attention import merge_attention, rope_attention
from .ops.cache import rope_append_kvcache
from .ops.decode import rope_attention_with_kvcache
from .ops.permuteformer import (
    PermuteFormerState,
    head_permutations,
    permute,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
)
from .ops.rope import apply_rope, apply_rope_qk

__version__ = "0.3.0"


# Loaded on first use: they import much more.
_LATE = {
    "check": "model_check.loaded",
    "extend": "integrations.transformers",
    "restore": "integrations.transformers",
}


def __getattr__(name: str) -> Any:
    """Load what is in `_LATE`; say where another name is, or what was meant."""
    if name in _LATE:
        return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    raise no_attribute(__name__, name, __all__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})


__all__ = [
    "PermuteFormerState",
    "RopeFreqs",
    "apply_rope",
    "apply_rope_qk",
    "check",
    "extend",
    "head_permutations",
    "merge_attention",
    "methods",
    "permute",
    "permute_qk",
    "permuteformer_attention",
    "permuteformer_step",
    "positions",
    "restore",
    "rope_append_kvcache",
    "rope_attention",
    "rope_attention_with_kvcache",
    "scores",
]
