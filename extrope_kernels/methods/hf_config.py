"""Frequencies from a transformers configuration, without importing transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .._checks import check_choice, check_seq_len
from .._rope_types import ROPE_TYPES
from ._hf_axes import axial_by_default, axial_freqs, refuse_other_rotations, with_axes
from ._hf_source import NAME, Source, read
from .base import RopeFreqs
from .dynamic_ntk import dynamic_ntk
from .hf_lengths import is_replaced
from .llama3 import llama3
from .longrope import longrope
from .ntk_aware import ntk_aware
from .pi import pi
from .proportional import proportional
from .rope import rope
from .yarn import yarn


def from_hf_config(
    config: Any, seq_len: int | Tensor | None = None, *, layer_type: str | None = None
) -> RopeFreqs:
    """Return the frequencies that transformers' models compute from `config`.

    It reads `rope_parameters` (transformers 5) or else `rope_scaling` (transformers 4; its type
    under `rope_type` or `type`), and beside them `rope_theta`, `partial_rotary_factor`, `head_dim`
    (or `qk_rope_head_dim`, or `hidden_size` and `num_attention_heads`), `max_position_embeddings`
    and `original_max_position_embeddings`. Here every type heeds `partial_rotary_factor`; in some
    models the default type does not. It sets `axes` for `mrope_section` and for the type "axial",
    in the order of the model that `model_type` names. It does not read the pairing of the dims,
    nor DeepSeek's softmax scale.

    config: a transformers configuration (the text configuration of a multimodal one), or a mapping
        or object with the same names, such as a loaded config.json.
    seq_len: tokens in the sequence, an int or a tensor as in `dynamic_ntk` and `longrope`, for the
        rope types that depend on it. None means within the trained length.
    layer_type: the layer type to read, for example "full_attention", if the configuration has
        parameters per layer type. Ignored if one set serves all layers.

    Raises ValueError for an unsupported rope type, a model that rotates otherwise than its
    parameters say, a mapping with an old name that only the model's class reads, a missing or
    impossible value, or a missing or unknown layer_type; TypeError for a value of the wrong kind.
    """
    source = read(config, layer_type)
    if seq_len is not None:
        seq_len = check_seq_len(NAME, seq_len)
    rope_type = ROPE_TYPES[check_choice(NAME, "rope_type", source.rope_type, ROPE_TYPES)]
    refuse_other_rotations(source)
    return with_axes(_ADAPTERS[rope_type.method](source, seq_len), source)


def trained(config: Any, *, layer_type: str | None = None) -> RopeFreqs:
    """Return the frequencies that a model was trained with, from which a new method starts.

    A scaling of the types linear, llama3, longrope (its long set) and proportional is part of a
    training that ended at max_position_embeddings. Under yarn and dynamic, and under a linear that
    names its original length, a new factor replaces the old one: these give plain RoPE. What else a
    file says of its YaRN (truncate, betas, mscale) is for `yarn` beside the new factor, as `extend`
    passes it. `lengths` gives the length.

    config, layer_type: as for `from_hf_config`.

    Returns frequencies for `over` of the methods that scale, such as `methods.yarn`.
    Raises as `from_hf_config`.
    """
    source = read(config, layer_type)
    rope_type = ROPE_TYPES[check_choice(NAME, "rope_type", source.rope_type, ROPE_TYPES)]
    refuse_other_rotations(source)
    if is_replaced(source):
        return with_axes(rope(source.dim, base=source.base), source)
    longest = source.length if rope_type.by_length else None
    return with_axes(_ADAPTERS[rope_type.method](source, longest), source)


def _default(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    if axial_by_default(source):
        return axial_freqs(source)
    return rope(source.dim, base=source.base)


def _linear(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return pi(source.dim, factor=source.need("factor"), base=source.base)


def _dynamic(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    if (alpha := source.get("alpha")) is not None:  # HunYuan's, independent of the length
        return ntk_aware(source.dim, factor=alpha, base=source.base)
    length = source.length
    return dynamic_ntk(
        source.dim,
        factor=source.need("factor"),
        seq_len=length if seq_len is None else seq_len,
        max_position_embeddings=length,
        base=source.base,
    )


def _yarn(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    length = source.original_length
    factor = source.get("factor")
    return yarn(
        source.dim,
        factor=source.length / length if factor is None else factor,
        original_max_position_embeddings=length,
        base=source.base,
        **stated_yarn(source.parameters, source.nested),
    )


def stated_yarn(parameters: Mapping[str, Any], nested: bool) -> dict[str, Any]:
    """Return what rope_parameters say of YaRN beside factor, length and base, as `yarn` names it.

    A new factor leaves it as it is. nested: True if there are rope_parameters per layer type, in
    which transformers does not heed `truncate`.
    """
    names = ("attention_factor", "mscale", "mscale_all_dim")
    found = {name: parameters.get(name) for name in names}
    found |= {name: parameters.get(name) or None for name in ("beta_fast", "beta_slow")}
    if not nested and "truncate" in parameters:
        found["truncate"] = bool(parameters["truncate"])
    return {name: value for name, value in found.items() if value is not None}


def _longrope(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    length = source.original_length
    return longrope(
        source.dim,
        short_factor=source.need("short_factor"),
        long_factor=source.need("long_factor"),
        original_max_position_embeddings=length,
        seq_len=length if seq_len is None else seq_len,
        factor=source.get("factor"),
        max_position_embeddings=source.of_config("max_position_embeddings"),
        attention_factor=source.get("attention_factor"),
        base=source.base,
    )


def _llama3(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return llama3(
        source.dim,
        factor=source.need("factor"),
        original_max_position_embeddings=source.original_length,
        low_freq_factor=source.need("low_freq_factor"),
        high_freq_factor=source.need("high_freq_factor"),
        base=source.base,
    )


def _axial(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return axial_freqs(source)


def _proportional(source: Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return proportional(
        source.head_dim,
        partial_rotary_factor=source.share,
        base=source.base,
        factor=source.get("factor", 1.0),
    )


# By the method of a rope type.
_ADAPTERS: dict[str, Callable[[Source, int | Tensor | None], RopeFreqs]] = {
    "rope": _default,
    "axial": _axial,
    "pi": _linear,
    "dynamic_ntk": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
