"""Models trained with dual chunks: our score method takes over their configuration.

vLLM would build a rotary layer for a backend that it has removed. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._shared.parameters import DUAL_CHUNKS, score_values_in
from .settings import NAME

_TRAINED = "original_max_position_embeddings"


def adopt_dual_chunk_config(config: Any) -> bool:
    """Move a model's settings of dual chunks into additional_config; return True if moved.

    The entry's score gets the parameters that the user has not given; the model's key is deleted.
    config: a VllmConfig with our entry, before vLLM completes it; changed in place.
    """
    model = config.model_config
    if model is None or not getattr(model.hf_text_config, DUAL_CHUNKS, None):
        return False
    text, entry = model.hf_text_config, config.additional_config[NAME]
    score = entry.get("score") if isinstance(entry, Mapping) else None
    chunked = isinstance(score, Mapping) and score.get("method") == "dual_chunk"
    values = score_values_in(text, "dual_chunk")
    if chunked:
        entry = {**entry, "score": {**values, **score}}
        config.additional_config = {**config.additional_config, NAME: entry}
    if _TRAINED in values and not getattr(text, _TRAINED, None):
        setattr(text, _TRAINED, values[_TRAINED])
    for each in (text, model.hf_config):
        if hasattr(each, DUAL_CHUNKS):
            delattr(each, DUAL_CHUNKS)
    return chunked
