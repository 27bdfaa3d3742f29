"""Facts about a model's positions, read from its configuration: nothing is built or run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import methods
from .._rope_types import rope_type
from .._usage import UsageError
from ..integrations._shared.choice import why_no_score
from ..methods import is_bounded, yarn_temperature
from .source import Source, with_one_axis

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LONGEST = "max_position_embeddings"
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
# By model_type: only layers with a window rotate, which no configuration says.
_ROTATE_WITH_A_WINDOW = (
    *("afmoe", "beam", "cohere2", "cohere2_moe", "exaone4", "exaone_moe"),
    *("ergo", "flint", "kolibri1", "lara_mini"),
)


@dataclass(frozen=True)
class Length:
    """Lengths in tokens, as of `methods.lengths`; origin and reach_origin: who names them."""

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
    method, base, factor, attention_factor: as stated.
    unfinished: number of rotating pairs that made less than a turn in the tokens that the layer
        saw in training.
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
    """Layers that see past a window ("full") or all ("all"); why no score method is for them.

    refused: None where the configuration does not tell.
    """

    layers: str
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
        return self.length.trained if self.ignored else self.length.reach


def gather(source: Source) -> Facts:
    """Gather the facts; raise UsageError for a model that cannot be read or does not rotate."""
    config = source.config
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise UsageError(f"{type(config).__name__} does not rotate: it has no rope_parameters")
    length, layers = read_length(source), _layers(config)
    try:
        rotations = tuple(_rotations(source, layers, length.trained))
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).removeprefix("from_hf_config: ")) from error
    rotate = [each for each in rotations if each.method is not None]
    kinds = _kinds(source)
    full = next((kind for kind in kinds if not is_bounded(kind)), None)
    of_full = parameters[full] if full else parameters
    return Facts(
        _architecture(source),
        config.num_attention_heads,
        _key_heads(config),
        _head_dim(config),
        getattr(config, "kv_lora_rank", None),
        length,
        rotations,
        tuple(source.ignored()),
        (*source.warnings, *_short_yarn(of_full, length)),
        _cache(config, layers),
        _temperature(source, of_full),
        Scores(
            "all" if all(each.window for each in rotate) else "full",
            why_no_score(config) or _own_attention(config) or _long_window(config),
        ),
        of_full,
        full,
    )


def _kinds(source: Source) -> list[str]:
    """Return the kinds of layers whose own rope_parameters the model reads."""
    own = source.config.rope_parameters.items() if source.reads_by_kind else ()
    return [kind for kind, value in own if isinstance(value, Mapping)]


def _architecture(source: Source) -> str:
    if source.whole.architectures:
        return source.whole.architectures[0]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return names.get(source.config.model_type) or type(source.config).__name__


def read_length(source: Source) -> Length:
    """Return the training length and the place of the number; raises UsageError."""
    config, stated = source.config, source.stated
    rope = ("rope_parameters", "rope_scaling")
    own = {rope[0]: getattr(config, rope[0], None)}
    shared = {} if any(map(stated.get, rope)) else own
    longest = {_LONGEST: getattr(config, _LONGEST, None)}
    as_read = own if source.reads_by_kind and methods.stray(config) else {}
    try:
        known = methods.lengths({**longest, **shared, **stated, **as_read})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).removeprefix("lengths: ")) from error
    origin = known.origin
    if origin == _LONGEST and stated.get(_LONGEST) is None:
        origin = f"{_LONGEST}, the default of {type(config).__name__}: the file names none"
    if source.gguf:
        original = "original" in origin
        origin = "rope.scaling.original_context_length" if original else "context_length"
        origin = f"{source.gguf}.{origin}"
    stated_reach = max(known.trained, getattr(config, _LONGEST))
    reach_origin = "the factor of its YaRN" if known.reach > stated_reach else _LONGEST
    reach = max(known.reach, stated_reach)
    return Length(known.trained, known.unscaled, origin, reach, reach_origin)


def _short_yarn(parameters: Mapping[str, Any], length: Length) -> Iterator[str]:
    """Yield a warning if the factor of a model's YaRN does not reach its longest length."""
    factor = parameters.get("factor")
    yarn = parameters.get("rope_type") == "yarn"
    if yarn and factor and factor * length.trained < length.reach:
        reached = f"{factor:g} x {length.trained:,} = {factor * length.trained:,.0f} tokens"
        yield f"takes the factor of its YaRN, which reaches {reached}"


# A layer: the name of its kind, if it rotates, and the number of last tokens that it sees, None for
# all that the model is made for.
Layer = tuple[str, bool, "int | None"]


