"""Settings in `additional_config={"extrope": {...}}`, and checks against an engine's.

Errors come before the engine loads weights. Nothing here imports vLLM: configurations are read by
attribute names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..._names import not_among
from ...methods import METHODS
from ...scores import SCORES, Score
from .._shared.choice import NORMED_AFTER, SPARSE
from .._shared.parameters import bind_score, check_names, scale_from

NAME = "extrope"  # the entry in additional_config, and the beginning of errors
AUTO = "auto"  # an entry that leaves the choice to us
# Without methods by axes, whose positions are of images.
_METHODS = [name for name in METHODS if "axes" not in inspect.signature(METHODS[name]).parameters]
OURS = "a score method or a raw cache"  # the uses of our attention, in errors
# Names in configurations of models in which some layers do not rotate.
_NOT_ALL_ROTATE = (
    "layer_rope_theta",
    "no_rope_layer_interval",
    "no_rope_layers",
    "every_n_layers_nope",
    "no_rope_layer_indices",
    "position_layers",
    "use_rope_layers",
)
# By model_type: not every layer calls vLLM's rotary layer, which its attention cannot know; or a
# norm with weights comes after the rotation, so that logits depend on more than distances.
_UNFIT = {
    **dict.fromkeys(
        (
            *("afmoe", "beam", "cohere2", "cohere2_moe", "cohere_compass", "exaone4", "exaone_moe"),
            *("granitemoe", "granitemoehybrid", "llama4", "llama4_text", "muse_glimmer"),
            *("olmo_hybrid", "step3p5", "zamba2"),
        ),
        f"all layers must rotate for {OURS}, got a model in which some may not",
    ),
    **dict.fromkeys(
        NORMED_AFTER,
        f"queries and keys must not be normed after the rotation for {OURS}, got a model that does",
    ),
}
FP8 = ("fp8", "fp8_e4m3")  # vLLM's names of float8_e4m3fn caches
WIDE_CACHES = ("auto", "float16", "bfloat16")
CACHES = (*WIDE_CACHES, *FP8)  # those that we support
LARGEST_HEAD = 256  # dims of a head that our attention takes
# Drafters without their own model.
_DRAFTERS = ("ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True)
class Settings:
    """The methods of one engine.

    method: a frequency method, None for the model's own frequencies; parameters: the user's.
    score, log_n: for a score method; None for plain attention.
    scale_from: the length from which the logits of a score method grow (`query_scale.qwen_1m`).
    raw: keys are cached unrotated, and rotated at every forward.
    """

    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    score: Score | None = None
    log_n: float | None = None
    scale_from: int | None = None
    raw: bool = False

    @property
    def attends(self) -> bool:
        """True if attention is ours, not vLLM's; ours rotates too."""
        return self.raw or self.score is not None


def read_entry(additional_config: Any) -> Any:
    """Return our entry in an engine's additional_config; None without one."""
    return additional_config.get(NAME) if isinstance(additional_config, Mapping) else None


def read_settings(additional_config: Any) -> Settings | None:
    """Return the settings in an engine's additional_config; None without an entry of ours.

    Raises ValueError or TypeError for settings that fit no model.
    """
    entry = read_entry(additional_config)
    if entry is None:
        return None
    asked = isinstance(entry, Mapping) and (entry.get("method"), entry.get("score"))
    if not asked or asked == (None, None):
        raise ValueError(
            f"{NAME}: additional_config must have a method, a score or both, or {AUTO!r} under "
            f"{NAME!r}, got {entry!r}"
        )
    parameters = dict(entry)
    method, score = parameters.pop("method", None), parameters.pop("score", None)
    if (cache := parameters.pop("cache", None)) not in (None, "raw"):
        raise ValueError(f"{NAME}: cache must be 'raw' or left out, got {cache!r}")
    if method is None and parameters:
        raise ValueError(f"{NAME}: {next(iter(parameters))} must come with a method, got none")
    if method is not None:
        if method in tuple(SCORES):
            entry = {"score": {"method": method, **parameters}}
            raise ValueError(f"{NAME}: {method} is a score method and must come as {entry}")
        if method not in _METHODS:
            raise ValueError(f"{NAME}: {not_among('method', method, _METHODS)}")
        check_names(NAME, method, parameters, None)
    return Settings(method, parameters, *_read_score(score), cache is not None)


def describe(additional_config: Mapping[str, Any]) -> str:
    """Return an engine's methods in words: `rerope window=2048 over yarn factor=4.0`."""
    entry = dict(additional_config[NAME])
    cache = entry.pop("cache", None)
    said = [dict(each) for each in (entry.pop("score", None), entry) if each]
    methods = " over ".join(
        " ".join([each.pop("method"), *(f"{name}={value}" for name, value in each.items())])
        for each in said
        if each.get("method")
    )
    return methods if cache is None else f"{methods}, keys cached {cache}"


