"""The rope parameters of one layer type, read from a transformers configuration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from .._checks import check_length, check_real

NAME = "from_hf_config"
# Names in a loaded config.json that the class of its model_type reads by another (attribute_map).
_STORED_AS = {
    ("dbrx", "hidden_size"): "d_model",
    ("dbrx", "max_position_embeddings"): "max_seq_len",
    ("dbrx", "num_attention_heads"): "n_heads",
    **{
        (f"gpt_neox{end}", name): stored
        for end in ("", "_japanese")
        for name, stored in (
            ("partial_rotary_factor", "rotary_pct"),
            ("rope_theta", "rotary_emb_base"),
        )
    },
    ("jetmoe", "head_dim"): "kv_channels",
    ("moonshine", "num_attention_heads"): "decoder_num_attention_heads",
    ("zamba2", "head_dim"): "attention_head_dim",
}
# Names by which others, before transformers 5, store what only their classes read.
_READ_BY_CLASSES = (
    *("attn_config", "global_rope_theta", "local_rope_theta", "swa_rope_theta"),
    *("rope_pct", "rope_ratio", "rotary_dim", "rotary_emb_base", "rotary_pct"),
)
# Parts of the names of layer types that see a bounded number of keys.
_BOUNDED = ("sliding", "chunked", "local")


@dataclass(frozen=True)
class Source:
    """Rope parameters of one layer type, with the configuration they belong to.

    nested: True if the configuration has them per layer type.
    """

    config: Any
    parameters: Mapping[str, Any]
    layer_type: str | None
    nested: bool

    def get(self, name: str, default: Any = None) -> Any:
        """Return a rope parameter; one that is None counts as absent."""
        value = self.parameters.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """Return a rope parameter or raise."""
        return self._present(name, self.get(name))

    def of_config(self, name: str) -> Any:
        """Return a value of the configuration itself, or None."""
        return _get(self.config, name)

    def _present(self, name: str, value: Any) -> Any:
        if value is None:
            raise ValueError(f"{NAME}: {name} must be given for {self.rope_type!r}, got None")
        return value

    @property
    def rope_type(self) -> str:
        """The stated rope type, else the default of the configuration's class."""
        stated = self.get("rope_type") or self.get("type") or "default"
        own = self.of_config("default_rope_type")
        return own if stated == "default" and isinstance(own, str) else stated

    @property
    def model_type(self) -> str:
        """The model_type, "" if there is none."""
        return self.of_config("model_type") or ""

    @property
    def share(self) -> float:
        """The share of a head that rotates."""
        share = self.get("partial_rotary_factor", self.of_config("partial_rotary_factor"))
        share = 1.0 if share is None else share
        return check_real(NAME, "partial_rotary_factor", share, at_least=0, at_most=1)

    @property
    def head_dim(self) -> int:
        """The dims of a head."""
        return _head_dim(self.config, self.layer_type)

    @property
    def dim(self) -> int:
        """The rotary dimension."""
        dim = int(self.head_dim * self.share)
        if dim % 2:
            raise ValueError(
                f"{NAME}: head_dim * partial_rotary_factor must be even, so that dims pair up, "
                f"got {self.head_dim} * {self.share:g} = {dim}"
            )
        return dim

    @property
    def base(self) -> float:
        """RoPE's base."""
        default = self.of_config("default_theta")
        base = self.get("rope_theta", self.of_config("rope_theta"))
        if base is None:
            return float(default) if isinstance(default, Real) else 10000.0
        return base

    @property
    def length(self) -> int:
        """The longest sequence of the configuration."""
        name = "max_position_embeddings"
        return check_length(NAME, name, self._present(name, self.of_config(name)))

    @property
    def original_length(self) -> int:
        """The trained length."""
        name = "original_max_position_embeddings"
        length = self.get(name, self.of_config(name))
        return self.length if length is None else check_length(NAME, name, length)


def read(config: Any, layer_type: str | None) -> Source:
    """Read the rotation of one layer type from `config`."""
    if isinstance(config, nn.Module):
        raise TypeError(f"{NAME}: config must be a configuration, got a model; pass model.config")
    parameters = _parameters(config)
    nested = _is_nested(parameters)
    if nested:
        layer_type = _choose(parameters, layer_type)
        parameters = parameters[layer_type]
    elif (length := _get(config, "original_max_position_embeddings")) is not None:
        # Phi-3 keeps the trained length beside its rope parameters; that one has priority.
        parameters = {**parameters, "original_max_position_embeddings": length}
    if isinstance(config, Mapping):
        config = _of_layers(config, layer_type)
    elif layer_type is not None and _get(config, "is_heterogeneous"):
        # ValueError: layers of one type differ, most often in sizes that the rotation ignores. If
        # head sizes differ, reading them from the whole configuration raises.
        with suppress(ValueError):
            config = config.per_layer_config[layer_type]
    return Source(config, parameters, layer_type, nested)