def _layers(config: PreTrainedConfig) -> list[Layer]:
    if (count := getattr(config, "num_hidden_layers", None)) is None:  # Blt's parts have layers
        raise UsageError(f"{type(config).__name__} names no num_hidden_layers")
    window = next((value for name in _WINDOWS if (value := getattr(config, name, None))), None)
    longest = getattr(config, _LONGEST, None)
    if window and longest and window >= longest:
        window = None
    same = "sliding_attention" if window else "full_attention"
    names = getattr(config, "layer_types", None) or [same] * count
    by_layer = ("no_rope_layers", "layer_rope_theta")  # false for layers that do not rotate
    rotate = next(filter(None, (getattr(config, key, None) for key in by_layer)), [True] * count)
    with_window = config.model_type in _ROTATE_WITH_A_WINDOW and any(map(is_bounded, names))
    found = []
    for name, rotates in zip(names, rotate, strict=False):
        seen = window if is_bounded(name) else None
        rotates = rotates and _attends(name) and (is_bounded(name) or not with_window)
        found.append((name, bool(rotates), seen))
    return found


def _own_attention(config: PreTrainedConfig) -> str | None:
    """Return why models of transformers that call no registered attention have no score methods."""
    import transformers
    from packaging.version import Version

    names = {"gpt_neox_japanese"}
    if Version(transformers.__version__) < Version("5.25"):
        names.add("falcon")
    if config.model_type in names:
        return "its layers compute their attention themselves"
    return None


def _long_window(config: PreTrainedConfig) -> str | None:
    """Return why a window no shorter than the training (Phi-3's) forbids score methods."""
    window, named = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if named or not window or window < config.max_position_embeddings:
        return None
    return f"its layers have a sliding window, of {window:,} tokens"


def _attends(kind: str) -> bool:
    return "hybrid" in kind or ("attention" in kind and "linear" not in kind)


def _rotations(source: Source, layers: list[Layer], trained: int) -> Iterator[Rotation]:
    """Yield a `Rotation` for each kind of layers."""
    config = with_one_axis(source.config, source.reads_by_kind)
    for (kind, rotates, window), count in Counter(layers).items():
        if not rotates:
            yield Rotation(kind, count, window)
            continue
        parameters = source.config.rope_parameters
        if (key := _named(_kinds(source), kind)) is not None:
            parameters = parameters[key]
        freqs = methods.from_hf_config(config, layer_type=key)
        rotating = int((freqs.inv_freq > 0).sum())
        of_training = methods.trained(config, layer_type=key).inv_freq[:rotating].double()
        turns = of_training * min(trained, window or trained) / (2 * math.pi)
        yield Rotation(
            kind,
            count,
            window,
            rope_type(parameters.get("rope_type")).method,
            float(parameters.get("rope_theta") or 10000.0),
            parameters.get("factor"),
            freqs.attention_factor,
            rotating,
            int((turns < 1).sum()),
            tuple(parameters.get("mrope_section") or ()) or None,
        )


def _named(names: list[str], kind: str) -> str | None:
    """Return the name of a kind of layers in rope_parameters; None if all kinds share them.

    DeepSeek V4 names there, in other words, those with a window and those without.
    """
    return next((name for name in names if name == kind), None) or next(
        (name for name in names if is_bounded(name) == is_bounded(kind)), None
    )


def _temperature(source: Source, rope: Mapping[str, Any]) -> float | None:
    """Return the softmax scale over 1 / sqrt(head_dim), 1.0 where nothing says otherwise.

    rope: the rope_parameters of the layers that see all tokens.
    """
    config, size = source.config, _head_dim(source.config) ** 0.5
    if scalar := getattr(config, "query_pre_attn_scalar", None):
        return size / scalar**0.5
    if multiplier := getattr(config, "attention_multiplier", None):
        return multiplier * size
    if "self.scaling = 1.0" in source.code:  # Gemma 4
        return size
    if getattr(config, "kv_lora_rank", None) and (weight := rope.get("mscale_all_dim")):
        return yarn_temperature(rope.get("factor") or 1.0, weight) ** 2  # DeepSeek's attention
    return 1.0


def _key_heads(config: PreTrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: PreTrainedConfig) -> int:
    """Return the dims of a head of queries and keys; with latent attention both parts."""
    names = ("qk_head_dim", "head_dim")
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    return found or config.hidden_size // config.num_attention_heads


def _cache(config: PreTrainedConfig, layers: list[Layer]) -> Cache:
    """Return what layers keep: keys and values of each head, or a latent with the rotated dims."""
    dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    size = 4 if "32" in dtype else 2
    latent, sizes = getattr(config, "kv_lora_rank", None), Counter[int]()
    of_their_own = len(layers) - (getattr(config, "num_kv_shared_layers", None) or 0)
    for kind, _, window in layers[:of_their_own]:
        if not _attends(kind):
            continue
        one = config
        if getattr(config, "is_heterogeneous", False):  # Gemma 4: sizes by kind
            with suppress(ValueError):
                one = config.per_layer_config[kind]
        dims = 2 * _key_heads(one) * _head_dim(one)
        sizes[window or 0] += size * (latent + config.qk_rope_head_dim if latent else dims)
    all_tokens = sizes.pop(0, 0)
    return Cache(dtype, all_tokens, tuple(sizes.items()))
