"""Facts about a model's positions: lengths, rotations, its cache, and score methods."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import RopeFreqs, _ext, methods
from .._usage import UsageError
from ..integrations._shared.parameters import is_bounded, trained_in
from ..integrations.transformers import extend
from ..integrations.transformers.model import caches_in, shortened
from ..integrations.transformers.probe.layers import LayerProbe, kind_of
from ..integrations.transformers.probe.rotary import (
    RotaryModule,
    attribute_of,
    find_rotary_modules,
    owners_of,
)
from . import vllm
from .models import alike, on_meta, small_ones
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AS_STATED, IGNORED = "as stated", "plain RoPE: the scaling that is stated is IGNORED"
_OUR_NAMES = {"default": "rope", "linear": "pi", "dynamic": "dynamic_ntk"}


@dataclass(frozen=True)
class Length:
    """Lengths in tokens.

    trained: by the key named origin. unscaled: before any scaling. reach: the length that the
    configuration is made for, by reach_origin.
    """

    trained: int
    unscaled: int
    origin: str
    reach: int
    reach_origin: str


@dataclass(frozen=True)
class Rotation:
    """The rotation of one kind of layers; only `layers` and `window` are set if they do not rotate.

    window: tokens that a layer sees, None for all.
    sections: pairs of each axis of positions (mRoPE), None for one axis.
    method, base, factor, attention_factor: in force, as transformers builds the model.
    unfinished: number of rotating pairs that made less than a turn in the tokens that the layer
        saw in training.
    transformers, vllm: how these apply the stated scaling.
    """

    kind: str
    layers: int
    window: int | None = None
    method: str | None = None
    base: float | None = None
    factor: float | None = None
    attention_factor: float | None = None
    pairs: int | None = None
    unfinished: int | None = None
    sections: tuple[int, ...] | None = None
    transformers: str | None = None
    vllm: str | None = None


@dataclass(frozen=True)
class Cache:
    """Size of the cache.

    bytes_per_token: of layers that keep all tokens. windowed: (window, bytes_per_token) for each
    kind of layers that keeps only the last tokens.
    """

    dtype: str
    bytes_per_token: int
    windowed: tuple[tuple[int, int], ...]

    def bytes_at(self, length: int) -> int:
        """Return the bytes of one sequence."""
        windowed = sum(min(window, length) * each for window, each in self.windowed)
        return self.bytes_per_token * length + windowed


@dataclass(frozen=True)
class Scores:
    """Layers that `extend` takes a score method for, or None; refused: why it takes none."""

    layers: str | None
    refused: str | None


@dataclass(frozen=True)
class Facts:
    """Everything that `check` knows of a model, for any length.

    latent: dims of the latent that keys and values are made from, None if they are cached whole.
    """

    architecture: str
    heads: int
    key_heads: int
    head_dim: int
    latent: int | None
    length: Length
    rotations: tuple[Rotation, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    cache: Cache
    temperature: float | None
    scores: Scores
    rope_parameters: Mapping[str, Any]
    full_kind: str | None

    @property
    def reach(self) -> int:
        """The tokens that the model is made for, without scalings that are ignored."""
        fails = any(each.transformers == IGNORED for each in self.rotations) or self.ignored
        return self.length.unscaled if fails else self.length.reach


# A kind of layers: its name, if it rotates, and the number of last tokens that it sees, None for
# all that the model is made for.
Kind = tuple[str, bool, "int | None"]


class Trial(NamedTuple):
    """Results of running a small model, by layer.

    Its kind, or None if it does not attend; the dims of keys and values of all heads that its
    cache has for a token, and the number of tokens. temperature: the softmax scale over
    1 / sqrt(head_dim); None if the layers do not tell it.
    """

    scores: Scores
    kinds: list[Kind | None]
    cached: list[tuple[int, int | None]]
    temperature: float | None = None


def gather(source: Source) -> Facts:
    """Gather the facts; raise UsageError for a model that cannot be built or does not rotate."""
    try:
        model = on_meta(source.config)
        return _gather(source, model, find_rotary_modules(model, "all"))
    except UsageError:
        raise
    except KeyError as error:
        rope_type = f"rope_type {error} is none that transformers knows"
        raise UsageError(f"cannot be built: {rope_type}") from error
    except Exception as error:  # a foreign configuration may raise anything
        text = shortened(error).removeprefix("extend: ")
        raise UsageError(f"cannot be built, or does not rotate: {text}") from error


def _gather(source: Source, model: PreTrainedModel, sites: list[RotaryModule]) -> Facts:
    config, length, trial = source.config, read_length(source), try_out(model)
    kind = next((k for site in sites for k in site.layer_types if k is None or "full" in k), None)
    return Facts(
        (source.whole.architectures or [type(model).__name__])[0],
        config.num_attention_heads,
        _key_heads(config),
        head_dim(config),
        getattr(config, "kv_lora_rank", None),
        length,
        tuple(_rotations(source, sites, trial, length.trained)),
        tuple(source.ignored(type(model))),
        (*source.warnings, *_short_yarn(config, length)),
        _cache(config, trial),
        trial.temperature,
        trial.scores,
        sites[0].parameters(kind),
        kind,
    )


def read_length(source: Source) -> Length:
    """Return the training length and the place of the number; raises UsageError."""
    config, stated, name = source.config, source.stated, "max_position_embeddings"
    rope = ("rope_parameters", "rope_scaling")
    shared = {} if any(map(stated.get, rope)) else {rope[0]: getattr(config, rope[0], None)}
    longest = {name: getattr(config, name, None)}
    try:
        known = methods.lengths({**longest, **shared, **stated})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).removeprefix("lengths: ")) from error
    origin = known.origin
    if origin == name and stated.get(name) is None:
        origin = f"{name}, the default of {type(config).__name__}: the file names none"
    if source.gguf:
        ending = (
            "rope.scaling.original_context_length" if "original" in origin else "context_length"
        )
        origin = f"{source.gguf}.{ending}"
    longest = max(known.trained, getattr(config, name))
    reach_origin = "the factor of its YaRN" if known.reach > longest else name
    return Length(known.trained, known.unscaled, origin, max(known.reach, longest), reach_origin)


def _short_yarn(config: PreTrainedConfig, length: Length) -> Iterator[str]:
    """Yield a warning if the factor of a model's YaRN does not reach its longest length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    factor = parameters.get("factor")
    if parameters.get("rope_type") == "yarn" and factor and factor * length.trained < length.reach:
        reached = f"{factor:g} x {length.trained:,} = {factor * length.trained:,.0f} tokens"
        yield f"takes the factor of its YaRN, which reaches {reached}"


