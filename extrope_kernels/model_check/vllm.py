"""The rotation that vLLM builds of a configuration, if vLLM is installed."""

from __future__ import annotations

import copy
import importlib.util
import os
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from .. import RopeFreqs
from ..integrations.transformers.model import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NOT_INSTALLED = "vLLM is not installed: not checked"
_BY_LENGTH = ("dynamic", "yarn", "deepseek_yarn", "longrope")


def is_installed() -> bool:
    """Return True if vLLM can be imported; a folder of that name without files cannot."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def rotation(config: PreTrainedConfig, kind: str | None, dim: int) -> RopeFreqs | str:
    """Return vLLM's frequencies from `get_rope` for a kind of layers, or why not."""
    if not is_installed():
        return NOT_INSTALLED
    try:
        return _by_get_rope(copy.deepcopy(config), kind, dim)
    except Exception as error:  # vLLM may raise anything
        return f"fails: {shortened(error)}"


def _by_get_rope(config: Any, kind: str | None, dim: int) -> RopeFreqs:
    _import()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import patch_rope_parameters

    patch_rope_parameters(config)
    parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
    latent = getattr(config, "kv_lora_rank", None)
    if latent and parameters.get("rope_type", "default") != "default":
        parameters = {**parameters, "rope_type": "deepseek_yarn"}  # as its models with MLA do
    kind_of_rope = parameters.get("rope_type", "default")
    share = parameters.get("partial_rotary_factor", 1.0)
    longest = config.max_position_embeddings
    engine = VllmConfig()
    engine.model_config = SimpleNamespace(max_model_len=longest)  # as by default
    with set_current_vllm_config(engine):
        layer = get_rope(
            config.qk_rope_head_dim if latent else round(dim / share),
            longest if kind_of_rope in _BY_LENGTH else 2,  # or rows of its table
            rope_parameters=parameters,
            dtype=torch.float32,
            dual_chunk_attention_config=getattr(config, "dual_chunk_attention_config", None),
        )
    # Cosines and sines of positions 0 and 1, times the attention factor; no angle exceeds a radian.
    if hasattr(layer, "long_short_cos_sin_cache"):
        first = layer.original_max_position_embeddings if layer.use_long_rope else 0
        table = layer.long_short_cos_sin_cache[first:]
    else:
        table = layer.cos_sin_cache
    factor = float(table[0, 0])
    cos, sin = (table[1].double() / factor).chunk(2)
    return RopeFreqs(torch.atan2(sin, cos).float().sort(descending=True).values, factor)


@cache
def _import() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    import vllm  # noqa: F401
