"""What an engine's configuration rules out, said before the engine loads weights.

Nothing here imports vLLM: configurations are looked at by the names of their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import NAME, Settings

# Values by which configurations say that some layers do not rotate.
_NOT_ALL_ROTATE = (
    "layer_rope_theta",
    "no_rope_layer_interval",
    "no_rope_layers",
    "every_n_layers_nope",
    "no_rope_layer_indices",
    "position_layers",
    "use_rope_layers",
)
# By model_type: vLLM's rotary layer is not called by every layer, which its attention cannot see;
# or a norm with weights comes after it, so that logits depend on more than distances.
_UNFIT = {
    **dict.fromkeys(
        (
            *("afmoe", "beam", "cohere2", "cohere2_moe", "cohere_compass", "exaone4", "exaone_moe"),
            *("granitemoe", "granitemoehybrid", "llama4", "llama4_text", "muse_glimmer"),
            *("olmo_hybrid", "step3p5", "zamba2"),
        ),
        "all layers must rotate for a score method, got a model in which some may not",
    ),
    **dict.fromkeys(
        ("dory", "hunyuan_v1_dense", "hunyuan_v1_moe"),
        "queries and keys must not be normed after the rotation for a score method, got a model "
        "that does",
    ),
}
FP8 = ("fp8", "fp8_e4m3")  # vLLM's names of float8_e4m3fn caches
CACHES = ("auto", "float16", "bfloat16", *FP8)  # of all that a layer may have
# Drafters without a model of their own.
_DRAFTERS = ("ngram", "ngram_gpu", "suffix")


def check_config(settings: Settings, config: Any) -> None:
    """Raise ValueError for an engine, a VllmConfig, that the methods cannot be right in."""
    for wrong, reason in (*_for_all(config), *_for_scores(settings, config)):
        if wrong:
            raise ValueError(f"{NAME}: {reason}")


def _for_all(config: Any) -> list[tuple[Any, str]]:
    model, speculative = config.model_config, config.speculative_config
    parallel = config.parallel_config
    text = model.hf_text_config
    drafter = None if speculative is None else speculative.method
    return [
        (
            model.using_transformers_backend(),
            "the model must be one of vLLM's own, which rotate by vLLM's layer, got "
            f"{model.architecture} on its Transformers backend; there `extend` is the way",
        ),
        (model.use_mla, "latent attention (MLA) is not supported; `extend` serves it"),
        (
            model.is_encoder_decoder or model.runner_type != "generate",
            "the model must be a decoder that generates, got one with an encoder, or for pooling",
        ),
        (
            model.is_multimodal_model and getattr(parallel, "enable_elastic_ep", False),
            "elastic expert parallelism must be off for a model with encoders, which launches "
            "workers whose loaded model nobody hands on to plugins",
        ),
        (
            not _has_rotation(text),
            f"the model must rotate, got {model.architecture} without rope_parameters",
        ),
        (
            drafter is not None and drafter not in _DRAFTERS,
            f"drafts must come without a model (ngram, suffix), got {drafter}: its rotary layers "
            "would be extended too",
        ),
        (
            getattr(text, "dual_chunk_attention_config", None),
            "the model must not have vLLM's dual chunk attention; "
            'choose {"score": {"method": "dual_chunk", ...}}',
        ),
    ]


def _for_scores(settings: Settings, config: Any) -> list[tuple[Any, str]]:
    if settings.score is None:
        return []
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    text = model.hf_text_config
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    bidirectional = getattr(text, "is_causal", True) is False or model.is_mm_prefix_lm
    partly = [name for name in _NOT_ALL_ROTATE if getattr(text, name, None)]
    return [
        (
            model.uses_mrope,
            "tokens must have one position for a score method, got a model with several each "
            "(mRoPE)",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism must be off for a score method, whose ranks would hold parts "
            "of a sequence's keys",
        ),
        (
            cache.cache_dtype not in ("auto", _name_of(model.dtype), *FP8),
            f"kv_cache_dtype must be auto or fp8 for a score method, got {cache.cache_dtype}",
        ),
        (shared, "layers that reuse other layers' keys (KV sharing) are not supported"),
        (bidirectional, "a score method must be causal, got a model whose tokens see later ones"),
        (
            partly,
            "all layers must rotate for a score method, got a configuration with "
            + ", ".join(partly),
        ),
        (text.model_type in _UNFIT, f"{_UNFIT.get(text.model_type)} ({text.model_type})"),
    ]


def _has_rotation(text: Any) -> bool:
    parameters = getattr(text, "rope_parameters", None)
    return isinstance(parameters, Mapping) and bool(parameters)


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
