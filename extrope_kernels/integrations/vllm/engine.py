"""The methods of one engine: frequencies for each kind of layers, and the score method.

Nothing here imports vLLM: an engine's configuration, a VllmConfig, is read by attribute names.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ... import RopeFreqs
from ...methods import from_hf_config
from .._shared.parameters import bind_method, is_bounded, model_values, values_for
from .latent import as_stated
from .lengths import ByLength, by_length
from .settings import (
    LARGEST_HEAD,
    NAME,
    OURS,
    WIDE_CACHES,
    Settings,
    check_config,
    read_settings,
    reprefix_error,
    rotations,
)

# By the id of a VllmConfig: vLLM copies its fields, and one more attribute would break that.
_engines: dict[int, Engine | None] = {}


@dataclass(frozen=True)
class Rotated:
    """The rotation of the layers of one kind.

    freqs: frequencies for the engine's longest request.
    base: RoPE's base, which tells vLLM's rotary layers apart.
    extended: True if the engine's methods apply, False for the model's own rotation.
    by_length: with a raw cache, frequencies that follow the length of each request.
    """

    freqs: RopeFreqs
    base: float
    extended: bool
    by_length: ByLength | None = None


@dataclass
class Engine:
    """The methods of one engine, computed for its model.

    kinds: rotations by the name of a kind of layers; the name None if the model has one kind.
    has_towers: the model has encoders (for images, say); their rotary layers have the same classes
        as those of its language model.
    heads: (head_dim, interleaved) of vLLM's rotary layers made for this model.
    """

    settings: Settings
    kinds: Mapping[str | None, Rotated]
    layer_types: tuple[str, ...]
    has_towers: bool
    heads: set[tuple[int, bool]] = field(default_factory=set)

    def of_rotary(self, base: float, rotary_dim: int) -> Rotated:
        """Return the rotation for one of vLLM's rotary layers.

        Raises ValueError for a layer that the model's configuration does not describe.
        """
        for kind in self.kinds.values():
            if kind.base == base and 2 * len(kind.freqs.inv_freq) == rotary_dim:
                return kind
        raise ValueError(
            f"{NAME}: rotary layers must be those of the model's rope_parameters, got one of "
            f"base {base:g} and {rotary_dim} dims"
        )

    def kind_of(self, index: int) -> str | None:
        """Return the kind of the attention layer with this index."""
        return None if None in self.kinds else self.layer_types[index]


def engine_of(config: Any) -> Engine | None:
    """Return the engine of a VllmConfig, made once; None without an entry of ours.

    Raises ValueError or TypeError, before weights are loaded, if the engine cannot be served.
    """
    if config is None or config.model_config is None:
        return None
    key = id(config)
    if key not in _engines:
        _engines[key] = make_engine(config)
        weakref.finalize(config, _engines.pop, key)
    return _engines[key]


def make_engine(config: Any) -> Engine | None:
    """Compute an engine from its VllmConfig."""
    settings = read_settings(config.additional_config)
    if settings is None:
        return None
    check_config(settings, config)
    model = config.model_config
    text = as_stated(model.hf_text_config)
    with _on_the_cpu():
        kinds = _kinds(settings, text, model.max_model_len, model.dtype)
    layer_types = tuple(getattr(text, "layer_types", None) or ())
    engine = Engine(settings, kinds, layer_types, model.is_multimodal_model)
    _check_kinds(engine, len(layer_types))
    _check_heads(engine)
    _check_cache(engine, config.cache_config.cache_dtype)
    return engine


@contextmanager
def _on_the_cpu():
    """Undo vLLM's default dtype and device for models, which frequencies must not have."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _kinds(
    settings: Settings, text: Any, length: int, dtype: torch.dtype
) -> dict[str | None, Rotated]:
    kinds: dict[str | None, Rotated] = {}
    for kind, parameters in rotations(text):
        extended = kind is None or not is_bounded(kind)
        _check_type(parameters)
        freqs, following = from_hf_config(text, length, layer_type=kind), None
        base = float(parameters.get("rope_theta", 10000.0))
        if extended and settings.method is not None:
            freqs, following = _by_method(settings, text, kind, parameters, freqs, length)
        if extended:
            _check_pairs(settings, freqs.inv_freq.shape[-1])
        # vLLM's layers know their sections of several axes; text alone has one position.
        freqs = replace(_fitting(settings, freqs, length, dtype), axes=None)
        kinds[kind] = Rotated(freqs, base, extended, following)
    return kinds


