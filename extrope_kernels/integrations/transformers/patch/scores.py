"""The changes that `extend` makes for a score method."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

from torch import nn

from ...._usage import shortened
from ....ops.attention import check_log_n
from ....scores import FIRST_KEY, UNROTATED, PositionMap, Region, Score
from ..._shared.choice import images_refused
from ..._shared.parameters import DUAL_CHUNKS, SPARSE, bind_score, scale_from, score_values_in
from ..model import generation_config_owner, unsupported
from ..probe.layers import LayerProbe, first_call, probe_layers, refuse_without_weights
from ..probe.rotary import RotaryModule, argument_names, find_rotary_modules, owners_of
from .generate import batching_patches, mask_patches
from .hooks import Applied, Patches, route_forward_through_hooks
from .rotary_forward import RotaryForward, ThreadFrequencies, fingerprint
from .score_forward import ScoreHooks, ScoreRequest, ScoreRotaryForward


def read_score(rotary_modules: list[RotaryModule], applied: Applied) -> ScoreRequest:
    """Return the score method of an extension; a model may add parameters of dual_chunk."""
    config, parameters = rotary_modules[0].module.config, applied.parameters
    if isinstance(applied.own, Score):
        check_log_n("extend", log_n := parameters.get("log_n"))
        request = ScoreRequest(applied.own, log_n)
    else:
        if applied.method == "dual_chunk" and getattr(config, DUAL_CHUNKS, None):
            warnings.warn(f"extend: {SPARSE}", stacklevel=6)
            parameters = score_values_in(config, applied.method) | parameters
        score, log_n = bind_score("extend", applied.method, parameters)
        request = ScoreRequest(score, log_n, scale_from("extend", parameters))
    if applied.cache is not None:
        return request._replace(score=replace(request.score, stored=UNROTATED))
    return request


def score_patches(
    model: nn.Module, rotary_modules: list[RotaryModule], applied: Applied
) -> Patches:
    """Return a score method's changes; the model is not changed yet.

    Raises ValueError for a model or parameters that do not fit.
    """
    request = read_score(rotary_modules, applied)
    patches = attention_patches(model, rotary_modules, applied, request)
    if reason := why_no_images(model, rotary_modules):
        told = f"{applied.method} takes text without images: {reason}"
        warnings.warn(f"extend: {told}", stacklevel=5)
    return patches


def raw_key_patches(model: nn.Module, applied: Applied) -> Patches:
    """Return what lets layers rotate all cached keys anew, by frequencies that are in place."""
    own = PositionMap()
    request = ScoreRequest(Score(applied.method, (Region(FIRST_KEY, own, own),), stored=UNROTATED))
    rotary_modules = find_rotary_modules(model, applied.layers)
    patches = attention_patches(model, rotary_modules, applied, request)
    route_forward_through_hooks(owners_of(rotary_modules), patches)
    return patches


def attention_patches(
    model: nn.Module, rotary_modules: list[RotaryModule], applied: Applied, request: ScoreRequest
) -> Patches:
    """Return the changes by which layers attend by a score.

    Raises ValueError if parts of a model count different things, such as bytes and patches.
    """
    owner, *others = owners_of(rotary_modules)
    if others:
        names = ", ".join(sorted(type(each).__name__ for each in (owner, *others)))
        raise unsupported(
            model, f"each of {names} counts its own positions, but a window has one unit"
        )
    method = applied.method
    refuse_without_weights(owner, method)
    freqs = [_thread_frequencies(each, method, request.score) for each in rotary_modules]
    if request.score.pair_maps is not None:
        given = request.score.pair_maps.shape[-1]
        for each in (each for kinds in freqs for each in kinds.freqs.values()):
            if (pairs := each.inv_freq.shape[-1]) != given:
                raise ValueError(
                    f"extend: {method} must have maps of {pairs} pairs of dims, got {given}"
                )
    probe = LayerProbe(model, owner, rotary_modules, applied.layers)
    rotaries = [
        ScoreRotaryForward(each, its_freqs, method, request, probe.around.get(each.module))
        for each, its_freqs in zip(rotary_modules, freqs, strict=True)
        if probe.around.get(each.module) not in probe.near
    ]
    hooks = ScoreHooks(owner, rotaries, probe)
    patches = Patches(
        [override for each in rotaries for override in each.overrides()],
        [(owner, hooks.before_forward, hooks.after_forward)],
        [partial(_try_patched, model, owner)],
        probe,
    )
    for layer in probe.far:
        patches.overrides += probe.calls[layer].overrides(layer)
    patches.hooks += [(layer, hooks.before_far_layer, None) for layer in probe.far]
    patches.hooks += [(layer, hooks.before_near_layer, None) for layer in probe.near]
    patches.overrides += [*mask_patches(model), *batching_patches(model)]
    return patches


def _try_patched(model: nn.Module, owner: nn.Module) -> Patches:
    """Run four tokens, to find what a model does between its rotary embedding and its layers."""
    try:
        probe_layers(first_call(model, owner))
    except Exception as error:  # a foreign model may raise anything
        raise unsupported(
            owner,
            "its code between the rotary embedding and the layers needs tables of cos and sin "
            f"({shortened(error)})",
        ) from error
    return Patches()


def _thread_frequencies(
    rotary_module: RotaryModule, method: str, score: Score
) -> ThreadFrequencies:
    """Return the frequencies of an earlier extension, or the model's own."""
    before = vars(rotary_module.module).get("forward")
    if not isinstance(before, RotaryForward):
        own = {kind: rotary_module.own_freqs(kind) for kind in rotary_module.layer_types}
        return ThreadFrequencies(own, {kind: fingerprint(each) for kind, each in own.items()})
    # Positions that restart keep the amplitudes of the decay near 1.
    decays = any(freqs.log_decay is not None for freqs in before.freqs.values())
    if decays and not score.stored.modulus:
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
