"""Latent attention (DeepSeek, Kimi, GLM): its softmax scale follows an engine's method.

vLLM's layers multiply their softmax scale by the square of YaRN's mscale, which they read from the
configuration when they are built. So the configuration gets the method first, and vLLM applies
the model's own rule to it. Nothing here imports vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .._shared.parameters import PARAMETERS, lengths_in, trained_in
from .settings import NAME, has_rotation, read_settings

_MSCALES = ("mscale", "mscale_all_dim")
_TRAINED = "original_max_position_embeddings"
# vLLM's names of yarn in such models; it writes them into the configuration, too.
_YARN = ("deepseek_yarn", "deepseek_llama_scaling")


def has_latents(text: Any) -> bool:
    """Return True for a model that caches latents in place of keys."""
    return getattr(text, "kv_lora_rank", None) is not None


def mscales_in(text: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's parameters of YaRN that its softmax scale depends on; none for most."""
    found = {name: parameters.get(name) for name in _MSCALES if has_latents(text)}
    return {name: value for name, value in found.items() if value is not None}


def adopt_scaling(config: Any) -> None:
    """Write an engine's method into the rope_parameters of a model with latent attention.

    YaRN comes with the model's mscale and mscale_all_dim, unless the entry gives others. Any other
    method brings its own amplitude, so plain RoPE is written, and the scale is 1 / sqrt(head_dim).
    `extend` does the same.
    config: a VllmConfig with our entry, before vLLM completes it; changed in place.

    Raises ValueError for a method whose temperature the scale cannot follow.
    """
    settings, model = read_settings(config.additional_config), config.model_config
    text = None if model is None else model.hf_text_config
    if not has_latents(text) or not has_rotation(text) or settings.method is None:
        return
    old, given = text.rope_parameters, settings.parameters
    mscales = mscales_in(text, {**old, **given})
    stated = as_stated(text)
    scaled = trained_in(stated, None, stated.rope_parameters, text.qk_rope_head_dim)
    follows = set(_MSCALES) <= set(PARAMETERS[settings.method])
    if follows and mscales.get("mscale_all_dim") and ("factor" not in given or scaled):
        raise ValueError(
            f"{NAME}: mscale_all_dim must be 0 for {settings.method} of {model.architecture}, "
            f"whose softmax scale cannot follow it, got {mscales['mscale_all_dim']}"
        )
    if scaled:  # a scaling without a temperature (MiniCPM3), which stays below
        return
    new = {k: v for k, v in old.items() if k not in ("rope_type", "type", "factor", *_MSCALES)}
    new["rope_type"] = "default"
    if follows and "factor" in given:
        known = lengths_in(stated)
        trained = given.get(_TRAINED, known and known.unscaled)
        new |= {"rope_type": _YARN[0], "factor": given["factor"], _TRAINED: trained, **mscales}
    text.rope_parameters = new


def as_stated(text: Any) -> Any:
    """Return a text configuration with vLLM's names of yarn replaced by transformers'."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in _YARN:
        return text
    text = copy.copy(text)
    text.rope_parameters = {**parameters, "rope_type": "yarn"}
    return text
