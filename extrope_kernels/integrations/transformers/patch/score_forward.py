"""A forward of a model whose layers attend by a score method.

The owner's hook reads the rows of the batch. Each rotary embedding returns a `ScoreAttention` in
place of its tables, so it reaches every layer as tables would. The hook of an extended layer
replaces it by tables that rotate keys as a cache stores them, and puts it in the place of the mask,
which every layer passes to its attention. The hook of any other layer replaces it by that layer's
own tables. `ScoreAttention.attend` then attends, in the layer's place.
"""

from __future__ import annotations

import inspect
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .... import RopeFreqs, apply_rope, scores
from ....scores import UNROTATED, Score
from ..attention import BOUNDARIES, softmax_options
from ..batch import Batch
from ..batch.packed import PackedBatch, packed_by_boundaries
from ..batch.padded import PaddedBatch, no_mask, read_batch, static_batch
from ..batch.paged import paged_batch
from ..model import cache_of, exports_to_onnx, tokens_of
from ..probe.attention import (
    ARGUMENT,
    refuse_options,
    register_attention,
)
from ..probe.layers import Heads, LayerProbe
from ..probe.rotary import RotaryModule, argument_names, by_name
from .rotary_forward import RotaryForward, Rotation, ThreadFrequencies
from .state import in_progress


class ScoreRequest(NamedTuple):
    """A score method with its parameters.

    log_n: scales queries, unless None. scale_from: the length from which logits grow
        (`query_scale.qwen_1m`), or None.
    """

    score: Score
    log_n: float | None = None
    scale_from: int | None = None


