"""`{"extrope": "auto"}`: an engine's method by the length that it serves.

Nothing here imports vLLM: an engine's configuration, a VllmConfig, is read by attribute names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from ...scores import SCORES
from .._shared.choice import choose_method
from .._shared.parameters import lengths_in, score_values_in
from .engine import make_engine
from .latent import as_stated
from .settings import AUTO, NAME, Settings, check_config, read_entry


def choose_entry(config: Any, check: Callable[[Any], object]) -> str | None:
    """Replace "auto" in additional_config by an entry for max_model_len; return what was chosen.

    None without "auto". config: a VllmConfig before vLLM completes it; changed in place.
    check: takes such a VllmConfig with an entry of ours; raises ValueError if it cannot be served.

    Raises ValueError for a model that no entry can serve.
    """
    if read_entry(config.additional_config) != AUTO or config.model_config is None:
        return None
    model = config.model_config
    text, length = as_stated(model.hf_text_config), model.max_model_len
    check_config(Settings("rope"), config)  # a model that no entry can serve
    if (known := lengths_in(text)) is None:
        raise ValueError(f"{NAME}: the model must name its max_position_embeddings, got none")
    chunks = score_values_in(text, "dual_chunk").keys() >= {"chunk_size", "local_window"}
    rerope = {"method": "rerope", "window": max(1, known.reach // 2)}
    refused = _refused(config, {"score": rerope}, check)
    choice = choose_method(length, known.trained, known.reach, refused=refused, chunks=chunks)
    if choice is None:
        config.additional_config = {k: v for k, v in config.additional_config.items() if k != NAME}
        reaches = f"the model, which reaches {known.reach}, as it is"
        return f"auto for max_model_len {length} leaves {reaches}"
    entry = {"method": choice.method, **choice.parameters}
    entry = {"score": entry} if choice.method in SCORES else entry
    config.additional_config = {**config.additional_config, NAME: entry}
    return f"auto for max_model_len {length} is {entry}: {choice.reason}"


def _refused(config: Any, entry: Mapping[str, Any], check: Callable[[Any], object]) -> str | None:
    """Return why an entry does not fit an engine; None if it does."""
    tried = copy.copy(config)
    tried.additional_config = {NAME: entry}
    try:
        check(tried)
        make_engine(tried)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix(f"{NAME}: ")
    return None
