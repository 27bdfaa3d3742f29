"""Changes of `extend` for a score method: hooks that build a forward's `Attending`."""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from ...scores import UNROTATED, PositionMap, Score
from .._shared.parameters import DUAL_CHUNKS, SPARSE, bind_score, scale_from, score_values_in
from .attend import Attending, axes_of, exchange, register_attention
from .context_parallel import SharedRows, by_its_name
from .find import (
    Changes,
    RotarySite,
    argument_names,
    attribute_of,
    by_name,
    cache_of,
    caches_in,
    generator_of,
    owners_of,
    tokens_of,
    unsupported,
)
from .frequencies import FreqsByKind, InForce, Rotary, exports_to_onnx
from .packed import BOUNDARIES, PackedRows, rows_by_boundaries
from .paged import PagedRows, paged_rows
from .rotation import Rotation
from .rows import Rows, keep_mask, no_mask, read_rows, static_rows
from .trial import Layers, with_mask

_ON_CACHE = "_extrope_stored"
# The name under which a model passes the rows to layers with their own rotary embeddings. As an
# argument, the rows are there again when a layer is recomputed for its gradients.
_ROWS = "extrope_rows"
# Per thread: the rows of the forward in progress, by the key of a rotary embedding.
_in_progress = threading.local()


class Asked(NamedTuple):
    """A score method with its parameters.

    log_n: scales queries, unless None. scale_from: the length from which logits grow
        (`query_scale.qwen_1m`), or None.
    """

    score: Score
    log_n: float | None = None
    scale_from: int | None = None


def read_score(
    sites: list[RotarySite], method: str, parameters: Mapping[str, Any], cache: str | None
) -> Asked:
    """Return the score method in `extend`'s arguments; a model may add parameters of dual_chunk."""
    config = sites[0].rotary.config
    if method == "dual_chunk" and getattr(config, DUAL_CHUNKS, None):
        warnings.warn(f"extend: {SPARSE}", stacklevel=4)
        parameters = score_values_in(config, method) | dict(parameters)
    score, log_n = bind_score("extend", method, parameters)
    if cache is not None or not _stores(score, sites):
        score = replace(score, stored=UNROTATED)
    return Asked(score, log_n, scale_from("extend", parameters))


def _stores(score: Score, sites: list[RotarySite]) -> bool:
    """Return True if layers can rotate keys as the score stores them, the same for all heads.

    A model's own tables have one position for all pairs of a token, and no gradient of positions.
    """
    if isinstance(score.stored, PositionMap):
        return True
    divisor = score.stored.divisor
    fused = all(site.fused is not None for site in sites)
    return divisor.dim() == 1 and not divisor.requires_grad and fused


def score_changes(
    model: nn.Module, sites: list[RotarySite], method: str, asked: Asked, layers: str
) -> Changes:
    """Return a score method's changes; the model is not changed yet."""
    owner = _owner(model, sites)
    in_force = [_in_force(site, method, asked.score) for site in sites]
    _check_pairs(method, asked.score, [each.freqs for each in in_force])
    found = Layers(model, owner, sites, layers)
    rotaries = [
        ScoreRotary(site, each, method, asked, found.around.get(site.rotary))
        for site, each in zip(sites, in_force, strict=True)
        if found.around.get(site.rotary) not in found.near
    ]
    forward = ScoreForward(owner, rotaries, found)
    changes = Changes(
        [(each.rotary, "forward", each) for each in rotaries],
        [(owner, forward.before_forward, forward.after_forward)],
        list(found.far),
    )
    for layer in found.far:
        changes.overrides += found.calls[layer].overrides(layer)
    changes.hooks += [(layer, forward.before_far_layer, None) for layer in found.far]
    changes.hooks += [(layer, forward.before_near_layer, None) for layer in found.near]
    generator = generator_of(model)
    if hasattr(generator, "generate"):
        changes.overrides.append((generator, "create_masks_for_generate", keep_mask))
    return changes


def _check_pairs(method: str, score: Score, freqs: list[FreqsByKind]) -> None:
    if score.pair_maps is None:
        return
    given = score.pair_maps.shape[-1]
    for pairs in {each.inv_freq.shape[-1] for kinds in freqs for each in kinds.values()}:
        if pairs != given:
            raise ValueError(
                f"extend: {method} must have maps of {pairs} pairs of dims, got {given}"
            )


def _owner(model: nn.Module, sites: list[RotarySite]) -> nn.Module:
    """Return the module whose tokens all rotary embeddings count.

    Raises ValueError if parts of a model count different things, such as bytes and patches.
    """
    owners = owners_of(sites)
    if len(owners) > 1:
        names = ", ".join(sorted(type(owner).__name__ for owner in owners))
        raise unsupported(
            model, f"each of {names} counts its own positions, but a window has one unit"
        )
    return owners[0]


def _in_force(site: RotarySite, method: str, score: Score) -> InForce:
    """Return the frequencies of an earlier extension, or the model's own."""
    before = vars(site.rotary).get("forward")
    if not isinstance(before, Rotary):
        return InForce({kind: _own_freqs(site, kind) for kind in site.layer_types})
    # Positions that restart keep the amplitudes of the decay near 1.
    decays = any(freqs.log_decay is not None for freqs in before.freqs.values())
    if decays and not score.stored.modulus:
        raise ValueError(
            f"extend: {method} must have frequencies without decay, got {before.method}"
        )
    return before.in_force


