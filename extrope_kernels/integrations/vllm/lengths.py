"""Tensors that follow the requests' lengths, updated once per forward without device reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import RopeFreqs, scores
from .settings import NAME

_TRAINED, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"


@dataclass(frozen=True)
class ByLength:
    """A frequency method that follows the present length of each request.

    freqs: takes seq_len, a number or (requests,), and returns frequencies with one amplitude.
    amplitude: maps lengths (requests,) to factors of logits, if these follow the length too.
    """

    freqs: Callable[..., RopeFreqs]
    amplitude: Callable[[Tensor], Tensor] | None = None


def by_length(
    method: str, function: Callable[..., RopeFreqs], given: Mapping[str, Any], partly: bool
) -> ByLength:
    """Return a frequency method, with all parameters but seq_len, to follow requests' lengths.

    given: its parameters. partly: only some dims of a head rotate.
    Raises ValueError if its amplitude follows the length and does not scale the whole logit.
    """
    if method != "dynamic_yarn" or given.get("attention_factor") is not None:
        return ByLength(function)
    if partly or given.get("mscale") is not None or given.get("mscale_all_dim") is not None:
        raise ValueError(
            f"{NAME}: dynamic_yarn with a raw cache must have attention_factor for heads that "
            "rotate in part and for mscale, got none"
        )
    start = given.get(_LONGEST) or given[_TRAINED]
    amplitude = partial(_yarn_squared, given[_TRAINED], start, given.get("finetuned", False))
    return ByLength(partial(function, attention_factor=1.0), amplitude)


def _yarn_squared(trained: int, start: int, finetuned: bool, lengths: Tensor) -> Tensor:
    """Return YaRN's amplitude of queries times that of keys."""
    factor = lengths.clamp(min=start).double() / trained
    if not finetuned:
        factor = torch.where(lengths > start, factor, 1.0)
    return (0.1 * factor.clamp(min=1.0).log() + 1.0).square()


class Lengths:
    """Tensors that layers pass to the op, in fixed buffers: a graph reads them in every replay.

    kinds: the frequency methods that follow the length, by the name of a kind of layers.
    past: (requests,) int32, each request's tokens before this forward.
    cu_seqlens: (requests + 1,) int32, the boundaries of each request's new tokens.
    """

    def __init__(
        self,
        kinds: Mapping[str | None, ByLength],
        scale_from: int | None,
        requests: int,
        tokens: int,
        device: Any,
    ) -> None:
        self.kinds = kinds
        self.scale_from = scale_from
        self.past = torch.zeros(requests, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self._inv_freq: dict[str | None, Tensor] = {}
        self._scales: dict[tuple[str | None, bool], Tensor] = {}
        self._tokens = torch.arange(tokens, dtype=torch.int32, device=device)

    def update(self, starts: Tensor, seq_lens: Tensor) -> None:
        """Read a forward's batch: the boundaries of new tokens, and the lengths including them."""
        requests = len(seq_lens)
        if requests > len(self.past):
            self.past = self.past.new_zeros(requests)
            self.cu_seqlens = self.cu_seqlens.new_zeros(requests + 1)
            self._inv_freq.clear()
        torch.sub(seq_lens, starts.diff(), out=self.past[:requests])
        for name, kind in self.kinds.items():
            found = kind.freqs(seq_len=seq_lens).inv_freq
            if name not in self._inv_freq:
                self._inv_freq[name] = found.new_zeros(len(self.past), found.shape[-1])
            self._inv_freq[name][:requests] = found
        self._update_scales(starts, seq_lens)

    def _update_scales(self, starts: Tensor, seq_lens: Tensor) -> None:
        amplitudes = {name: kind.amplitude for name, kind in self.kinds.items() if kind.amplitude}
        if self.scale_from is None and not amplitudes:
            return
        # Tokens after the last request's are padding: any request will do for them.
        request = torch.searchsorted(starts[1:], self._tokens, right=True)
        request = request.clamp_(max=len(seq_lens) - 1)
        one = by_score = self._tokens.new_ones((), dtype=torch.float64)
        if self.scale_from is not None:
            positions = self._tokens + (seq_lens - starts[1:])[request]
            by_score = scores.query_scale.qwen_1m(positions, self.scale_from)
            self._write((None, True), by_score)
        for name, amplitude in amplitudes.items():
            by_method = amplitude(seq_lens)[request]
            for scored, other in ((False, one), (True, by_score)):
                self._write((name, scored), by_method * other)

    def _write(self, key: tuple[str | None, bool], scale: Tensor) -> None:
        if key not in self._scales:
            self._scales[key] = scale.new_ones(len(self._tokens), dtype=torch.float32)
        self._scales[key].copy_(scale)

    def inv_freq(self, kind: str | None, requests: int) -> Tensor | None:
        """Return a kind's (requests, rotary_dim / 2); None if its frequencies are fixed."""
        found = self._inv_freq.get(kind)
        return None if found is None else found[:requests]

    def query_scale(self, kind: str | None, scored: bool, tokens: int) -> Tensor | None:
        """Return factors of logits, (tokens,) float32, or None.

        scored: for layers that attend by the score method.
        """
        found = self._scales.get((kind, scored))
        if found is None and scored:
            found = self._scales.get((None, True))
        return None if found is None else found[:tokens]
