"""Hooks around the forward of a model whose layers attend by a score method."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .attention import PASS, Pass
from .rows import read_rows
from .score_rotary import ScoreRotary, StoredRotation

_ON_CACHE = "_extrope_frame"


class Passes:
    """Reads where the rows of each forward begin, and hands a `Pass` on to the layers.

    all_layers: every layer is extended, so that no other one needs a mask.
    """

    def __init__(
        self, owner: nn.Module, rotary: ScoreRotary, layer_type: str | None, all_layers: bool
    ) -> None:
        self.rotary = rotary
        self.layer_type = layer_type
        self.all_layers = all_layers
        self.argument_names = _argument_names(owner)

    def before_forward(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: check what is asked for, and add the `Pass`."""
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        if arguments.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise ValueError(
                "extend: output_attentions must be False, as no weights exist to be returned, "
                "got True"
            )
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        past = self._past(arguments)
        rows = read_rows(
            tokens, past, arguments.get("attention_mask"), arguments.get("position_ids")
        )
        inner = self.rotary.inner
        freqs = inner.freqs_on(self.layer_type, tokens.device)
        arguments[PASS] = Pass(self.rotary.score, freqs, inner.interleaved, rows)
        arguments["position_ids"] = rows.positions
        if self.all_layers:
            # A mask that is made already: transformers makes none of (seqlen, seqlen) then.
            arguments["attention_mask"] = torch.ones(1, 1, 1, 1, device=tokens.device)
        return (), arguments

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook: mark the cache that the forward made."""
        for value in output.values() if isinstance(output, Mapping) else output:
            if hasattr(value, "get_seq_length"):
                setattr(value, _ON_CACHE, self.rotary.score.frame)

    def _past(self, arguments: Mapping[str, Any]) -> int:
        """How many tokens the cache holds; marks it as one of keys in the method's frame."""
        cache = arguments.get("cache")
        cache = arguments.get("past_key_values") if cache is None else cache
        if cache is None:
            return 0
        from transformers import Cache

        if not isinstance(cache, Cache):
            raise ValueError(f"extend: cache must be a Cache, got {type(cache).__name__}")
        past, frame = int(cache.get_seq_length()), self.rotary.score.frame
        if past and getattr(cache, _ON_CACHE, None) != frame:
            raise ValueError(
                f"extend: cache must have been filled under {self.rotary.score.name}, whose keys "
                "are rotated in another way, got one of other forwards"
            )
        setattr(cache, _ON_CACHE, frame)
        return past


class PlainLayer:
    """Lets a layer with a sliding window rotate and attend as ever."""

    def __init__(self, layer: nn.Module) -> None:
        self.argument_names = _argument_names(layer)

    def before_forward(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the attention layer."""
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        arguments.pop(PASS, None)
        cos, _ = arguments["position_embeddings"]
        if isinstance(cos, StoredRotation):
            arguments["position_embeddings"] = (cos.plain(), None)
        return (), arguments


def keep_mask(*, attention_mask: Any = None, **_: Any) -> Any:
    """Stand in for a model's `create_masks_for_generate`: rows are read from the mask as it is."""
    return attention_mask


def _argument_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]