def _own_freqs(site: RotarySite, layer_type: str | None) -> RopeFreqs:
    """Return the model's own frequencies, on its device.

    Raises ValueError if they change with the length.
    """
    rotary, kind = site.rotary, site.rotary.rope_type
    if layer_type is not None:
        kind = kind[layer_type]
    if "dynamic" in kind or kind == "longrope":
        raise unsupported(
            site.owner,
            f"its frequencies ({kind}) change with the length; "
            "extend it by a method of that name first",
        )
    inv_freq = attribute_of(rotary, layer_type, "inv_freq")
    if inv_freq.dtype != torch.float32:
        # A cast of the whole model rounded them; the config still has the exact values.
        with torch.device("cpu"):
            fresh = type(rotary)(rotary.config)
        inv_freq = attribute_of(fresh, layer_type, "inv_freq").to(inv_freq.device)
    if (order := site.orders[layer_type]) is not None:
        inv_freq = inv_freq[order.argsort().to(inv_freq.device)]
    factor = float(attribute_of(rotary, layer_type, "attention_scaling", 1.0))
    return RopeFreqs(inv_freq.detach().float().clone(), factor)


class ScoreRotary(Rotary):
    """Replacement forward of a rotary embedding, which returns an `Attending`.

    layer: the layer that calls the rotary embedding, or None if their owner calls it. The layer's
        pre-hook passes it its `Attending`; this call then returns only tables.
    """

    def __init__(
        self,
        site: RotarySite,
        in_force: InForce,
        method: str,
        asked: Asked,
        layer: nn.Module | None,
    ) -> None:
        super().__init__(site, in_force, method)
        self.layer = layer
        self.score, self.log_n, self.scale_from = asked
        self.key = uuid.uuid4().hex

    @property
    def rows(self) -> Any:
        """The rows of the forward in progress, set by the hook of the owner or of the layer."""
        return getattr(_in_progress, self.key, None)

    @rows.setter
    def rows(self, rows: Any) -> None:
        setattr(_in_progress, self.key, rows)

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        if layer_type not in self.freqs or self.rows is None:
            return super().__call__(x, position_ids, layer_type)
        attending = self.attending(x.device, layer_type)
        positions = attending.positions
        # The attention multiplies queries by the attention factor of both sides.
        freqs = attending.freqs
        decay, axes = freqs.for_keys().log_decay, axes_of(positions)
        keys = RopeFreqs(freqs.inv_freq, log_decay=decay, axes=axes)
        if self.fused is not None:
            stored = Rotation(keys, positions, self.fused.interleaved, keys_only=True), None
        else:
            at = torch.zeros_like(self.rows.positions) if positions is None else positions
            stored = self.tables(layer_type, keys, x, at.to(x.device))
        if self.layer is not None:
            return stored
        own = super().__call__(x, position_ids, layer_type)
        attending = attending.changed(stored=stored, own=own)
        return attending if self.site.single else (attending, attending)

    def attending(self, device: torch.device, layer_type: str | None = None) -> Attending:
        """Return the `Attending` of the forward in progress, without tables yet."""
        freqs, rows, positions = self.freqs_on(layer_type, device), self.rows.to(device), None
        if self.score.stored != UNROTATED:
            positions = self.score.stored_at(self.rows.positions).to(device)
            if positions.dim() > self.rows.positions.dim():  # one per pair
                positions = positions.movedim(-1, 0)
        raw_queries = self.fused is not None
        scales = (self.log_n, self.scale_from)
        return Attending(self.score, *scales, freqs, rows, positions, raw_queries)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; copies in another process need the attention's name registered."""
        super().__setstate__(state)
        register_attention()


