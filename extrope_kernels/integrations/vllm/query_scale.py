"""Ministral 3's factor of queries, which vLLM reads in Mistral's own files alone.

Nothing here imports vLLM.
"""

from __future__ import annotations

from typing import Any

_BETA, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"


def adopt_query_scale(config: Any) -> None:
    """Name the factor of queries that rope_parameters state as vLLM's layers read it.

    1 + beta * ln(1 + floor(p / the original length)). Without it vLLM's logits are off past that
    length, and a method's with them.
    config: a VllmConfig with our entry, before vLLM completes it; changed in place.
    """
    text = None if config.model_config is None else config.model_config.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get(_BETA) and rope.get(_ORIGINAL) and not getattr(text, "llama_4_scaling", None):
        text.llama_4_scaling = {_ORIGINAL: rope[_ORIGINAL], "beta": rope[_BETA]}