class ScoreRotaryForward(RotaryForward):
    """Replacement forward of a rotary embedding, which returns a `ScoreAttention`.

    layer: the layer that calls the rotary embedding, or None if their owner calls it. The layer's
        pre-hook passes it its `ScoreAttention`; this call then returns only tables.
    """

    def __init__(
        self,
        rotary_module: RotaryModule,
        thread_freqs: ThreadFrequencies,
        method: str,
        request: ScoreRequest,
        layer: nn.Module | None,
    ) -> None:
        super().__init__(rotary_module, thread_freqs, method)
        self.layer = layer
        self.request = request
        self.key = uuid.uuid4().hex

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        batch = getattr(in_progress, self.key, None)  # from the hook of the owner or of the layer
        if layer_type not in self.freqs or batch is None:
            return super().__call__(x, position_ids, layer_type)
        attention = self.attention(batch, x.device, layer_type)
        positions = attention.positions
        # The attention multiplies queries by the attention factor of both sides.
        freqs = attention.freqs
        keys = RopeFreqs(freqs.inv_freq, log_decay=freqs.for_keys().log_decay)
        if self.fused is not None:
            stored = (Rotation(keys, positions, self.fused.interleaved, keys_only=True),) * 2
        else:
            at = torch.zeros_like(batch.positions) if positions is None else positions
            stored = self.tables(layer_type, keys, x, at.to(x.device))
        if self.layer is not None:
            return stored
        own = super().__call__(x, position_ids, layer_type)
        attention = attention.changed(stored=stored, own=own)
        return attention if self.rotary_module.single else (attention, attention)

    def attention(
        self, batch: Batch, device: torch.device, layer_type: str | None = None
    ) -> ScoreAttention:
        """Return the `ScoreAttention` of the forward in progress, without tables yet."""
        positions = None
        stored = self.request.score.stored
        if stored != UNROTATED:
            positions = stored(batch.positions).to(device)
        return ScoreAttention(
            self.request,
            self.freqs_on(layer_type, device),
            batch.to(device),
            positions,
            raw_queries=self.fused is not None,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; copies in another process need the attention's name registered."""
        super().__setstate__(state)
        register_attention()


class ScoreHooks:
    """Hooks around the forward of a model whose layers attend by a score method."""

    def __init__(
        self, owner: nn.Module, rotaries: list[ScoreRotaryForward], probe: LayerProbe
    ) -> None:
        self.rotaries = rotaries
        self.inner = {each.layer: each for each in rotaries if each.layer is not None}
        self.heads = probe.far
        self.calls = probe.calls
        self.needs_mask = probe.needs_mask
        self.others_mix = probe.others_mix
        self.argument_names = argument_names(owner)
        self.layer_argument_names = {
            layer: argument_names(layer) for layer in [*probe.far, *probe.near]
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
        tokens, cache = tokens_of(arguments), cache_of(arguments)
        batch = self._read_batch(tokens, cache, arguments)
        for rotary in self.rotaries:
            setattr(in_progress, rotary.key, None if rotary.layer else batch)
        if self.inner:
            arguments[ARGUMENT] = batch
        mask = arguments.get("attention_mask")
        if isinstance(batch, PaddedBatch) and isinstance(mask, Tensor) and mask.dim() == 2:
            # Convolutions and states take its last columns for the new tokens.
            arguments["attention_mask"] = mask[:, : batch.total]
        if isinstance(batch, PackedBatch):
            arguments |= self._of_packed(module, batch, tokens, cache)
        elif arguments.get("position_ids") is None and batch.leftpad is not None:
            arguments["position_ids"] = batch.positions
        if not self.needs_mask:
            arguments["attention_mask"] = no_mask(tokens.device)
        return (), arguments

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forget the rows of the forward: its forward hook."""
        for rotary in self.rotaries:
            setattr(in_progress, rotary.key, None)

    def before_far_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hand an extended layer tables for stored keys, and its attention: forward pre-hook."""
        arguments = by_name(self.layer_argument_names[layer], args, kwargs)
        batch = arguments.pop(ARGUMENT, None)
        attention = exchange(arguments, "stored")
        if layer in self.inner and batch is not None:
            inner = self.inner[layer]
            setattr(in_progress, inner.key, batch)
            tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
            attention = inner.attention(batch, tensor.device)
        if attention is None:
            raise RuntimeError(
                f"extend: {type(layer).__name__} must be called by its model, got a direct call"
            )
        attention = attention.of(self.heads[layer])
        arguments = attention.batch.for_layer(layer, arguments, attention)
        return (), self.calls[layer].with_attention(layer, arguments, attention)

    def before_near_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hand a layer that is not extended its own tables: forward pre-hook."""
        arguments = by_name(self.layer_argument_names[layer], args, kwargs)
        arguments.pop(ARGUMENT, None)
        exchange(arguments, "own")
        return (), arguments

    def _read_batch(self, tokens: Tensor, cache: Any, arguments: Mapping[str, Any]) -> Batch:
        if (shared := self.rotaries[0].shared) is not None:
            return shared.batch(tokens)
        if cache is not None and (paged := paged_batch(cache, arguments)) is not None:
            return paged
        if arguments.get(BOUNDARIES) is not None:
            return packed_by_boundaries(tokens, arguments)
        past, mask = self._past(cache), arguments.get("attention_mask")
        if isinstance(past, Tensor):
            return static_batch(tokens, past, mask)
        return read_batch(tokens, past, mask, arguments.get("position_ids"))

    def _of_packed(
        self, module: nn.Module, batch: PackedBatch, tokens: Tensor, cache: Any
    ) -> dict[str, Any]:
        """Return arguments that tell packed sequences apart for the model's other layers too."""
        if self.others_mix:
            raise ValueError(
                "extend: a model must have no convolutions or states for packed rows, got "
                f"{type(module).__name__}; pad its rows instead"
            )
        if cache is not None:
            raise ValueError(
                "extend: packed rows must come without a cache, got one; pad rows to generate"
            )
        told = {"position_ids": batch.positions, "attention_mask": None}
        if self.needs_mask:
            told["attention_mask"] = packed_masks(module, tokens, batch.positions)
        return told | ({"use_cache": False} if "use_cache" in self.argument_names else {})

    def _past(self, cache: Any) -> int | Tensor:
        """Return the cache's number of tokens; in a graph it may be a tensor of the cache."""
        if cache is None:
            return 0
        from transformers.cache_utils import Cache  # torch.compile of 2.11 imports nothing lazy

        if not isinstance(cache, Cache):
            raise ValueError(f"extend: cache must be a Cache, got {type(cache).__name__}")
        past = self._length(cache)
        tells = isinstance(past, Tensor) and not torch.compiler.is_compiling()
        return int(past) if tells else past

    def _length(self, cache: Any) -> int | Tensor:
        """Return the cached length of an extended layer: in hybrids other layers hold no tokens."""
        index = getattr(next(iter(self.heads)), "layer_idx", None)
        known = index is not None and index >= 0
        return cache.get_seq_length(index) if known else cache.get_seq_length()


def packed_masks(module: nn.Module, tokens: Tensor, positions: Tensor) -> Any:
    """Return the masks of packed rows, by kind of layers, as `generate` prepares masks.

    Some models make their own without positions (GPT-OSS, AFMoE).
    """
    from transformers.masking_utils import create_masks_for_generate

    # Of the tokens only sizes, dtype and device count. Names differ between versions.
    like = torch.empty(*tokens.shape[:2], 0, dtype=module.dtype, device=tokens.device)
    arguments = {"config": module.config, "attention_mask": None, "position_ids": positions}
    arguments |= {"inputs_embeds": like, "input_embeds": like, "cache": None}
    arguments |= {
        "past_key_values": None,
        "cache_position": torch.arange(tokens.shape[1], device=tokens.device),
    }
    names = inspect.signature(create_masks_for_generate).parameters
    arguments = {name: value for name, value in arguments.items() if name in names}
    return create_masks_for_generate(**arguments)


class ScoreAttention:
    """A score method, frequencies, the rows of a batch, and tables for both kinds of layers.

    It is no dataclass, since FSDP casts the tensors in those.

    positions: stored positions of keys, (batch or 1, seqlen); None if keys stay raw.
    raw_queries: the tables for extended layers rotate only keys.
    stored, own: the position embeddings for extended layers, and those for the others.
    heads: the heads of the layer whose attention this is.
    """

    def __init__(
        self,
        request: ScoreRequest,
        freqs: RopeFreqs,
        batch: Batch,
        positions: Tensor | None,
        raw_queries: bool,
        stored: Any = None,
        own: Any = None,
        heads: Heads | None = None,
    ) -> None:
        self.request = request
        self.freqs = freqs
        self.batch = batch
        self.positions = positions
        self.raw_queries = raw_queries
        self.stored = stored
        self.own = own
        self.heads = heads

    def changed(self, **changes: Any) -> ScoreAttention:
        """Return a copy with other values of some attributes."""
        return ScoreAttention(**{**vars(self), **changes})

    def of(self, heads: Heads) -> ScoreAttention:
        """Return the attention for one layer."""
        freqs = self.freqs
        if heads.sign < 0:
            freqs = replace(freqs, inv_freq=-freqs.inv_freq)
        if not heads.scaled:
            freqs = replace(freqs, attention_factor=1.0)
        return self.changed(heads=heads, freqs=freqs)

    def __getitem__(self, index: Any) -> ScoreAttention:
        """Return the attention of the last tokens, sliced like tables of (batch, seqlen, dim).

        In layers that reuse other layers' keys, a model computes only the requested tokens.
        """
        if not isinstance(self.batch, PaddedBatch):
            raise ValueError(
                "extend: a model with layers that compute only the last tokens must run without "
                "a static cache in a graph, continuous batching and packed rows, got one of them"
            )
        tokens = range(self.batch.new)[index[1]]
        last = len(tokens)
        if tokens != range(self.batch.new)[self.batch.new - last :]:
            raise ValueError(f"extend: tables must be sliced to the last tokens, got {index[1]}")

        def sliced(tables: Any) -> Any:
            return None if tables is None else type(tables)(each[index] for each in tables)

        positions = None if self.positions is None else self.positions[..., tokens.start :]
        batch, stored, own = self.batch.last(last), sliced(self.stored), sliced(self.own)
        return self.changed(batch=batch, positions=positions, stored=stored, own=own)

    def to(self, device: torch.device | str | int, **_: Any) -> ScoreAttention:
        """Move to `device`: accelerate's hooks call this if a model spans several devices."""

        def move(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(move(each) for each in value)
            return value.to(device) if hasattr(value, "to") else value

        moved = ("freqs", "batch", "positions", "stored", "own")
        return self.changed(**{name: move(getattr(self, name)) for name in moved})

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """Attend from queries in the layer's rotation to keys and values in the cache's form.

        q, k, v: (batch, heads, seqlen, head_dim), the queries the last of the keys' tokens.
        Returns (batch, seqlen_q, heads, head_dim).
        """
        heads, (score, log_n, scale_from) = self.heads, self.request
        refuse_options(module, options, self.batch.has_boundaries)
        # Under autocast, norms return q and k in a wider dtype than v's.
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        here = self if self.freqs.inv_freq.device == q.device else self.to(q.device)
        if not self.raw_queries and here.positions is not None:
            freqs = RopeFreqs(here.freqs.inv_freq)
            q = apply_rope(q, freqs, positions=here.positions, inverse=True, **heads.layout)
        if scale_from is not None:
            scale = scores.query_scale.qwen_1m(here.batch.positions.to(q.device), scale_from)
            q = (q * scale[..., None, None]).to(q.dtype)
        call = {"freqs": here.freqs, "score": score, "log_n": log_n, **heads.layout}
        call |= softmax_options(module, options)
        if heads.sliding_window is not None:
            call.setdefault("sliding_window", heads.sliding_window)
        if heads.chunk_size is not None:
            call["chunk_size"] = heads.chunk_size
        return here.batch.attend(module, q, k, v, call)


def exchange(arguments: dict[str, Any], tables: str) -> ScoreAttention | None:
    """Put tables in the place of a layer's `ScoreAttention`, and return that; None without one.

    tables: "stored" or "own".
    """
    found = None
    for name, value in list(arguments.items()):
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, ScoreAttention):
            found, arguments[name] = first, getattr(first, tables)
    return found