def layer_types_in(config: Any) -> list[str]:
    """Return the layer types that have rope parameters of their own; none if one set serves all."""
    return [name for name, value in _parameters(config).items() if isinstance(value, Mapping)]


def stray(config: Any, by_type: bool = True) -> dict[str, Any]:
    """Return the rope parameters that a model passes over, by name.

    by_type: True for a model that reads parameters per layer type: those beside them, if no layer
        type has them so. False for one that reads one set: layer types in it that say otherwise.
    """
    parameters = _parameters(config)
    types = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    beside = {k: v for k, v in parameters.items() if k not in types and v is not None}
    if not by_type:
        return {name: own for name, own in types.items() if not own.items() <= beside.items()}
    every = types.values()
    return {k: v for k, v in beside.items() if types and all(own.get(k) != v for own in every)}


def is_bounded(layer_type: str) -> bool:
    """Return True if layers of this type see a bounded number of keys.

    A "reference_sliding_attention" sees the prompt from anywhere: not bounded. "main" is DeepSeek
    V4's name for the rotation of its sliding layers.
    """
    ends = layer_type.startswith(_BOUNDED) or layer_type.endswith(_BOUNDED)
    return ends or layer_type == "main"


def _get(config: Any, name: str) -> Any:
    if not isinstance(config, Mapping):
        return getattr(config, name, None)
    if (value := config.get(name)) is not None:
        return value
    return config.get(_STORED_AS.get((config.get("model_type", ""), name), name))


def refuse_unread(config: Any) -> None:
    """Raise ValueError for a stored rotation that this module would misread."""
    if not isinstance(config, Mapping):
        return
    kind = config.get("model_type", "")
    read = {stored for (name, _), stored in _STORED_AS.items() if name == kind}
    for name in _READ_BY_CLASSES:
        if config.get(name) is not None and name not in read and not config.get("rope_parameters"):
            raise ValueError(
                f"{NAME}: {name} can be read by the class of {kind or 'the model'} alone: pass "
                f"transformers.AutoConfig.from_pretrained(...), got a mapping with {config[name]!r}"
            )


def _of_layers(config: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
    """Merge the settings of one layer type into a loaded config.json (Gemma 4)."""
    own, types = config.get("per_layer_config"), config.get("layer_types")
    if layer_type is None or not own or not types:
        return config
    of_layer = {int(number): values for number, values in own.items()}
    layers = [of_layer.get(n, {}) for n, kind in enumerate(types) if kind == layer_type]
    sizes = {layer.get("head_dim", config.get("head_dim")) for layer in layers}
    if len(sizes) > 1:
        raise ValueError(
            f"{NAME}: all layers of type {layer_type!r} must have one head_dim, got {sizes}"
        )
    return {**config, "head_dim": sizes.pop()} if sizes else config


def _parameters(config: Any) -> Mapping[str, Any]:
    parameters = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise TypeError(f"{NAME}: rope_parameters must be a mapping, got {parameters!r}")
    local_base = _get(config, "rope_local_base_freq")
    if _get(config, "model_type") == "olmo3":
        local_base = _get(config, "rope_theta")
    if local_base is None or _is_nested(parameters):
        return parameters
    # Gemma 3 and OLMo 3 in transformers 4: rope_scaling belongs to the full attention layers alone.
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
        raise ValueError(f"{NAME}: layer_type must be one of {expected}, got {layer_type!r}")
    return layer_type


def _head_dim(config: Any, layer_type: str | None) -> int:
    # Gemma 4's config.json gives its full attention layers a size of their own.
    names = ("global_head_dim",) if layer_type == "full_attention" else ()
    for name in (*names, "head_dim", "qk_rope_head_dim"):
        if (value := _get(config, name)) is not None:
            return check_length(NAME, name, value)
    width, heads, rate = _widths(config)
    if width is None or heads is None:
        raise ValueError(
            f"{NAME}: config must have head_dim, or hidden_size and num_attention_heads (those of "
            f"a multimodal model are in its text_config), got a {type(config).__name__} without"
        )
    width = check_length(NAME, "hidden_size", width)
    return width // (rate * check_length(NAME, "num_attention_heads", heads))


def _widths(config: Any) -> tuple[Any, Any, int]:
    """Return the width of all heads times a multiplier, the number of heads, and the multiplier."""
    if (rate := _get(config, "memory_attention_downsample_rate")) is not None:
        # SAM 2's videos: only one of its attentions rotates.
        width = _get(config, "memory_attention_hidden_size")
        return width, _get(config, "memory_attention_num_attention_heads"), int(rate)
    # Qwen2-VL's images: hidden_size is the width of the text model.
    own = "embed_dim" if _get(config, "model_type") == "qwen2_vl_vision" else "hidden_size"
    heads = _get(config, "num_attention_heads")
    return _get(config, own), _get(config, "num_heads") if heads is None else heads, 1