def _by_method(
    settings: Settings,
    text: Any,
    kind: str | None,
    parameters: Mapping[str, Any],
    own: RopeFreqs,
    length: int,
) -> tuple[RopeFreqs, ByLength | None]:
    still = int((own.inv_freq == 0).sum())
    dim = 2 * own.inv_freq.shape[-1]
    model = model_values(text, kind, parameters, dim, still)
    with reprefix_error():
        function, takes_length = bind_method(NAME, settings.method, settings.parameters, model)
    if not takes_length:
        return function(), None
    if not settings.raw:
        return function(seq_len=length), None
    partly = float(parameters.get("partial_rotary_factor", 1.0)) != 1.0
    given = {**values_for(settings.method, model, settings.parameters), **settings.parameters}
    following = by_length(settings.method, function, given, partly)
    return following.freqs(seq_len=length), following


def _fitting(settings: Settings, freqs: RopeFreqs, length: int, dtype: torch.dtype) -> RopeFreqs:
    """Refuse a decay that overflows a dtype within the engine's length; return freqs.

    Its origin is the middle, which is nearest to both ends. A score that stores keys by blocks
    keeps them within one.
    """
    if freqs.log_decay is None:
        return freqs
    reach = math.log(torch.finfo(dtype).max) / freqs.steepest_decay
    if settings.attends:
        block = 0 if settings.raw else settings.score.stored.modulus
        if not block:
            method = "a raw cache" if settings.raw else settings.score.name
            raise ValueError(
                f"{NAME}: frequencies must have no decay (xpos) with {method}, got some"
            )
        if block - 1 > reach:
            raise ValueError(
                f"{NAME}: {settings.score.name} must restart positions after at most "
                f"{int(reach) + 1} for {dtype} and the decay of {settings.method}, got {block}"
            )
        return freqs
    given = "decay_origin" in settings.parameters
    origin = freqs.decay_origin if given else length / 2
    if max(origin, length - origin) > reach:
        raise ValueError(
            f"{NAME}: max_model_len must be at most {int(reach if given else 2 * reach)} for "
            f"{dtype} and the decay of {settings.method}, got {length}"
        )
    return replace(freqs, decay_origin=origin)


def _check_pairs(settings: Settings, pairs: int) -> None:
    """Refuse a score whose maps are of another number of pairs."""
    maps = None if settings.score is None else settings.score.pair_maps
    if maps is not None and maps.shape[-1] != pairs:
        raise ValueError(
            f"{NAME}: {settings.score.name} must have maps of {pairs} pairs of dims, "
            f"got {maps.shape[-1]}"
        )


def _check_type(parameters: Mapping[str, Any]) -> None:
    if parameters.get("use_fope"):
        raise ValueError(
            f"{NAME}: the model must rotate by one of vLLM's layers that a plugin can replace, "
            "got fope"
        )


def _check_kinds(engine: Engine, layers: int) -> None:
    """Check that vLLM's rotary layers of different kinds differ in base or dims."""
    if None not in engine.kinds and not layers:
        raise ValueError(
            f"{NAME}: layer_types must name the kind of each layer, where rope_parameters differ "
            "by kind, got none"
        )
    seen: dict[tuple[float, int], bool] = {}
    for kind in engine.kinds.values():
        key = (kind.base, len(kind.freqs.inv_freq))
        if engine.settings.method is not None and seen.setdefault(key, kind.extended) != (
            kind.extended
        ):
            raise ValueError(
                f"{NAME}: {engine.settings.method} must be for all layers that share vLLM's rotary "
                f"layer of base {kind.base:g}, got some of them"
            )


def _check_heads(engine: Engine) -> None:
    """Check that our attention takes heads of the dims that rotate."""
    dims = max(2 * kind.freqs.inv_freq.shape[-1] for kind in engine.kinds.values())
    if engine.settings.attends and dims > LARGEST_HEAD:
        raise ValueError(
            f"{NAME}: heads must have at most {LARGEST_HEAD} dims for {OURS}, "
            f"got {dims} that rotate"
        )


def _check_cache(engine: Engine, dtype: str) -> None:
    """Check that no decay is for keys cached in few bits, which its amplitudes would saturate."""
    decays = any(kind.freqs.log_decay is not None for kind in engine.kinds.values())
    if decays and dtype not in WIDE_CACHES:
        raise ValueError(
            f"{NAME}: kv_cache_dtype must be auto or of 16 bits for the decay of "
            f"{engine.settings.method}, got {dtype}"
        )