def try_out(model: PreTrainedModel) -> Trial:
    """Run a small model of random weights with the same kinds of layers."""
    config, first = model.config, alike(model)
    for small in small_ones(model):
        scores = _ask_for_scores(small)
        if scores.refused is None or "tried out" not in scores.refused:
            kinds, cached = _kinds(small), _cached(small, config)
            return Trial(
                scores,
                [kinds[each] for each in first],
                [cached[each] for each in first],
                _temperature(small),
            )
    scores = Scores(None, "not tried out: no small model of its kind can be built here")
    return Trial(scores, _named_kinds(config), _usual_cache(config))


def _ask_for_scores(model: PreTrainedModel) -> Scores:
    reason = ""
    for layers in ("full", "all"):
        try:
            with _ext.deferred(), extend(model, "rerope", window=2, layers=layers):
                return Scores(layers, None)
        except (ValueError, NotImplementedError) as error:
            reason = reason or shortened(error).removeprefix("extend: ")
    return Scores(None, reason)


def _kinds(small: PreTrainedModel) -> list[Kind | None]:
    sites = find_rotary_modules(small, "all")
    try:
        with _ext.deferred():
            found = LayerProbe(small, owners_of(sites)[0], sites, "all")
    except ValueError:
        return _named_kinds(small.config)
    kinds: list[Kind | None] = [None] * small.config.num_hidden_layers
    for number, layer in enumerate([*found.far, *found.near]):
        heads = found.far.get(layer)
        window = (heads and (heads.sliding_window or heads.chunk_size)) or None
        window = _within(small.config, window)
        name = kind_of(layer) or ("sliding_attention" if window else "full_attention")
        window = window or _window(small.config, name)
        kinds[getattr(layer, "layer_idx", number)] = name, layer not in found.unrotated, window
    return kinds


