"""Messages of a starting engine: its methods, and likely mistakes.

Nothing here imports vLLM.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from .._shared.parameters import PARAMETERS, is_bounded, lengths_in, window_of
from .._shared.saved import length_of
from .latent import as_stated
from .settings import NAME, Settings, describe, read_entry, rotations

_TRAINED, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"
_SHARED_KEYS = (
    "what kv_transfer_config stores or sends must stay among engines of this same entry: vLLM "
    "tells keys apart by the model and the tokens alone"
)


def summary(settings: Settings, config: Any) -> str:
    """Return the methods of a VllmConfig and the numbers they start from, in one line."""
    model = config.model_config
    text = model.hf_text_config
    kinds = [kind for kind in rotations(text) if not is_bounded(kind[0] or "")]
    trained = {_trained_length(settings, text, kind) for kind, _ in kinds}
    bases = {float(parameters.get("rope_theta", 10000.0)) for _, parameters in kinds}
    return (
        f"{describe(config.additional_config)} (trained length {_listed(trained)}, "
        f"base {_listed(bases)}, max_model_len {model.max_model_len})"
    )


def warnings_for(config: Any, settings: Settings | None) -> Iterator[str]:
    """Yield likely mistakes in a VllmConfig that works."""
    if settings is None:
        return
    factor = settings.parameters.get("factor")
    # In dynamic NTK the factor is the base's rate of growth.
    if isinstance(factor, (int, float)) and factor < 1 and settings.method != "dynamic_ntk":
        yield f"factor {factor:g} of {settings.method} is below 1: it shortens what a model reads"
    yield from _overridden(settings, config.model_config)
    yield from _longer_than(settings, config)
    if config.kv_transfer_config is not None:
        yield _SHARED_KEYS


def near_misses(additional_config: Any) -> Iterator[str]:
    """Yield keys that are almost that of our entry, where there is none."""
    if not isinstance(additional_config, Mapping) or NAME in additional_config:
        return
    for key in additional_config:
        name = str(key).lower()
        if name.startswith(NAME) or difflib.get_close_matches(NAME, [name], cutoff=0.8):
            yield f"additional_config has {key!r}, which nobody reads; methods go under {NAME!r}"


def _longer_than(settings: Settings, config: Any) -> Iterator[str]:
    """Warn of requests past what the methods reach, and of those that a score never changes."""
    longest = config.model_config.max_model_len
    text = as_stated(config.model_config.hf_text_config)
    score = read_entry(config.additional_config).get("score")
    kinds = [kind for kind, _ in rotations(text) if not is_bounded(kind or "")]
    reached = [each for kind in kinds if (each := _reach(settings, score, text, kind)) is not None]
    method = settings.method if score is None else score["method"]
    if reached and longest > (reach := min(reached)):
        yield f"max_model_len {longest:,} goes past the {reach:,} tokens that {method} reaches"
    window = None if score is None else window_of(score["method"], score)
    if window is not None and window[1] >= longest:
        yield (
            f"{window[0]} {window[1]:,} of {method} leaves nothing extended: "
            f"max_model_len is {longest:,}"
        )


def _reach(
    settings: Settings, score: Mapping[str, Any] | None, text: Any, kind: str | None
) -> int | None:
    """Return the tokens that the methods reach; None if they set no end, or do not say it."""
    known = lengths_in(text, kind)
    reach = None if known is None else known.reach
    if settings.method is not None:
        stretches = settings.parameters.get("factor", 1) > 1
        values = {**settings.parameters, _TRAINED: _trained_length(settings, text, kind)}
        reach = length_of(settings.method, values) if stretches else None
    if score is None:
        return None if settings.method is None else reach
    return length_of(score["method"], {**score, _LONGEST: reach})


def _overridden(settings: Settings, model: Any) -> Iterator[str]:
    """Warn of an override of the longest position, which methods take for the trained length."""
    overrides = getattr(model, "hf_overrides", None)
    if not isinstance(overrides, Mapping) or settings.method is None:
        return
    parts = [overrides, *(part for part in overrides.values() if isinstance(part, Mapping))]
    longest = next((part[_LONGEST] for part in parts if _LONGEST in part), None)
    name, text = _counts_from(settings.method), model.hf_text_config
    if longest is None or name is None:
        return
    lengths = {_trained_length(settings, text, kind) for kind, _ in rotations(text)}
    if name not in settings.parameters and longest in lengths:
        yield (
            f"hf_overrides makes {_LONGEST} {longest}, which {settings.method} takes for the "
            f"trained length; leave it out, as max_model_len may be longer, or give {name} beside "
            "the method"
        )


def _counts_from(method: str) -> str | None:
    """Return the name of a method's parameter for the trained length."""
    return next((name for name in (_TRAINED, _LONGEST) if name in PARAMETERS[method]), None)


def _trained_length(settings: Settings, text: Any, kind: str | None) -> Any:
    """Return the length that a method counts from: that given, else the model's."""
    name = settings.method and _counts_from(settings.method)
    if name in settings.parameters or (known := lengths_in(as_stated(text), kind)) is None:
        return settings.parameters.get(name)
    over = settings.method is None or "over" in PARAMETERS[settings.method]
    return known.trained if over else known.unscaled


def _listed(numbers: set[Any]) -> str:
    return " and ".join(f"{number:.15g}" for number in sorted(numbers - {None})) or "unknown"
