"""The lengths of a model, from its transformers configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .._checks import check_length, check_real
from .._rope_types import rope_type
from ._hf_source import Source, is_bounded, layer_types_in, read, stray

_LONGEST, _ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
_CHUNKS = "dual_chunk_attention_config"  # of Qwen2.5-1M, which transformers does not read


class Lengths(NamedTuple):
    """Lengths of a model in tokens, and where the first stands: see `lengths`."""

    trained: int
    unscaled: int
    reach: int
    origin: str


def lengths(config: Any, layer_type: str | None = None) -> Lengths:
    """Return the lengths of a model: its training's, and what it reaches as it is.

    A training under a scaling (linear, llama3, longrope, proportional) ended at
    max_position_embeddings. A scaling that came after it (yarn, dynamic, a linear that names its
    original length) names the trained length, and reaches further. What only other programs read
    (dual_chunk_attention_config) adds nothing to the reach, nor do rope parameters beside those of
    the layer types, which nothing reads.

    config: as for `from_hf_config`; it need not tell sizes of heads.
    layer_type: as for `from_hf_config`. If None, the first that sees all keys counts.

    Returns (trained, unscaled, reach, origin): the tokens of the training, with the frequencies of
    `trained`; those before any scaling, in the training or after it; those that the model reads as
    it is, with the scaling that its configuration states; the key that names the first.
    Raises ValueError for a configuration that names no length, or one that is no number of tokens.
    """
    source = read(config, _widest(config) if layer_type is None else layer_type)
    if (longest := source.of_config(_LONGEST)) is None:
        raise ValueError(f"lengths: {_LONGEST} must be given, got None")
    longest = check_length("lengths", _LONGEST, longest)
    original, origin = _original(source)
    unscaled = longest if original is None else check_length("lengths", _ORIGINAL, original)
    trained = unscaled
    scales = rope_type(source.rope_type).scaling is not None
    if scales and not is_replaced(source):
        trained, origin = longest, _LONGEST
    elif not scales and unscaled > longest:  # a key that nothing reads
        trained, unscaled, origin = longest, longest, _LONGEST
    if strays := stray(config):
        if (told := strays.get(_ORIGINAL)) is not None:  # tells of the training all the same
            trained = unscaled = min(trained, check_length("lengths", _ORIGINAL, told))
            origin = f"{_ORIGINAL} in rope_parameters"
        return Lengths(trained, unscaled, trained, origin)
    if {"chunk_size", "local_size"} <= set(source.of_config(_CHUNKS) or ()):
        return Lengths(trained, unscaled, trained, origin)
    factor = source.get("factor", 1.0) if source.rope_type == "yarn" else 1.0
    stretched = int(trained * check_real("lengths", "factor", factor))
    return Lengths(trained, unscaled, max(longest, trained, stretched), origin)


def is_replaced(source: Source) -> bool:
    """Return True for a scaling that came after a training: a new factor replaces it."""
    if source.rope_type == "linear":
        return source.original_length < source.length
    if source.rope_type == "dynamic" and source.get("alpha") is not None:
        return False  # HunYuan's is a trained base
    return rope_type(source.rope_type).scaling == "replaced"


def _widest(config: Any) -> str | None:
    kinds = layer_types_in(config)
    return next((kind for kind in kinds if not is_bounded(kind)), kinds[0] if kinds else None)


def _original(source: Source) -> tuple[Any, str]:
    """Return the original length that a configuration names, or None, and by which key."""
    beside = source.of_config(_ORIGINAL)
    if (named := source.get(_ORIGINAL, beside)) is not None:
        if named == beside:
            return named, _ORIGINAL
        where = "rope_parameters" if source.of_config("rope_parameters") else "rope_scaling"
        return named, f"{_ORIGINAL} in {where}"
    chunks = source.of_config(_CHUNKS)
    named = chunks.get(_ORIGINAL) if isinstance(chunks, Mapping) else None
    return (named, f"{_ORIGINAL} in {_CHUNKS}") if named else (None, _LONGEST)