def _named_kinds(config: PreTrainedConfig) -> list[Kind | None]:
    """Return the configuration's names for its layers."""
    count = config.num_hidden_layers
    names = getattr(config, "layer_types", None) or ["full_attention"] * count
    rotate = getattr(config, "no_rope_layers", None) or [True] * count
    return [
        (name, bool(rotates), _window(config, name)) if _attends(name) else None
        for name, rotates in zip(names, rotate, strict=False)
    ]


def _temperature(small: PreTrainedModel) -> float | None:
    layers = [layer for layer in small.modules() if hasattr(layer, "layer_idx")]
    scales = [
        layer.scaling for layer in layers if isinstance(getattr(layer, "scaling", None), float)
    ]
    return scales[0] * head_dim(small.config) ** 0.5 if scales else None


def _attends(kind: str) -> bool:
    return "attention" in kind and "linear" not in kind


def _window(config: PreTrainedConfig, kind: str) -> int | None:
    names = ("sliding_window", "attention_chunk_size", "attention_window_size")
    values = [value for name in names if (value := getattr(config, name, None))]
    return _within(config, values[0]) if values and is_bounded(kind) else None


def _within(config: PreTrainedConfig, window: int | None) -> int | None:
    """Return a window, None if it is no shorter than the texts that the model is made for."""
    longest = getattr(config, "max_position_embeddings", None)
    return window if window and longest and window < longest else None


def _rotations(source: Source, sites: list[RotaryModule], trial: Trial, trained: int) -> Any:
    """Yield a `Rotation` for each kind of layers."""
    by_kind = {kind: site for site in sites for kind in site.layer_types}
    names = getattr(source.config, "layer_types", None) or ["other"] * len(trial.kinds)
    counted = Counter(
        each or (name, False, None) for each, name in zip(trial.kinds, names, strict=False)
    )
    for (kind, rotates, window), layers in counted.items():
        key = kind if kind in by_kind else None
        if not rotates or key not in by_kind:
            yield Rotation(kind, layers, window)
            continue
        yield _rotation(source, by_kind[key], key, Rotation(kind, layers, window), trained)


def _rotation(
    source: Source, site: RotaryModule, key: str | None, layers: Rotation, trained: int
) -> Rotation:
    parameters = site.parameters(key)
    rope_type = parameters.get("rope_type", "default")
    base = parameters.get("rope_theta", 10000.0)
    with torch.device("cpu"):
        fresh = type(site.module)(site.module.config)
    built = RopeFreqs(
        attribute_of(fresh, key, "inv_freq").float().sort(descending=True).values,
        float(attribute_of(fresh, key, "attention_scaling", 1.0)),
    )
    rotating = int((built.inv_freq > 0).sum())
    dim = 2 * len(built.inv_freq)
    plain = methods.rope(dim, base=base)
    of_training = trained_in(source.config, key, parameters, dim).get("over", plain).inv_freq
    seen = min(trained, layers.window or trained)
    turns = of_training[:rotating].double() * seen / (2 * math.pi)
    stated = _stated(source, key)
    by_vllm = vllm.rotation(source.config, key, 2 * len(built.inv_freq))
    in_vllm = _compare(by_vllm, stated, plain)
    far = _stated(source, key, source.config.max_position_embeddings)
    if in_vllm != AS_STATED and _compare(by_vllm, far, plain) == AS_STATED:
        in_vllm = "as stated for long texts, at every length"
    return Rotation(
        layers.kind,
        layers.layers,
        layers.window,
        _OUR_NAMES.get(rope_type, rope_type),
        float(base),
        parameters.get("factor"),
        built.attention_factor,
        rotating,
        int((turns < 1).sum()),
        tuple(parameters.get("mrope_section") or ()) or None,
        _of_weights(fresh) or _compare(built, stated, plain),
        in_vllm,
    )