class ScoreForward:
    """Hooks around the forward of a model whose layers attend by a score method."""

    def __init__(self, owner: nn.Module, rotaries: list[ScoreRotary], layers: Layers) -> None:
        self.rotaries = rotaries
        self.inner = {each.layer: each for each in rotaries if each.layer is not None}
        self.heads = layers.far
        self.calls = layers.calls
        self.mask_name = layers.mask_name
        self.score = rotaries[0].score
        self.needs_mask = layers.needs_mask
        self.others_mix = layers.others_mix
        self.argument_names = argument_names(owner)
        self.layer_argument_names = {
            layer: argument_names(layer) for layer in [*layers.far, *layers.near]
        }

    def before_forward(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Check the arguments and read the rows: forward pre-hook of the owner."""
        arguments = by_name(self.argument_names, args, kwargs)
        if arguments.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise ValueError(
                "extend: output_attentions must be False, since the ops return no weights, got True"
            )
        if exports_to_onnx():
            # The exporter would hide an error, retry in another way, and fail later.
            warnings.warn(
                f"extend: a model under {self.rotaries[0].method} cannot be exported to ONNX, "
                "which has no such attention; torch.export and AOTInductor take it",
                stacklevel=2,
            )
        tokens, positions = tokens_of(arguments), arguments.get("position_ids")
        rows = self._rows(tokens, arguments)
        for rotary in self.rotaries:
            rotary.rows = None if rotary.layer else rows
        if self.inner:
            arguments[_ROWS] = rows
        mask = arguments.get("attention_mask")
        if isinstance(rows, Rows) and isinstance(mask, Tensor) and mask.dim() == 2:
            # Convolutions and states take its last columns for the new tokens.
            arguments["attention_mask"] = mask[:, : rows.total]
        if isinstance(rows, PackedRows):
            arguments |= self._of_packed(module, rows, arguments)
        elif positions is None and rows.leftpad is not None:
            arguments["position_ids"] = rows.positions
        if not self.needs_mask:
            arguments["attention_mask"] = no_mask(tokens.device)
        return (), arguments

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Mark the cache that the forward made: its forward hook."""
        for rotary in self.rotaries:
            rotary.rows = None
        for cache in caches_in(output):
            setattr(cache, _ON_CACHE, self.score.stored)

    def before_far_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hand an extended layer tables for stored keys, and its attention: forward pre-hook."""
        arguments = by_name(self.layer_argument_names[layer], args, kwargs)
        seen: list[Attending] = []

        def stored(attending: Attending) -> Any:
            seen.append(attending)
            return attending.stored

        rows = arguments.pop(_ROWS, None)
        arguments = {name: exchange(value, stored) for name, value in arguments.items()}
        if layer in self.inner and rows is not None:
            inner = self.inner[layer]
            inner.rows = rows
            tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
            seen.append(inner.attending(tensor.device))
        if not seen:
            raise RuntimeError(
                f"extend: {type(layer).__name__} must be called by its model, got a direct call"
            )
        attending = seen[0].of(self.heads[layer])
        if isinstance(attending.rows, PagedRows):
            arguments = attending.rows.for_layer(arguments)
        if isinstance(attending.rows, SharedRows):
            arguments = by_its_name(layer, arguments, attending)
        mask = self.calls[layer].mask(layer, attending)
        return (), with_mask(arguments, self.mask_name, mask)

    def before_near_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hand a layer that is not extended its own tables: forward pre-hook."""
        arguments = by_name(self.layer_argument_names[layer], args, kwargs)
        arguments.pop(_ROWS, None)
        return (), {name: exchange(value, _own) for name, value in arguments.items()}

    def _rows(self, tokens: Tensor, arguments: Mapping[str, Any]) -> Any:
        if (shared := self.rotaries[0].shared) is not None:
            return SharedRows(shared, shared.positions(tokens))
        cache, mask = cache_of(arguments), arguments.get("attention_mask")
        if (paged := paged_rows(cache, arguments)) is not None:
            return paged
        if arguments.get(BOUNDARIES) is not None:
            return rows_by_boundaries(tokens, arguments)
        past = self._past(cache)
        if isinstance(past, Tensor):
            return static_rows(tokens, past, mask)
        return read_rows(tokens, past, mask, arguments.get("position_ids"))

    def _of_packed(
        self, module: nn.Module, rows: PackedRows, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return arguments that tell packed sequences apart for the model's other layers too."""
        if self.others_mix:
            raise ValueError(
                "extend: a model must have no convolutions or states for packed rows, got "
                f"{type(module).__name__}; pad its rows instead"
            )
        if cache_of(arguments) is not None:
            raise ValueError(
                "extend: packed rows must come without a cache, got one; pad rows to generate"
            )
        # transformers makes masks of packed sequences only if it gets positions and no mask.
        told = {"position_ids": rows.positions, "attention_mask": None}
        return told | ({"use_cache": False} if "use_cache" in self.argument_names else {})

    def _past(self, cache: Any) -> int | Tensor:
        """Return the cache's number of tokens; mark its keys as rotated by the score method.

        In a graph it may be a tensor of the cache.
        """
        if cache is None:
            return 0
        from transformers.cache_utils import Cache  # torch.compile of 2.11 imports nothing lazy

        if not isinstance(cache, Cache):
            raise ValueError(f"extend: cache must be a Cache, got {type(cache).__name__}")
        past, mark = self._length(cache), getattr(cache, _ON_CACHE, None)
        if isinstance(past, Tensor) and not torch.compiler.is_compiling():
            past = int(past)
        # A graph cannot tell if a cache without a mark is empty.
        unmarked = mark is None if isinstance(past, Tensor) else not past
        if not unmarked and mark != self.score.stored:
            raise ValueError(
                f"extend: cache must have been filled under {self.rotaries[0].method}, "
                "got one from other forwards"
            )
        setattr(cache, _ON_CACHE, self.score.stored)
        return past

    def _length(self, cache: Any) -> int | Tensor:
        """Return the cached length of an extended layer: in hybrids other layers hold no tokens."""
        index = getattr(next(iter(self.heads)), "layer_idx", None)
        known = index is not None and index >= 0
        return cache.get_seq_length(index) if known else cache.get_seq_length()


def _own(attending: Attending) -> Any:
    return attending.own
