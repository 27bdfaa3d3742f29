"""Models that were trained with dual chunks: vLLM's part of their configuration, left to ours.

vLLM would build the rotary layer of a backend that it has no more. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._shared.parameters import DUAL_CHUNKS, score_values_in
from .settings import NAME

_TRAINED = "original_max_position_embeddings"


def take_over(config: Any) -> bool:
    """Move what a model says of its dual chunks into additional_config; say whether it did.

    The entry's score gets the parameters that the user has not given, and the model loses the key.
    config: a VllmConfig with an entry of ours, before vLLM completes it; changed in place.
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