def _of_weights(rotary: Any) -> str | None:
    """Return a line for a rotary embedding whose frequencies are weights (Mistral Large 4)."""
    if not (names := list(rotary._parameters)):
        return None
    return f"frequencies are weights ({', '.join(names)}): only `check(model)` can tell them"


def _stated(source: Source, key: str | None, length: int | None = None) -> RopeFreqs | str:
    """Return the configuration's frequencies as this package computes them, or why not."""
    config: Any = source.config
    if source.gguf and "rope_parameters" in source.stated:
        config = {**config.to_dict(), **source.stated}
    try:
        freqs = methods.from_hf_config(config, length, layer_type=key)
    except (ValueError, TypeError) as error:
        return f"not compared: {shortened(error)}"
    return RopeFreqs(freqs.inv_freq.sort(descending=True).values, freqs.attention_factor)


def _compare(found: RopeFreqs | str, stated: RopeFreqs | str, plain: RopeFreqs) -> str:
    """Compare the frequencies found with those stated, in words."""
    for each in (found, stated):
        if isinstance(each, str):
            return each
    assert isinstance(found, RopeFreqs) and isinstance(stated, RopeFreqs)
    if found.inv_freq.shape != stated.inv_freq.shape:
        return f"differs: {len(found.inv_freq)} pairs for {len(stated.inv_freq)}"
    if _close(found, stated):
        return AS_STATED
    if _close(found, plain):
        return IGNORED
    apart = ((found.inv_freq - stated.inv_freq).abs() / stated.inv_freq.clamp(min=1e-30)).max()
    factors = f"{found.attention_factor:.4g} for {stated.attention_factor:.4g}"
    return f"differs: frequencies by up to {apart:.2g}, attention factor {factors}"


def _close(a: RopeFreqs, b: RopeFreqs) -> bool:
    """Return True if equal up to roundings of float32 powers."""
    same = a.inv_freq.shape == b.inv_freq.shape
    same = same and torch.allclose(a.inv_freq, b.inv_freq, rtol=1e-5, atol=0)
    return same and math.isclose(a.attention_factor, b.attention_factor, rel_tol=1e-5)


@torch.no_grad()
def _cached(small: PreTrainedModel, config: PreTrainedConfig) -> list[tuple[int, int | None]]:
    """Read the sizes of keys and values in the cache that a small model fills."""
    many, few = (_key_heads(each) for each in (config, small.config))
    try:
        output = small(input_ids=torch.arange(4, device="cpu")[None], use_cache=True)
        layers = next(caches_in(output)).layers
    except Exception:  # a foreign model may raise anything
        return _usual_cache(config)
    found: list[tuple[int, int | None]] = [(0, None)] * small.config.num_hidden_layers
    for number, layer in enumerate(layers[: len(found)]):
        dims = 0
        for held in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if held is not None and held.dim() == 4:  # latents serve all heads together
                dims += (many if held.shape[1] == few else held.shape[1]) * held.shape[3]
        window = getattr(layer, "sliding_window", None)
        found[number] = dims, _within(small.config, window)
    return found


def _key_heads(config: PreTrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config: PreTrainedConfig) -> int:
    """Return the dims of a head of queries and keys; with latent attention both parts."""
    names = ("qk_head_dim", "head_dim")
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    return found or config.hidden_size // config.num_attention_heads


def _usual_cache(config: PreTrainedConfig) -> list[tuple[int, int | None]]:
    dims = 2 * _key_heads(config) * head_dim(config)
    return [(dims, each[2]) if each else (0, None) for each in _named_kinds(config)]


def _cache(config: PreTrainedConfig, trial: Trial) -> Cache:
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    sizes: Counter[int] = Counter()
    for dims, window in trial.cached:
        sizes[window or 0] += dims * dtype.itemsize
    all_tokens = sizes.pop(0, 0)
    return Cache(str(dtype).removeprefix("torch."), all_tokens, tuple(sizes.items()))