def _read_score(entry: Any) -> tuple[Score | None, float | None, int | None]:
    if entry is None:
        return None, None, None
    method = entry.get("method") if isinstance(entry, Mapping) else None
    if method is None:
        raise ValueError(f"{NAME}: score must have a method and its parameters, got {entry!r}")
    if method not in tuple(SCORES):
        if method in _METHODS:
            raise ValueError(
                f"{NAME}: {method} is a frequency method and must come as "
                f"{{'method': {method!r}, ...}}, not under score"
            )
        raise ValueError(f"{NAME}: {not_among('score', method, SCORES)}")
    parameters = dict(entry)
    with reprefix_error():
        score, log_n = bind_score(NAME, parameters.pop("method"), parameters)
    return score, log_n, scale_from(NAME, parameters)


@contextmanager
def reprefix_error() -> Iterator[None]:
    """Make errors of methods begin like all of the plugin's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith(f"{NAME}: "):
            raise
        raise type(error)(f"{NAME}: {error}") from error


def rotations(text: Any) -> list[tuple[str | None, Mapping[str, Any]]]:
    """Return a model's rope_parameters by kind of layers; the kind None if it has only one."""
    kinds = [(k, v) for k, v in text.rope_parameters.items() if isinstance(v, Mapping)]
    return kinds or [(None, text.rope_parameters)]


def check_config(settings: Settings, config: Any) -> None:
    """Raise ValueError for a VllmConfig in which the methods would not compute rightly."""
    for wrong, reason in (*_for_all(config), *_for_attention(settings, config)):
        if wrong:
            raise ValueError(f"{NAME}: {reason}")


def _for_all(config: Any) -> list[tuple[Any, str]]:
    model, speculative = config.model_config, config.speculative_config
    parallel = config.parallel_config
    text = model.hf_text_config
    drafter = None if speculative is None else speculative.method
    sparse = [name for name in SPARSE if getattr(text, name, None)]
    return [
        (
            model.using_transformers_backend(),
            "the model must be one of vLLM's own, which rotate by vLLM's layer, got "
            f"{model.architecture} on its Transformers backend; there `extend` is the way",
        ),
        (
            sparse,
            f"attention must not be sparse, got {model.architecture} with an indexer, whose own "
            f"steps read vLLM's table: {', '.join(sparse)}",
        ),
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
            not has_rotation(text),
            f"the model must rotate, got {model.architecture} without rope_parameters",
        ),
        (
            drafter is not None and drafter not in _DRAFTERS,
            f"drafts must come without a model (ngram, suffix), got {drafter}: its rotary layers "
            "would be extended too",
        ),
    ]


def _for_attention(settings: Settings, config: Any) -> list[tuple[Any, str]]:
    if not settings.attends:
        return []
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    text = model.hf_text_config
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    bidirectional = getattr(text, "is_causal", True) is False or model.is_mm_prefix_lm
    partly = [name for name in _NOT_ALL_ROTATE if getattr(text, name, None)]
    return [
        (
            model.uses_mrope and model.supports_multimodal_inputs,
            f"tokens must have one position for {OURS}, got a model with several each (mRoPE); "
            "text alone has one: --language-model-only, or --limit-mm-per-prompt with 0 for each "
            "kind, and no --enable-mm-embeds",
        ),
        (
            getattr(text, "kv_lora_rank", None) is not None,
            f"keys must be cached whole for {OURS}, got latent attention (MLA); `extend` serves it",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            f"context parallelism must be off for {OURS}, whose ranks would hold parts of a "
            "sequence's keys",
        ),
        (
            cache.cache_dtype not in ("auto", _name_of(model.dtype), *FP8),
            f"kv_cache_dtype must be auto or fp8 for {OURS}, got {cache.cache_dtype}",
        ),
        (shared, "layers that reuse other layers' keys (KV sharing) are not supported"),
        (bidirectional, f"{OURS} must be causal, got a model whose tokens see later ones"),
        (
            getattr(model, "rswa_window", None),
            f"tokens must see all earlier ones for {OURS}, or those of a sliding window, "
            "got a model in which they see the prompt and a window (R-SWA)",
        ),
        (
            # vLLM's value, set if all layers have a window; if only some do, those have it.
            settings.score and getattr(cache, "sliding_window", None),
            "some layers must have no sliding window for a score method, got a model all of whose "
            "layers have one",
        ),
        (
            partly,
            f"all layers must rotate for {OURS}, got a configuration with " + ", ".join(partly),
        ),
        (text.model_type in _UNFIT, f"{_UNFIT.get(text.model_type)} ({text.model_type})"),
        (
            settings.method is None and _scales_some(text),
            f"all layers must rotate alike for {OURS}, got a scaling for rope_scaling_layers "
            "alone; a method replaces it in all",
        ),
    ]


def takes_head(head_size: int) -> bool:
    """Return True if our attention takes heads of this size."""
    return head_size % 8 == 0 and head_size <= LARGEST_HEAD


def has_rotation(text: Any) -> bool:
    """Return True if a text configuration has rope_parameters."""
    parameters = getattr(text, "rope_parameters", None)
    return isinstance(parameters, Mapping) and bool(parameters)


def _scales_some(text: Any) -> bool:
    """Return True if a scaling is for some layers (Molmo 2), whose kinds have no names."""
    layers = getattr(text, "rope_scaling_layers", None)
    if layers is None or len(set(layers)) == text.num_hidden_layers:
        return False
    return text.rope_parameters.get("rope_type", "default") != "default"


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
