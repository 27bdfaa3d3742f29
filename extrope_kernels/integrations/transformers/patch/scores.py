"""The changes that `extend` makes for a score method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ....scores import UNROTATED, PositionMap, Score
from ..._shared.parameters import DUAL_CHUNKS, SPARSE, bind_score, scale_from, score_values_in
from ..model import unsupported
from ..probe.layers import LayerProbe
from ..probe.rotary import RotaryModule, owners_of
from .hooks import Patches
from .rotation import RotaryForward
from .score_forward import ScoreHooks, ScoreRotaryForward
from .state import ThreadFrequencies


class ScoreRequest(NamedTuple):
    """A score method with its parameters.

    log_n: scales queries, unless None. scale_from: the length from which logits grow
        (`query_scale.qwen_1m`), or None.
    """

    score: Score
    log_n: float | None = None
    scale_from: int | None = None


def read_score(
    rotary_modules: list[RotaryModule],
    method: str,
    parameters: Mapping[str, Any],
    cache: str | None,
) -> ScoreRequest:
    """Return the score method in `extend`'s arguments; a model may add parameters of dual_chunk."""
    config = rotary_modules[0].module.config
    if method == "dual_chunk" and getattr(config, DUAL_CHUNKS, None):
        warnings.warn(f"extend: {SPARSE}", stacklevel=5)
        parameters = score_values_in(config, method) | dict(parameters)
    score, log_n = bind_score("extend", method, parameters)
    if cache is not None or not _stores(score, rotary_modules):
        score = replace(score, stored=UNROTATED)
    return ScoreRequest(score, log_n, scale_from("extend", parameters))


def _stores(score: Score, rotary_modules: list[RotaryModule]) -> bool:
    """Return True if layers can rotate keys as the score stores them, the same for all heads.

    A model's own tables have one position for all pairs of a token, and no gradient of positions.
    """
    if isinstance(score.stored, PositionMap):
        return True
    divisor = score.stored.divisor
    fused = all(each.fused is not None for each in rotary_modules)
    return divisor.dim() == 1 and not divisor.requires_grad and fused


def score_patches(
    model: nn.Module,
    rotary_modules: list[RotaryModule],
    method: str,
    request: ScoreRequest,
    layers: str,
) -> Patches:
    """Return a score method's changes; the model is not changed yet.

    Raises ValueError if parts of a model count different things, such as bytes and patches.
    """
    owner, *others = owners_of(rotary_modules)
    if others:
        names = ", ".join(sorted(type(each).__name__ for each in (owner, *others)))
        raise unsupported(
            model, f"each of {names} counts its own positions, but a window has one unit"
        )
    freqs = [_thread_frequencies(each, method, request.score) for each in rotary_modules]
    if request.score.pair_maps is not None:
        given = request.score.pair_maps.shape[-1]
        for each in (each for kinds in freqs for each in kinds.freqs.values()):
            if (pairs := each.inv_freq.shape[-1]) != given:
                raise ValueError(
                    f"extend: {method} must have maps of {pairs} pairs of dims, got {given}"
                )
    probe = LayerProbe(model, owner, rotary_modules, layers)
    rotaries = [
        ScoreRotaryForward(each, its_freqs, method, request, probe.around.get(each.module))
        for each, its_freqs in zip(rotary_modules, freqs, strict=True)
        if probe.around.get(each.module) not in probe.near
    ]
    hooks = ScoreHooks(owner, rotaries, probe)
    patches = Patches(
        [override for each in rotaries for override in each.overrides()],
        [(owner, hooks.before_forward, hooks.after_forward)],
        list(probe.far),
    )
    for layer in probe.far:
        patches.overrides += probe.calls[layer].overrides(layer)
    patches.hooks += [(layer, hooks.before_far_layer, None) for layer in probe.far]
    patches.hooks += [(layer, hooks.before_near_layer, None) for layer in probe.near]
    return patches


def _thread_frequencies(
    rotary_module: RotaryModule, method: str, score: Score
) -> ThreadFrequencies:
    """Return the frequencies of an earlier extension, or the model's own."""
    before = vars(rotary_module.module).get("forward")
    if not isinstance(before, RotaryForward):
        own = {kind: rotary_module.own_freqs(kind) for kind in rotary_module.layer_types}
        return ThreadFrequencies(own)
    # Positions that restart keep the amplitudes of the decay near 1.
    decays = any(freqs.log_decay is not None for freqs in before.freqs.values())
    if decays and not score.stored.modulus:
        raise ValueError(
            f"extend: {method} must have frequencies without decay, got {before.method}"
        )
    return before.thread_freqs
