"""What `extend` changes for a score method, and the hooks that make a forward's `Rotation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ... import methods
from ...ops.attention import attend
from ...scores import UNROTATED, Score
from .architecture import RotarySite
from .forwards import argument_names, by_name, cache_of, caches_in, tokens_of
from .layers import Layers, switched
from .parameters import bind_score, own_freqs
from .rotary import Rotary
from .rotation import KEYWORD, Rotation, rotation_in
from .rows import read_rows

_ON_CACHE = "_extrope_stored"


def score_changes(
    model: nn.Module, sites: list[RotarySite], method: str, parameters: Mapping[str, Any]
) -> tuple[list, list]:
    """Return the overrides and the hooks of an `Extension`; nothing is changed yet."""
    score, log_n = bind_score(method, parameters)
    overrides, hooks = [], []
    for site in sites:
        rotary = Rotary(site, _freqs_in_force(site, method, score), method)
        layers = Layers(site)
        _check_heads(score, log_n, layers)
        overrides.append((site.rotary, "forward", rotary))
        overrides += [(layer, "config", switched(layer.config)) for layer in layers.far]
        forward = ScoreForward(site, rotary, layers, score, log_n)
        hooks.append((site.owner, forward.before_forward, forward.after_forward))
        hooks += [(layer, forward.before_far_layer, None) for layer in layers.far]
        hooks += [(layer, before_near_layer, None) for layer in layers.near]
    if hasattr(model, "generate"):
        overrides.append((model, "create_masks_for_generate", keep_mask))
    return overrides, hooks


class ScoreForward:
    """Hooks around the forward of a model whose layers attend by a score method."""

    def __init__(
        self, site: RotarySite, rotary: Rotary, layers: Layers, score: Score, log_n: float | None
    ) -> None:
        self.rotary = rotary
        self.layer_type = site.layer_type
        self.score = score
        self.log_n = log_n
        self.needs_mask = bool(layers.near)
        self.argument_names = argument_names(site.owner)
        self.layer_argument_names = {type(layer): argument_names(layer) for layer in layers.far}

    def before_forward(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: check what is asked for, and add the `Rotation`."""
        arguments = by_name(self.argument_names, args, kwargs)
        if arguments.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise ValueError(
                "extend: output_attentions must be False, as no weights exist to be returned, "
                "got True"
            )
        tokens, past = tokens_of(arguments), self._past(cache_of(arguments))
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        rows = read_rows(tokens, past, mask, positions)
        stored = None
        if self.score.stored != UNROTATED:
            stored = self.score.stored(rows.positions)
        freqs = self.rotary.freqs_on(self.layer_type, tokens.device)
        arguments[KEYWORD] = Rotation(
            freqs, stored, self.rotary.interleaved, self.score, self.log_n, rows
        )
        arguments["position_ids"] = rows.positions
        if not self.needs_mask:
            # A mask that is made already: transformers makes none of (seqlen, seqlen) then.
            arguments["attention_mask"] = torch.ones(1, 1, 1, 1, device=tokens.device)
        return (), arguments

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook: mark the cache that the forward made."""
        for cache in caches_in(output):
            setattr(cache, _ON_CACHE, self.score.stored)

    def before_far_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of an extended layer: the `Rotation` takes the place of cos."""
        arguments = by_name(self.layer_argument_names[type(layer)], args, kwargs)
        arguments["position_embeddings"] = (rotation_in(layer, arguments), None)
        return (), arguments

    def _past(self, cache: Any) -> int:
        """How many tokens the cache holds; marks it as one of keys at the method's positions."""
        if cache is None:
            return 0
        from transformers import Cache

        if not isinstance(cache, Cache):
            raise ValueError(f"extend: cache must be a Cache, got {type(cache).__name__}")
        past = int(cache.get_seq_length())
        if past and getattr(cache, _ON_CACHE, None) != self.score.stored:
            raise ValueError(
                f"extend: cache must have been filled under {self.rotary.method}, whose keys "
                "are rotated in another way, got one of other forwards"
            )
        setattr(cache, _ON_CACHE, self.score.stored)
        return past


def before_near_layer(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a layer with a sliding window: it rotates and attends as ever."""
    return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


def keep_mask(*, attention_mask: Any = None, **_: Any) -> Any:
    """Stand in for a model's `create_masks_for_generate`: rows are read from the mask as it is."""
    return attention_mask


def _freqs_in_force(site: RotarySite, method: str, score: Score) -> dict:
    """Those of an extension before this one, or the model's own."""
    before = vars(site.rotary).get("forward")
    if not isinstance(before, Rotary):
        return {site.layer_type: own_freqs(site)}
    # Positions that start anew keep the amplitudes of the decay near 1.
    if before.freqs[site.layer_type].log_decay is not None and not score.stored.modulus:
        raise ValueError(f"extend: {method} must have frequencies without decay, got xpos")
    return before.freqs


def _check_heads(score: Score, log_n: float | None, layers: Layers) -> None:
    """One token on the CPU: the attention itself knows best what it takes."""
    token = torch.zeros(1, 1, 1, layers.head_dim, dtype=layers.dtype)
    attend(score, token, token, token, methods.rope(2), log_n=log_n, op="extend")
