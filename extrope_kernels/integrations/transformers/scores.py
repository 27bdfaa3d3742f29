"""The changes that `extend` makes for a score method, and for keys that are cached raw."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.attention import check_log_n
from ...scores import Score
from .._shared.choice import images_refused
from .._shared.parameters import DUAL_CHUNKS, SPARSE, bind_score, scale_from, score_values_in
from .attending import attending_overrides
from .attention import ON_LAYER
from .generate import batching_patches, mask_patches
from .layers import LayerProbe, refuse_without_weights
from .model import generation_config_owner, unsupported
from .patches import Applied, Patches, route_forward_through_hooks
from .rotary import (
    RotaryModule,
    argument_names,
    by_name,
    find_rotary_modules,
    owners_of,
)
from .rotation import RotaryForward, Rotation, ThreadFrequencies, fingerprint
from .rows import RowsOfOwner


class ScoreRequest(NamedTuple):
    """A score method with its parameters; score None for plain RoPE of raw keys.

    log_n: scales queries, unless None. scale_from: the length from which logits grow
        (`query_scale.qwen_1m`), or None.
    """

    score: Score | None = None
    log_n: float | None = None
    scale_from: int | None = None


def read_score(rotary_modules: list[RotaryModule], applied: Applied) -> ScoreRequest:
    """Return the score method of an extension; a model may add parameters of dual_chunk."""
    config, parameters = rotary_modules[0].module.config, applied.parameters
    if isinstance(applied.own, Score):
        check_log_n("extend", log_n := parameters.get("log_n"))
        return ScoreRequest(applied.own, log_n)
    if applied.method == "dual_chunk" and getattr(config, DUAL_CHUNKS, None):
        warnings.warn(f"extend: {SPARSE}", stacklevel=6)
        parameters = score_values_in(config, applied.method) | parameters
    score, log_n = bind_score("extend", applied.method, parameters)
    return ScoreRequest(score, log_n, scale_from("extend", parameters))


def score_patches(
    model: nn.Module, rotary_modules: list[RotaryModule], applied: Applied
) -> Patches:
    """Return the patches of a score method; the model is not changed yet."""
    request = read_score(rotary_modules, applied)
    if applied.layers == "all":
        raise ValueError(
            f"extend: layers must be 'full' for {applied.method}, got 'all': windows and chunks "
            "have no distances that training has not covered"
        )
    patches = attention_patches(model, rotary_modules, applied, request)
    if reason := why_no_images(model, rotary_modules):
        told = f"{applied.method} takes text without images: {reason}"
        warnings.warn(f"extend: {told}", stacklevel=5)
    return patches


def raw_key_patches(model: nn.Module, applied: Applied) -> Patches:
    """Return what lets layers rotate all cached keys anew, by frequencies that are in place."""
    rotary_modules = find_rotary_modules(model, applied.layers)
    patches = attention_patches(model, rotary_modules, applied, ScoreRequest())
    route_forward_through_hooks(owners_of(rotary_modules), patches)
    return patches


def attention_patches(
    model: nn.Module, rotary_modules: list[RotaryModule], applied: Applied, request: ScoreRequest
) -> Patches:
    """Return the changes by which layers attend by a score, or by raw keys.

    Raises ValueError if parts of a model count different things, such as bytes and patches.
    """
    owner, *others = owners_of(rotary_modules)
    if others:
        names = ", ".join(sorted(type(each).__name__ for each in (owner, *others)))
        raise unsupported(
            model, f"each of {names} counts its own positions, but a window has one unit"
        )
    method, score = applied.method, request.score
    refuse_without_weights(owner, method)
    rotaries = [
        RotaryForward(each, _thread_frequencies(each, method, score), method)
        for each in rotary_modules
    ]
    freqs = [each for rotary in rotaries for each in rotary.freqs.values()]
    if score is not None and score.pair_maps is not None:
        given = score.pair_maps.shape[-1]
        for each in freqs:
            if (pairs := each.inv_freq.shape[-1]) != given:
                raise ValueError(
                    f"extend: {method} must have maps of {pairs} pairs of dims, got {given}"
                )
    probe = LayerProbe(model, owner, rotaries)
    raw = applied.cache is not None or any(each.log_decay is not None for each in freqs)
    if raw and any(each.attention_factor != 1 for each in freqs):
        probe.scale_by_themselves()
    for layer in probe.far.values():
        layer.score, layer.log_n, layer.scale_from = request
        layer.raw = raw
    used = {id(each.rotary): each.rotary for each in probe.far.values()}
    hooks = RowsOfOwner(owner, list(used.values()), probe.others_mix)
    patches = Patches(
        [override for each in used.values() for override in each.overrides()],
        [(owner, hooks.before_forward, None)],
        probe=probe,
        raw=raw,
    )
    patches.overrides += [(layer, ON_LAYER, found) for layer, found in probe.far.items()]
    patches.overrides += attending_overrides(owner, (*probe.far, *probe.still))
    patches.overrides += [*mask_patches(model), *batching_patches(model)]
    if raw:
        patches.hooks += [(layer, leave_raw(layer), None) for layer in probe.far]
    return patches


def leave_raw(layer: nn.Module) -> Any:
    """Return the pre-hook of a layer that keeps its queries and keys raw.

    Raises ValueError for a layer that makes its own tables.
    """
    names, tables = argument_names(layer), "position_embeddings"
    if tables not in names:
        raise unsupported(layer, "it makes its own tables, so its keys cannot stay raw")

    def before_layer(
        layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        arguments = by_name(names, args, kwargs)
        arguments[tables] = _unrotated(arguments[tables])
        return (), arguments

    return before_layer


def _unrotated(tables: Any) -> Any:
    """Return tables that rotate by nothing."""
    if isinstance(tables, (Rotation, Tensor)):  # a tensor: of complex numbers
        return tables.unrotated() if isinstance(tables, Rotation) else torch.ones_like(tables)
    if isinstance(tables[0], Rotation):
        return tuple(each.unrotated() for each in tables)
    return torch.ones_like(tables[0]), torch.zeros_like(tables[1])


def _thread_frequencies(
    rotary_module: RotaryModule, method: str, score: Score | None
) -> ThreadFrequencies:
    """Return the frequencies of an earlier extension, or the model's own."""
    before = vars(rotary_module.module).get("forward")
    if not isinstance(before, RotaryForward):
        own = {kind: rotary_module.own_freqs(kind) for kind in rotary_module.layer_types}
        return ThreadFrequencies(own, {kind: fingerprint(each) for kind, each in own.items()})
    # Positions that restart keep the amplitudes of the decay near 1.
    decays = any(freqs.log_decay is not None for freqs in before.freqs.values())
    if decays and score is not None and not score.stored.modulus:
        raise ValueError(
            f"extend: {method} must have frequencies without decay, got {before.method}"
        )
    return before.thread_freqs


def why_no_images(model: nn.Module, rotary_modules: list[RotaryModule]) -> str | None:
    """Return why a score method refuses the images that a model reads; None if it takes them."""
    generator = generation_config_owner(model)
    whole = getattr(generator, "config", None)
    text = None if whole is None else whole.get_text_config(decoder=True)
    if text is whole:
        return None
    kinds = [each.parameters(kind) for each in rotary_modules for kind in each.layer_types]
    both_ways = getattr(text, "use_bidirectional_attention", None)
    return images_refused(kinds, bool(both_ways) or "token_type_ids" in argument_names(generator))
