"""Frequencies from a transformers configuration, without importing transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from .._checks import check_choice, check_length, check_real, check_seq_len
from .base import RopeFreqs
from .dynamic_ntk import dynamic_ntk
from .llama3 import llama3
from .longrope import longrope
from .pi import pi
from .proportional import proportional
from .rope import rope
from .yarn import yarn

_NAME = "from_hf_config"


def from_hf_config(
    config: Any, seq_len: int | Tensor | None = None, *, layer_type: str | None = None
) -> RopeFreqs:
    """Return the frequencies that transformers' models compute from `config`.

    Read are `rope_parameters` (transformers 5) or else `rope_scaling` (transformers 4; its type
    under `rope_type` or `type`), and beside them `rope_theta`, `partial_rotary_factor`, `head_dim`
    (or `qk_rope_head_dim`, or `hidden_size` and `num_attention_heads`), `max_position_embeddings`
    and `original_max_position_embeddings`. Models differ in whether the default type heeds
    `partial_rotary_factor`; here every type does. Not read are the pairing of the dims and
    DeepSeek's softmax scale.

    config: a transformers configuration (the text configuration of a multimodal one), or a mapping
        or object with the same names, such as a loaded config.json.
    seq_len: tokens in the sequence, an int or a tensor as in `dynamic_ntk` and `longrope`, for the
        rope types that depend on it. None means within the trained length.
    layer_type: which parameters to read, for example "full_attention", when the configuration has
        them per layer type. Ignored when one set serves all layers.

    Raises ValueError for a rope type that is not supported, a missing or impossible value, or a
    layer_type that is needed and absent or unknown; TypeError for a value of the wrong kind.
    """
    source = _read(config, layer_type)
    if seq_len is not None:
        seq_len = check_seq_len(_NAME, seq_len)
    rope_type = check_choice(_NAME, "rope_type", source.rope_type, _ADAPTERS)
    return _ADAPTERS[rope_type](source, seq_len)


@dataclass(frozen=True)
class _Source:
    """The rope parameters of one layer type, beside the configuration they belong to."""

    config: Any
    parameters: Mapping[str, Any]
    head_dim: int

    def get(self, name: str, default: Any = None) -> Any:
        """Return a rope parameter; one that is None counts as absent."""
        value = self.parameters.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """Return a rope parameter or raise."""
        return self._present(name, self.get(name))

    def _present(self, name: str, value: Any) -> Any:
        if value is None:
            raise ValueError(f"{_NAME}: {name} must be given for {self.rope_type!r}, got None")
        return value

    @property
    def rope_type(self) -> str:
        return self.get("rope_type") or self.get("type") or "default"

    @property
    def share(self) -> float:
        share = self.get("partial_rotary_factor", _get(self.config, "partial_rotary_factor"))
        share = 1.0 if share is None else share
        return check_real(_NAME, "partial_rotary_factor", share, at_least=0, at_most=1)

    @property
    def dim(self) -> int:
        return int(self.head_dim * self.share)

    @property
    def base(self) -> float:
        default = _get(self.config, "default_theta")
        base = self.get("rope_theta", _get(self.config, "rope_theta"))
        if base is None:
            return float(default) if isinstance(default, Real) else 10000.0
        return base

    @property
    def length(self) -> int:
        name = "max_position_embeddings"
        return check_length(_NAME, name, self._present(name, _get(self.config, name)))

    @property
    def original_length(self) -> int:
        name = "original_max_position_embeddings"
        length = self.get(name, _get(self.config, name))
        return self.length if length is None else check_length(_NAME, name, length)


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _read(config: Any, layer_type: str | None) -> _Source:
    parameters = _parameters(config)
    if _is_nested(parameters):
        layer_type = _choose(parameters, layer_type)
        parameters = parameters[layer_type]
    elif (length := _get(config, "original_max_position_embeddings")) is not None:
        # Phi-3 keeps the trained length beside its rope parameters, and that one has priority.
        parameters = {**parameters, "original_max_position_embeddings": length}
    if layer_type is not None and _get(config, "is_heterogeneous"):
        # ValueError: layers of one type differ, most often in what the rotation does not depend on;
        # where it does, reading the size of a head from the whole configuration raises.
        with suppress(ValueError):
            config = config.per_layer_config[layer_type]
    return _Source(config, parameters, _head_dim(config, layer_type))


def _parameters(config: Any) -> Mapping[str, Any]:
    parameters = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise TypeError(f"{_NAME}: rope_parameters must be a mapping, got {parameters!r}")
    local_base = _get(config, "rope_local_base_freq")
    if local_base is None or _is_nested(parameters):
        return parameters
    # Gemma 3 in transformers 4: rope_scaling belongs to the full attention layers alone.
    return {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
    }


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in parameters.values())


def _choose(parameters: Mapping[str, Any], layer_type: str | None) -> str:
    choices = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if layer_type is None and len(choices) == 1:
        return choices[0]
    if layer_type not in choices:
        expected = ", ".join(repr(name) for name in choices)
        raise ValueError(f"{_NAME}: layer_type must be one of {expected}, got {layer_type!r}")
    return layer_type


def _head_dim(config: Any, layer_type: str | None) -> int:
    # Gemma 4's config.json gives its full attention layers a size of their own.
    names = ("global_head_dim",) if layer_type == "full_attention" else ()
    for name in (*names, "head_dim", "qk_rope_head_dim"):
        if (value := _get(config, name)) is not None:
            return check_length(_NAME, name, value)
    hidden, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
    if hidden is None or heads is None:
        raise ValueError(
            f"{_NAME}: config must have head_dim, or hidden_size and num_attention_heads (those of "
            f"a multimodal model are in its text_config), got a {type(config).__name__} without"
        )
    hidden = check_length(_NAME, "hidden_size", hidden)
    return hidden // check_length(_NAME, "num_attention_heads", heads)


def _default(source: _Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return rope(source.dim, base=source.base)


def _linear(source: _Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return pi(source.dim, factor=source.need("factor"), base=source.base)


def _dynamic(source: _Source, seq_len: int | Tensor | None) -> RopeFreqs:
    length = source.length
    return dynamic_ntk(
        source.dim,
        factor=source.need("factor"),
        seq_len=length if seq_len is None else seq_len,
        max_position_embeddings=length,
        base=source.base,
    )


def _yarn(source: _Source, seq_len: int | Tensor | None) -> RopeFreqs:
    length = source.original_length
    factor = source.get("factor")
    return yarn(
        source.dim,
        factor=source.length / length if factor is None else factor,
        original_max_position_embeddings=length,
        base=source.base,
        beta_fast=source.get("beta_fast") or 32.0,
        beta_slow=source.get("beta_slow") or 1.0,
        truncate=source.get("truncate", True),
        attention_factor=source.get("attention_factor"),
        mscale=source.get("mscale"),
        mscale_all_dim=source.get("mscale_all_dim"),
    )


def _longrope(source: _Source, seq_len: int | Tensor | None) -> RopeFreqs:
    length = source.original_length
    return longrope(
        source.dim,
        short_factor=source.need("short_factor"),
        long_factor=source.need("long_factor"),
        original_max_position_embeddings=length,
        seq_len=length if seq_len is None else seq_len,
        factor=source.get("factor"),
        max_position_embeddings=_get(source.config, "max_position_embeddings"),
        attention_factor=source.get("attention_factor"),
        base=source.base,
    )


def _llama3(source: _Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return llama3(
        source.dim,
        factor=source.need("factor"),
        original_max_position_embeddings=source.original_length,
        low_freq_factor=source.need("low_freq_factor"),
        high_freq_factor=source.need("high_freq_factor"),
        base=source.base,
    )


def _proportional(source: _Source, seq_len: int | Tensor | None) -> RopeFreqs:
    return proportional(
        source.head_dim,
        partial_rotary_factor=source.share,
        base=source.base,
        factor=source.get("factor", 1.0),
    )


_ADAPTERS: dict[str, Callable[[_Source, int | Tensor | None], RopeFreqs]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # the name in Phi-3's first configurations
    "llama3": _llama3,
    "proportional": _proportional,
}
